"""What a run tells people: metrics.jsonl, the step line, W&B, a text curve and the HTML report (no torch)."""
