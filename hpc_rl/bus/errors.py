"""What can go wrong on the bus, as types that a caller can tell apart."""

from __future__ import annotations


class BusError(RuntimeError):
    """Anything the bus reports."""


class BusLost(BusError):
    """Redis could not be reached for the whole reconnect time; the message names host:port."""


class BusTimeout(BusError):
    """Something waited for did not come before its deadline; the message names it."""


class BusDecodeError(BusError):
    """Bytes on the bus are not a message of this version."""


class RedisMissing(BusError):
    """No redis-server binary; the message says where to get one."""


class RedisFailed(BusError):
    """redis-server did not start, or died; the message has the tail of its log."""
