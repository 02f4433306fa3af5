"""Verifiers that turn an answer into a number, and the killable processes they run in. No torch."""
