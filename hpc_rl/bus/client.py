"""The bus client: send and receive typed messages, heartbeats and small values.

A stream entry has one field per message: its name is `<sender>:<number>`, its value the msgpack of one
`Message`. Messages sent together share entries.
After a lost connection the sender sends again what was not acknowledged; the receiver drops numbers
that it has seen from that sender, so a message arrives once for as long as the receiver lives.
Nothing received is ever unpickled.
"""

from __future__ import annotations

import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hpc_rl.bus.errors import BusDecodeError, BusLost, BusTimeout
from hpc_rl.bus.messages import Message
from hpc_rl.run.paths import check_private

RECONNECT_S = 30.0
START = "0-0"
# One blocking read at most; longer waits are made of several, so that a dead peer is noticed.
_BLOCK_S = 5.0
_SOCKET_TIMEOUT_S = 15.0
# Messages that are sent together share stream entries, up to this much.
_ENTRY_MESSAGES = 64
_ENTRY_BYTES = 1 << 20
_HEARTBEATS = "heartbeats"
_LOST = (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError)

T = TypeVar("T")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


def decode_message(data: bytes) -> Message:
    """One message from its bytes. Raises BusDecodeError."""
    try:
        return _decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BusDecodeError(
            f"{len(data)} bytes on the bus are no message of this version of hpc-rl: {error}"
        ) from error


def _bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def _pack(stream: str, messages: Sequence[tuple[bytes, bytes]]) -> tuple[list[bytes], int]:
    """XADD commands for numbered messages, several in one entry, and how many commands.

    Written by hand as one buffer: a pipeline of redis-py makes two system calls of each large entry.
    """
    start = b"$4\r\nXADD\r\n" + _bulk(stream.encode()) + b"$1\r\n*\r\n"
    commands: list[bytes] = []
    entry: list[bytes] = []
    nbytes = count = 0
    for number, data in messages:
        entry += (_bulk(number), b"$%d\r\n" % len(data), data, b"\r\n")
        nbytes += len(data)
        if nbytes >= _ENTRY_BYTES or len(entry) == 4 * _ENTRY_MESSAGES or number is messages[-1][0]:
            commands += (b"*%d\r\n" % (3 + len(entry) // 2), start, *entry)
            count += 1
            entry, nbytes = [], 0
    return commands, count


def _add(client: Any, command: bytes, answers: int) -> None:
    """Send packed commands and read their answers. Raises what redis-py raises."""
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        connection.send_packed_command([command])
        for _ in range(answers):
            connection.read_response()
    except BaseException:
        connection.disconnect()  # answers may be on their way that nobody would read
        raise
    finally:
        pool.release(connection)


def _read(client: redis.Redis, stream: str, cursor: str, count: int, block: int | None) -> Any:
    return client.xread({stream: cursor}, count=count, block=block)


class Bus:
    """A connection to the run's Redis. Threads may share it; a forked child must connect anew."""

    def __init__(
        self,
        bus_file: Path,
        *,
        reconnect_s: float = RECONNECT_S,
        socket_timeout_s: float = _SOCKET_TIMEOUT_S,
    ) -> None:
        self._file = bus_file
        self._reconnect_s = reconnect_s
        self._socket_timeout_s = socket_timeout_s
        self._sender = secrets.token_hex(4).encode()
        self._numbers = itertools.count(1)
        self._send_lock = threading.Lock()
        self._seen: dict[str, dict[bytes, int]] = {}
        self._address = "?"
        self._redis = self._open()

    @classmethod
    def connect(
        cls,
        bus_file: Path,
        deadline_s: float,
        *,
        reconnect_s: float = RECONNECT_S,
        socket_timeout_s: float = _SOCKET_TIMEOUT_S,
    ) -> Bus:
        """Wait until the bus file is there and Redis answers, at most `deadline_s`.

        Later, a Redis that does not answer for `socket_timeout_s` counts as lost, and a lost one is
        tried again for `reconnect_s`.

        Raises BusTimeout naming the file, BusLost naming host:port, RunError if others can read the file.
        """
        deadline = time.monotonic() + deadline_s
        while not bus_file.exists():
            if time.monotonic() > deadline:
                raise BusTimeout(f"waited {deadline_s:.0f} s for the supervisor to write {bus_file}")
            time.sleep(0.05)
        left = max(0.0, deadline - time.monotonic())
        bus = cls(bus_file, reconnect_s=left, socket_timeout_s=socket_timeout_s)
        bus._call(lambda client: client.ping())
        bus._reconnect_s = reconnect_s
        return bus

    @property
    def address(self) -> str:
        """host:port, for messages to people."""
        return self._address

    def close(self) -> None:
        self._redis.close()

    # --- streams -----------------------------------------------------------------------------------
    def send(self, stream: str, *messages: Message) -> None:
        """Append `messages` to `stream` in order, as one batch. Raises BusLost."""
        if not messages:
            return
        with self._send_lock:
            numbered = [(b"%b:%d" % (self._sender, next(self._numbers)), _encode(m)) for m in messages]
            commands, count = _pack(stream, numbered)
            buffer = b"".join(commands)
            self._call(lambda client: _add(client, buffer, count))

    def send_all(self, messages: Sequence[tuple[str, Message]]) -> None:
        """Append each message to its stream, in this order, in one exchange with Redis. Raises BusLost."""
        if not messages:
            return
        with self._send_lock:
            commands: list[bytes] = []
            for stream, message in messages:
                number = b"%b:%d" % (self._sender, next(self._numbers))
                commands += _pack(stream, [(number, _encode(message))])[0]
            buffer = b"".join(commands)
            self._call(lambda client: _add(client, buffer, len(messages)))

    def receive(
        self, stream: str, *, cursor: str, count: int = 64, block_s: float
    ) -> tuple[list[Message], str]:
        """Messages after `cursor` and the new cursor; waits at most `block_s` for the first.

        `count` bounds the stream entries read, which hold one message each unless more were sent together.

        Raises BusLost, and BusDecodeError for an entry that is not a message.
        """
        deadline = time.monotonic() + block_s
        while True:
            left = min(_BLOCK_S, deadline - time.monotonic())
            block = max(1, round(left * 1000)) if left > 0 else None
            answer = self._call(partial(_read, stream=stream, cursor=cursor, count=count, block=block))
            if answer:
                entries = answer[0][1]
                messages = self._fresh(stream, entries)
                cursor = entries[-1][0].decode()
                if messages:
                    return messages, cursor
            elif time.monotonic() >= deadline:
                return [], cursor

    def _fresh(self, stream: str, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Message]:
        seen = self._seen.setdefault(stream, {})
        messages = []
        for _, fields in entries:
            for name, data in fields.items():
                sender, _, number = name.partition(b":")
                if int(number) > seen.get(sender, 0):
                    seen[sender] = int(number)
                    messages.append(decode_message(data))
        return messages

    def trim(self, stream: str, cursor: str) -> None:
        """Forget the entries of `stream` up to and including `cursor`."""
        milliseconds, _, number = cursor.partition("-")
        keep_from = f"{milliseconds}-{int(number) + 1}"
        self._call(lambda client: client.xtrim(stream, minid=keep_from, approximate=False))

    def end_of(self, stream: str) -> str:
        """The cursor behind the last entry of `stream` now."""
        answer: Any = self._call(lambda client: client.xrevrange(stream, count=1))
        return answer[0][0].decode() if answer else START

    # --- heartbeats --------------------------------------------------------------------------------
    def heartbeat(self, role: str, index: int, payload: dict[str, Any]) -> None:
        """Overwrite the heartbeat of one process."""
        data = _encode(payload)
        self._call(lambda client: client.hset(_HEARTBEATS, f"{role}:{index}", data))

    def heartbeats(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The latest heartbeat of each process, by (role, index)."""
        answer: Any = self._call(lambda client: client.hgetall(_HEARTBEATS))
        beats = {}
        for name, data in answer.items():
            role, _, index = name.decode().rpartition(":")
            beats[role, int(index)] = msgspec.msgpack.decode(data)
        return beats

    def forget_heartbeat(self, role: str, index: int) -> None:
        """Drop the heartbeat of a process that ended, so that nobody judges it as hung."""
        self._call(lambda client: client.hdel(_HEARTBEATS, f"{role}:{index}"))

    # --- small values ------------------------------------------------------------------------------
    def set_value(self, key: str, value: bytes) -> None:
        self._call(lambda client: client.set(f"value:{key}", value))

    def get_value(self, key: str) -> bytes | None:
        answer: Any = self._call(lambda client: client.get(f"value:{key}"))
        return answer

    def wait_value(self, key: str, deadline_s: float, waiting_for: str) -> bytes:
        """The value of `key` once somebody has set it. Raises BusTimeout naming `waiting_for`."""
        deadline = time.monotonic() + deadline_s
        pause = 0.005
        while (value := self.get_value(key)) is None:
            if time.monotonic() > deadline:
                raise BusTimeout(f"waited {deadline_s:.0f} s for {waiting_for} (value {key!r} on the bus)")
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return value

    # --- connection --------------------------------------------------------------------------------
    def _open(self) -> redis.Redis:
        check_private(self._file)
        settings = json.loads(self._file.read_text())
        self._address = f"{settings['host']}:{settings['port']}"
        return redis.Redis(
            host=settings["host"],
            port=settings["port"],
            password=settings["password"],
            socket_timeout=self._socket_timeout_s,
            socket_connect_timeout=5.0,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )

    def _call(self, action: Callable[[redis.Redis], T]) -> T:
        """Run `action`, reconnecting for a bounded time. The bus file is read anew: the port may change."""
        lost_since: float | None = None
        pause = 0.05
        while True:
            try:
                return action(self._redis)
            except _LOST as error:
                now = time.monotonic()
                lost_since = now if lost_since is None else lost_since
                if now - lost_since >= self._reconnect_s:
                    raise BusLost(
                        f"Redis at {self._address} was out of reach for {self._reconnect_s:.0f} s: {error}"
                    ) from error
                time.sleep(min(pause, max(0.0, lost_since + self._reconnect_s - now)))
                pause = min(2 * pause, 1.0)
                self._reopen()

    def _reopen(self) -> None:
        try:
            fresh = self._open()
        except FileNotFoundError:
            return  # the attempt is over or the file is being replaced; the deadline decides
        # Only idle connections: another thread may be blocked in one, and would see a closed file.
        self._redis.connection_pool.disconnect(inuse_connections=False)
        self._redis = fresh


class Inbox:
    """One reader's place in its stream: keeps the cursor and trims what was read."""

    def __init__(self, bus: Bus, stream: str, *, cursor: str = START) -> None:
        self._bus = bus
        self._stream = stream
        self._cursor = cursor

    @property
    def stream(self) -> str:
        return self._stream

    def poll(self, block_s: float, count: int = 64) -> list[Message]:
        """The next messages, of at most `count` entries; waits at most `block_s` for the first."""
        messages, cursor = self._bus.receive(self._stream, cursor=self._cursor, count=count, block_s=block_s)
        if cursor != self._cursor:
            self._cursor = cursor
            self._bus.trim(self._stream, cursor)
        return messages


def encode_messages(messages: Iterable[Message]) -> list[bytes]:
    """The bytes of each message, as `send` writes them (snapshots of queues)."""
    return [_encode(message) for message in messages]
