"""Runs Python that nobody has read: a confined process, and calls into it. No torch."""
