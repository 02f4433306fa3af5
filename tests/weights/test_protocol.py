"""Pushes over real gloo groups: what arrives, what is refused, who fails alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.checksum import CHUNK_WORDS, tensor_checksum
from hpc_rl.weights.gloo import GlooTransport
from hpc_rl.weights.protocol import (
    BucketMeta,
    WeightTransferError,
    pack_bucket,
    unpack_bucket,
)
from hpc_rl.weights.receiver import Receiver, check_names
from hpc_rl.weights.sender import BroadcastSender, group_prefix

pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]
CPU = torch.device("cpu")


class ListSource:
    def __init__(self, *buckets: list[tuple[str, torch.Tensor]], pause_s: float = 0.0) -> None:
        self.content = buckets
        self.pause_s = pause_s
        self.exhausted = False

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        for bucket in self.content:
            time.sleep(self.pause_s)
            yield bucket
        self.exhausted = True


def source(**options: float) -> ListSource:
    torch.manual_seed(0)
    return ListSource(
        [("embed", torch.randn(8, 4)), ("odd", torch.randn(3).to(torch.bfloat16))],
        [("layers.0.q", torch.randn(5, 7)), ("layers.0.scalar", torch.tensor(2.5))],
        **options,
    )


NAMES = ("embed", "odd", "layers.0.q", "layers.0.scalar")


class Replica(threading.Thread):
    """The receiving side in a thread; `spoil` damages what arrived before it is checked."""

    def __init__(
        self, bus_file: Path, prefix: str, version: int = 1, expected: tuple[str, ...] = NAMES
    ) -> None:
        super().__init__(daemon=True)
        self.bus_file, self.prefix, self.version, self.expected = bus_file, prefix, version, expected
        self.loaded: dict[str, torch.Tensor] = {}
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            channel = GlooTransport.join(self.bus_file, self.prefix, 0, 1, 10.0)
            receiver = Receiver(channel, self.expected)
            deadline = time.monotonic() + 10
            try:
                for bucket in receiver.receive(self.version, deadline):
                    self.loaded.update(bucket)
            except WeightTransferError:
                channel.close()
                raise
            receiver.finish(True, deadline)
        except WeightTransferError as error:
            self.error = error


def make_sender(bus_file: Path, timeout_s: float = 10.0, **options: float) -> BroadcastSender:
    sender = GlooTransport.sender(bus_file, attempt=1, workers=1, bucket_bytes=1 << 20, timeout_s=timeout_s)
    for name, value in options.items():
        setattr(sender, name, value)
    return sender


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_checksum_sees_every_change(dtype: torch.dtype) -> None:
    tensor = torch.arange(-20, 17).to(dtype)  # 37 elements: no multiple of 8 bytes
    right = tensor_checksum(tensor)
    assert tensor_checksum(tensor.clone()) == right
    for i in (0, 8, 36):
        changed = tensor.clone()
        changed[i] += 1
        assert tensor_checksum(changed) != right
    swapped = tensor.clone()
    swapped[0:8], swapped[8:16] = tensor[8:16], tensor[0:8]
    assert tensor_checksum(swapped) != right
    assert tensor_checksum(tensor[1:]) != right


def test_checksum_of_views_chunks_and_nothing() -> None:
    table = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    assert tensor_checksum(table.T) == tensor_checksum(table.T.contiguous())
    assert tensor_checksum(torch.empty(0)) == 0
    long = torch.zeros(CHUNK_WORDS + 3, dtype=torch.int64)
    long[CHUNK_WORDS + 1] = 5
    assert tensor_checksum(long) == 5 * (2 * (CHUNK_WORDS + 1) + 1)


def test_a_damaged_byte_names_its_tensor() -> None:
    frame = pack_bucket(3, 0, source().content[0], BufferPool(CPU))
    meta = msgspec.msgpack.decode(frame.meta, type=BucketMeta)
    unpack_bucket(meta, frame.payload)
    frame.payload[meta.tensors[1].offset] ^= 1
    with pytest.raises(WeightTransferError, match="checksum of odd is wrong in the push of version 3"):
        unpack_bucket(meta, frame.payload)


def test_names_missing_unknown_twice_and_tied() -> None:
    check_names(["a", "b"], ["a", "b", "lm_head.weight", "x.rotary_emb.inv_freq"], ["lm_head.weight"])
    check_names(["a", "lm_head.weight"], ["a"], ["lm_head.weight"])
    with pytest.raises(WeightTransferError, match="1 tensors of the checkpoint were not sent: b"):
        check_names(["a"], ["a", "b"])
    with pytest.raises(WeightTransferError, match="not in the checkpoint: z"):
        check_names(["a", "z"], ["a"])
    with pytest.raises(WeightTransferError, match="more than once: a"):
        check_names(["a", "a"], ["a"])


@pytest.mark.redis
def test_two_pushes_over_one_group(bus_file: Path) -> None:
    sender = make_sender(bus_file)
    prefix = group_prefix(1, 0, 0, 1)
    replica = Replica(bus_file, prefix)
    result = sender.push(1, source(), [0], [0])
    replica.join(10)
    assert result.failed == {}
    assert replica.error is None
    assert result.tensors == 4
    for bucket in source().content:
        for name, tensor in bucket:
            assert torch.equal(replica.loaded[name], tensor)
            assert replica.loaded[name].dtype == tensor.dtype


@pytest.mark.redis
def test_missing_tensor_and_wrong_version_fail_on_both_sides(bus_file: Path) -> None:
    for replica_number, version, expected, message in [
        (1, 1, (*NAMES, "layers.0.k"), "not sent: layers.0.k"),
        (2, 7, NAMES, "expected version 7, the policy sends 1"),
    ]:
        replica = Replica(bus_file, group_prefix(1, replica_number, 0, 1), version, expected)
        result = make_sender(bus_file).push(1, source(), [replica_number], [0])
        replica.join(10)
        assert message in str(replica.error)
        assert list(result.failed) == [replica_number]


@pytest.mark.redis
def test_absent_replica_fails_alone_and_a_newcomer_joins(bus_file: Path) -> None:
    sender = make_sender(bus_file, 8.0, _connect_s=1.0, _stall_s=1.0)
    alive = Replica(bus_file, group_prefix(1, 10, 0, 1))
    weights = source()
    began = time.monotonic()
    result = sender.push(1, weights, [10, 11], [0, 0])
    assert time.monotonic() - began < 6
    alive.join(10)
    assert alive.error is None
    assert len(alive.loaded) == 4
    assert list(result.failed) == [11]
    assert weights.exhausted
    # the next push: 10 has left, 11 came back as incarnation 1
    newcomer = Replica(bus_file, group_prefix(1, 11, 1, 2), version=2)
    result = sender.push(2, source(), [10, 11], [0, 1])
    newcomer.join(10)
    assert newcomer.error is None
    assert list(result.failed) == [10]
    sender.close()


@pytest.mark.redis
def test_replica_that_dies_in_the_middle(bus_file: Path) -> None:
    prefix = group_prefix(1, 20, 0, 1)

    def die_after_one_bucket() -> None:
        channel = GlooTransport.join(bus_file, prefix, 0, 1, 10.0)
        next(Receiver(channel).receive(1, time.monotonic() + 10))
        channel.close()

    thread = threading.Thread(target=die_after_one_bucket)
    thread.start()
    weights = source(pause_s=0.3)
    result = make_sender(bus_file).push(1, weights, [20], [0])
    thread.join(10)
    assert list(result.failed) == [20]
    assert weights.exhausted
    assert result.seconds < 5


@pytest.mark.redis
def test_a_source_that_fails_tells_the_replica(bus_file: Path) -> None:
    class Broken:
        def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
            yield source().content[0]
            raise OSError("disk gone")

    replica = Replica(bus_file, group_prefix(1, 30, 0, 1))
    with pytest.raises(OSError, match="disk gone"):
        make_sender(bus_file).push(1, Broken(), [30], [0])
    replica.join(10)
    assert "gave up the push of version 1" in str(replica.error)
