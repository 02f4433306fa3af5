"""Rollout engines: one module each, and `config.py` with their options (no torch)."""
