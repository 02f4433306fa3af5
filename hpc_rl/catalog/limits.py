"""What the built-in engines and Transformers accept, for a recipe to be refused before anything is queued."""

from __future__ import annotations

# engine -> the highest sampling temperature; a plugin's engine is not limited here
MAX_TEMPERATURE: dict[str, float] = {"vllm": 2.0}

# Attention of Transformers. A name with a slash is a kernel of the Hub, which Transformers fetches.
ATTENTION = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
