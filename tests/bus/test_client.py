"""The bus client against a real Redis: order, exactly once over a lost connection, typed errors."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hpc_rl.bus.client import Bus, Inbox, decode_message
from hpc_rl.bus.errors import BusDecodeError, BusLost, BusTimeout
from hpc_rl.bus.messages import ReceiveWeights, StepExited, inbox
from hpc_rl.bus.server import RedisServer
from hpc_rl.run.paths import RunError

pytestmark = pytest.mark.redis


def versions(messages: list) -> list[int]:
    return [message.version for message in messages]


def test_messages_arrive_in_order_and_are_trimmed(bus: Bus) -> None:
    box = Inbox(bus, inbox("rollout", 3))
    bus.send(box.stream, *(ReceiveWeights(version) for version in range(100)))
    bus.send(box.stream, ReceiveWeights(100))
    received = box.poll(1.0) + box.poll(1.0)
    assert versions(received) == list(range(101))
    assert bus._redis.xlen(box.stream) == 0
    assert box.poll(0.01) == []


def test_poll_wakes_as_soon_as_a_message_comes(bus: Bus) -> None:
    box = Inbox(bus, inbox("controller"))
    timer = threading.Timer(0.2, bus.send, (box.stream, ReceiveWeights(1)))
    timer.start()
    start = time.monotonic()
    assert versions(box.poll(10.0)) == [1]
    assert time.monotonic() - start < 2.0
    timer.join()


def test_a_new_incarnation_starts_at_the_end(bus: Bus) -> None:
    stream = inbox("rollout", 0)
    bus.send(stream, ReceiveWeights(1))
    box = Inbox(bus, stream, cursor=bus.end_of(stream))
    bus.send(stream, ReceiveWeights(2))
    assert versions(box.poll(1.0)) == [2]


def test_messages_sent_again_are_dropped(bus: Bus) -> None:
    """What a sender does after a lost answer: the same numbered entry once more."""
    box = Inbox(bus, inbox("policy", 0))
    bus.send(box.stream, ReceiveWeights(1))
    entry = bus._redis.xrange(box.stream)[0][1]
    bus._redis.xadd(box.stream, entry)
    bus.send(box.stream, ReceiveWeights(2))
    assert versions(box.poll(1.0)) == [1, 2]


def test_killed_redis_comes_back_with_everything_acknowledged(
    bus: Bus, server: RedisServer, tmp_path: Path
) -> None:
    box = Inbox(bus, inbox("controller"))
    bus.send(box.stream, *(ReceiveWeights(version) for version in range(50)))
    bus.heartbeat("policy", 1, {"phase": "step"})
    bus.set_value("key", b"value")
    server.kill()
    sent = threading.Thread(target=bus.send, args=(box.stream, ReceiveWeights(50)))
    sent.start()  # waits for the restart
    time.sleep(0.3)
    server.restart()
    server.write_bus_file(tmp_path / "bus.json")
    sent.join(10)
    assert versions(box.poll(5.0)) == list(range(51))
    assert bus.heartbeats() == {("policy", 1): {"phase": "step"}}
    assert bus.get_value("key") == b"value"


def test_a_port_that_changes_at_the_restart_is_followed(
    bus: Bus, server: RedisServer, tmp_path: Path
) -> None:
    server.kill()
    server.port = None
    server.start()
    server.write_bus_file(tmp_path / "bus.json")
    bus.send(inbox("controller"), ReceiveWeights(1))
    assert bus.address.endswith(f":{server.port}")


def test_bus_lost_names_the_address(server: RedisServer, bus_file: Path) -> None:
    bus = Bus.connect(bus_file, 5.0, reconnect_s=0.5)
    server.kill()
    start = time.monotonic()
    with pytest.raises(BusLost, match=rf"127\.0\.0\.1:{server.port}"):
        bus.send(inbox("controller"), ReceiveWeights(1))
    assert 0.4 < time.monotonic() - start < 3.0


def test_waits_name_who_was_waited_for(bus: Bus, tmp_path: Path) -> None:
    with pytest.raises(BusTimeout, match="the group of replica 3"):
        bus.wait_value("transfer", 0.1, "the group of replica 3")
    with pytest.raises(BusTimeout, match=r"supervisor to write .*absent\.json"):
        Bus.connect(tmp_path / "absent.json", 0.1)


def test_pickles_and_foreign_bytes_are_typed_errors(bus: Bus) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, ("/nonexistent/evil",)

    for data in (pickle.dumps(Evil()), b"", b"\x81\xa4type\xa4What", b"\xff" * 20):
        with pytest.raises(BusDecodeError):
            decode_message(data)
    bus._redis.xadd(inbox("policy", 0), {b"x:1": pickle.dumps(Evil())})
    with pytest.raises(BusDecodeError):
        Inbox(bus, inbox("policy", 0)).poll(1.0)


def test_wrong_types_are_refused() -> None:
    import msgspec

    good = msgspec.msgpack.encode(StepExited("policy", 0, 1, 137, 1.0))
    assert decode_message(good) == StepExited("policy", 0, 1, 137, 1.0)
    fields = msgspec.msgpack.decode(good)
    with pytest.raises(BusDecodeError, match="code"):
        decode_message(msgspec.msgpack.encode({**fields, "code": "zero"}))
    with pytest.raises(BusDecodeError):
        decode_message(msgspec.msgpack.encode({**fields, "more": 1}))


def test_without_the_password_nothing_is_served(server: RedisServer) -> None:
    for password in (None, "guess"):
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=server.port, password=password, protocol=2, retry=Retry(NoBackoff(), 0)).ping()


def test_a_bus_file_open_to_others_is_refused(bus_file: Path) -> None:
    bus_file.chmod(0o644)
    with pytest.raises(RunError, match="0600"):
        Bus.connect(bus_file, 1.0)
