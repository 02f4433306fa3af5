"""Environments behind one vectorised protocol: tools for language models, robots. No torch."""
