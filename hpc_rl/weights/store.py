"""`RedisStore`: a `torch.distributed.Store` over the run's password-protected Redis.

Process groups (the policy ranks' default group and every transfer group) need a key-value store to
find each other. torch's own `TCPStore` listens on a port without any authentication, which a second
user of the node could reach; the bus Redis asks for a password that only the owner can read. So no
rendezvous port exists besides Redis.

All keys of one store live in one Redis hash named by `prefix`: counting keys is `HLEN`, and dropping
a transfer group is one `DEL`. Keep a reference to the store for as long as a process group made from
it lives: the C++ side calls back into this Python object.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import redis
import torch.distributed as dist
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

POLL_FIRST_S = 0.002
POLL_LONGEST_S = 0.05

# As TCPStore::compareSet: an absent key counts as the empty string; the answer is the value that holds
# afterwards, or what the caller expected where the key is absent.
_COMPARE_SET = """
local current = redis.call('HGET', KEYS[1], ARGV[1])
if current == false then
  if ARGV[2] == '' then
    redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
    return ARGV[3]
  end
  return ARGV[2]
end
if current == ARGV[2] then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
  return ARGV[3]
end
return current
"""

_APPEND = """
local current = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], (current or '') .. ARGV[2])
return 1
"""


def _as_bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def read_bus_file(path: Path) -> tuple[str, int, str]:
    """`(host, port, password)` of the bus file. Refuses a file that others can read.

    Raises PermissionError for a loose mode or a foreign owner, ValueError for wrong content.
    """
    status = os.stat(path)
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(
            f"{path} holds the bus password and must belong to you with mode 0600, "
            f"not uid {status.st_uid} mode {stat.S_IMODE(status.st_mode):04o}"
        )
    content = json.loads(path.read_text())
    try:
        return str(content["host"]), int(content["port"]), str(content["password"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold host, port and password; {error} is missing") from error


class RedisStore(dist.Store):  # type: ignore[misc]
    """Key-value store of one process group. `timeout_s` bounds every wait of it.

    Raises `torch.distributed.DistStoreError` naming the missing keys when a wait times out and
    `torch.distributed.DistNetworkError` when Redis itself cannot be reached.
    """

    def __init__(self, client: redis.Redis, prefix: str, timeout_s: float, address: str) -> None:
        super().__init__()
        self._client = client
        self._hash = f"store:{prefix}"
        self._timeout_s = timeout_s
        self._address = address
        self._scripts = (client.register_script(_COMPARE_SET), client.register_script(_APPEND))

    @classmethod
    def from_bus_file(cls, path: Path | str, prefix: str, timeout_s: float) -> RedisStore:
        """Connect with the address and password of the bus file (mode 0600)."""
        host, port, password = read_bus_file(Path(path))
        client = redis.Redis(
            host=host,
            port=port,
            password=password,
            socket_timeout=max(5.0, min(timeout_s, 60.0)),
            socket_connect_timeout=10.0,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries=5),
        )
        store = cls(client, prefix, timeout_s, f"{host}:{port}")
        store._call(client.ping)
        return store

    def _call(self, command: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except redis.RedisError as error:
            raise dist.DistNetworkError(
                f"rendezvous over Redis at {self._address} failed: {error}"
            ) from error

    # The methods below are what c10d's C++ side calls; names and types are those of torch's `Store`.
    def set(self, key: str, value: bytes | str) -> None:
        self._call(self._client.hset, self._hash, key, _as_bytes(value))

    def get(self, key: str) -> bytes:
        """The value of `key`, waiting for it up to the store's timeout."""
        self.wait([key])
        value = self._call(self._client.hget, self._hash, key)
        if value is None:
            raise dist.DistStoreError(f"key {key!r} of {self._hash} was deleted while it was read")
        return bytes(value)

    def add(self, key: str, value: int) -> int:
        return int(self._call(self._client.hincrby, self._hash, key, value))

    def compare_set(self, key: str, expected_value: bytes | str, desired_value: bytes | str) -> bytes:
        arguments = [key, _as_bytes(expected_value), _as_bytes(desired_value)]
        answer = self._call(self._scripts[0], keys=[self._hash], args=arguments)
        return bytes(answer)

    def delete_key(self, key: str) -> bool:
        return bool(self._call(self._client.hdel, self._hash, key))

    def num_keys(self) -> int:
        return int(self._call(self._client.hlen, self._hash))

    def check(self, keys: Sequence[str]) -> bool:
        return not self._missing(keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all `keys` are set. Raises DistStoreError naming the missing ones."""
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + limit_s
        pause_s = POLL_FIRST_S
        while missing := self._missing(keys):
            if time.monotonic() >= deadline:
                raise dist.DistStoreError(
                    f"rendezvous {self._hash} on Redis {self._address}: waited {limit_s:.1f} s for "
                    f"{', '.join(missing)}; the peer that sets it did not come"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, POLL_LONGEST_S)

    def append(self, key: str, value: bytes | str) -> None:
        self._call(self._scripts[1], keys=[self._hash], args=[key, _as_bytes(value)])

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        if keys:
            mapping = {key: _as_bytes(value) for key, value in zip(keys, values, strict=True)}
            self._call(self._client.hset, self._hash, mapping=mapping)

    def has_extended_api(self) -> bool:
        return True

    def list_keys(self) -> list[str]:
        return [key.decode() for key in self._call(self._client.hkeys, self._hash)]

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._timeout_s)

    def clone(self) -> RedisStore:
        return RedisStore(self._client, self._hash.removeprefix("store:"), self._timeout_s, self._address)

    def _missing(self, keys: Sequence[str]) -> list[str]:
        if not keys:
            return []
        values = self._call(self._client.hmget, self._hash, list(keys))
        return [key for key, value in zip(keys, values, strict=True) if value is None]

    def drop(self) -> None:
        """Delete every key of this store: its process group is gone."""
        self._call(self._client.delete, self._hash)
