"""Fixtures of this room; the Redis and the tiny models are those of `tests/weights`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))

from private_redis import bus_file

__all__ = ["bus_file"]
