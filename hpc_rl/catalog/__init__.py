"""Facts about model families and the model files at hand, without importing any of them (no torch)."""
