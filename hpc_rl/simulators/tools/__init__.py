"""The environment `tools`: functions that a language model may call between its turns. No torch."""
