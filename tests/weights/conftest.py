"""Fixtures of this room."""

from private_redis import bus_file

__all__ = ["bus_file"]
