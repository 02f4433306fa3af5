"""The one protocol of weight movement: source, sender, and the format of a push on the wire.

A push of version v moves every tensor of the checkpoint file from policy rank 0 to all workers of a
replica through a *channel* (a process group with policy rank 0 as root), as a series of frames:

    header   int64[3]   kind (BUCKET, END or ABORT), bytes of the meta part, bytes of the payload
    meta     uint8[n]   msgpack of `BucketMeta` or `EndMeta`
    payload  uint8[m]   the bucket's tensors, each at an offset divisible by 16

After END all members add up a status word: the sender learns whether every worker loaded everything,
and the workers of one replica learn of each other's failures. A bucket holds whole decoder layers,
because a part of a fused module (q without k and v) is silently not applied by vLLM. Every tensor has a
checksum, and END names how many tensors there were and the digest of their names; the receiver also
knows the names that the checkpoint it started from holds. Any difference is a `WeightTransferError`.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.checksum import tensor_checksum
from hpc_rl.weights.delta import Patch

BUCKET, END, ABORT, DELTA = 1, 2, 3, 4
ALIGN = 16


class WeightTransferError(RuntimeError):
    """A push failed: a peer did not come in time, or what arrived is not what was sent."""


class WeightSource(Protocol):
    """The policy's weights in checkpoint-file form. A collective: all policy ranks iterate in lockstep."""

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield full tensors, `(name in the safetensors file, tensor)`, whole layers together.

        A bucket is at most `max_bytes` unless one layer is larger. On ranks other than 0 the tensors
        may be anything; those ranks only take part in the gathering.
        """
        ...


@dataclass
class PushResult:
    """What became of a push: `failed` maps a replica to the reason why it did not get the weights."""

    version: int
    failed: dict[int, str] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class Sender(Protocol):
    """Policy rank 0's side of a transport. Other ranks call `drain` on the same source."""

    def push(
        self, version: int, source: WeightSource, replicas: Sequence[int], incarnations: Sequence[int]
    ) -> PushResult:
        """Send `source` to `replicas`, joining those whose incarnation is new. Never raises for a
        replica's failure; the source is always exhausted, so that the other ranks are not left alone."""
        ...

    def start(
        self,
        version: int,
        source: WeightSource,
        replicas: Sequence[int],
        incarnations: Sequence[int],
        done: Callable[[PushResult], None],
    ) -> None:
        """`push` that may go on after it returned: the source is exhausted by then, and its weights may
        change. `done` is called once, from any thread. Waits for the push before it."""
        ...

    def check(self) -> None:
        """Raise what ended a push in the background without a result."""
        ...

    def wait(self) -> None:
        """Until no push is under way (each has a deadline of its own); then `check`."""
        ...

    def drop(self, replica: int) -> None:
        """Forget the transfer group of `replica`."""
        ...

    def close(self) -> None: ...


def drain(source: WeightSource, max_bytes: int) -> None:
    """What a policy rank other than 0 does during a push."""
    for _ in source.buckets(max_bytes):
        pass


class Channel(Protocol):
    """A process group of one sender (root) and the workers of one replica. `buffers` are for what arrives;
    they stay from push to push."""

    device: torch.device
    buffers: BufferPool

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> None:
        """Root's `tensor` to all. Raises WeightTransferError when the deadline passes."""
        ...

    def sum(self, tensor: torch.Tensor, timeout_s: float) -> None:
        """In-place all-reduce (sum)."""
        ...

    def close(self) -> None: ...


Bucket = Sequence[tuple[str, torch.Tensor]]


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: int


class BucketMeta(msgspec.Struct, frozen=True):
    version: int
    index: int
    tensors: list[TensorMeta]


class DeltaMeta(msgspec.Struct, frozen=True):
    """What changed in a bucket since version `base`: `patches[i]` makes `tensors[i]`, whose checksum is that
    of the whole tensor afterwards. The patches follow each other in the payload."""

    version: int
    base: int
    index: int
    tensors: list[TensorMeta]
    patches: list[Patch]


class EndMeta(msgspec.Struct, frozen=True):
    version: int
    tensors: int
    names: str


@dataclass
class Frame:
    kind: int
    meta: bytes
    payload: torch.Tensor  # uint8


def names_digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def layout(bucket: Bucket) -> tuple[list[TensorMeta], int]:
    """Where each tensor of a bucket lies in its payload, without checksums, and the payload's bytes."""
    metas: list[TensorMeta] = []
    offset = 0
    for name, tensor in bucket:
        nbytes = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), offset, nbytes, 0))
        offset += (nbytes + ALIGN - 1) // ALIGN * ALIGN
    return metas, offset


def pack_bucket(version: int, index: int, bucket: Bucket, buffers: BufferPool) -> Frame:
    """Copy a bucket into one uint8 payload out of `buffers` and describe it."""
    metas, nbytes = layout(bucket)
    payload = buffers.take(nbytes)
    checked = []
    for meta, (_, tensor) in zip(metas, bucket, strict=True):
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        checked.append(msgspec.structs.replace(meta, checksum=tensor_checksum(tensor)))
        payload[meta.offset : meta.offset + meta.nbytes].copy_(flat)
    return bucket_frame(version, index, checked, payload)


def bucket_frame(version: int, index: int, metas: list[TensorMeta], payload: torch.Tensor) -> Frame:
    return Frame(BUCKET, msgspec.msgpack.encode(BucketMeta(version, index, metas)), payload)


def delta_frame(
    version: int,
    base: int,
    index: int,
    metas: list[TensorMeta],
    patches: list[Patch],
    payload: np.ndarray[Any, Any],
) -> Frame:
    meta = msgspec.msgpack.encode(DeltaMeta(version, base, index, metas, patches))
    return Frame(DELTA, meta, torch.from_numpy(payload))


def view_of(meta: TensorMeta, payload: torch.Tensor) -> torch.Tensor:
    """The tensor of `meta` in its bucket's payload."""
    flat = payload[meta.offset : meta.offset + meta.nbytes]
    return flat.view(getattr(torch, meta.dtype)).reshape(meta.shape)


def unpack_bucket(meta: BucketMeta, payload: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Views into `payload`. Raises WeightTransferError for a tensor whose checksum is wrong."""
    bucket = []
    for item in meta.tensors:
        tensor = view_of(item, payload)
        if tensor_checksum(tensor) != item.checksum:
            raise WeightTransferError(
                f"checksum of {item.name} is wrong in the push of version {meta.version}"
            )
        bucket.append((item.name, tensor))
    return bucket


def send_frame(channel: Channel, frame: Frame, timeout_s: float) -> None:
    sizes = [frame.kind, len(frame.meta), frame.payload.numel()]
    channel.broadcast(torch.tensor(sizes, dtype=torch.int64, device=channel.device), timeout_s)
    if frame.meta:
        meta = torch.frombuffer(bytearray(frame.meta), dtype=torch.uint8).to(channel.device)
        channel.broadcast(meta, timeout_s)
    if frame.payload.numel():
        channel.broadcast(frame.payload, timeout_s)


def receive_frame(channel: Channel, deadline: float) -> Frame:
    header = torch.zeros(3, dtype=torch.int64, device=channel.device)
    channel.broadcast(header, _left(deadline))
    kind, meta_bytes, payload_bytes = header.tolist()
    meta = torch.empty(meta_bytes, dtype=torch.uint8, device=channel.device)
    if meta_bytes:
        channel.broadcast(meta, _left(deadline))
    payload = channel.buffers.take(payload_bytes)
    if payload_bytes:
        channel.broadcast(payload, _left(deadline))
    return Frame(kind, meta.cpu().numpy().tobytes(), payload)


def frames(channel: Channel, deadline: float) -> Iterator[Frame]:
    """The frames of a push up to END or ABORT. On CPUs the next ones arrive while one is used: at most
    three buckets are in memory. Raises WeightTransferError."""
    if channel.device.type != "cpu":
        yield from _in_order(channel, deadline)
        return
    arrived: queue.Queue[Frame | BaseException] = queue.Queue(maxsize=1)
    left = threading.Event()

    def receive() -> None:
        try:
            for frame in _in_order(channel, deadline):
                arrived.put(frame)
                del frame
                if left.is_set():
                    return
        except (RuntimeError, OSError) as error:  # what gloo and the rendezvous raise, and our own
            arrived.put(error)

    thread = threading.Thread(target=receive, name="receive-weights", daemon=True)
    thread.start()
    try:
        last = False
        while not last:
            frame = arrived.get()
            if isinstance(frame, BaseException):
                raise frame
            last = frame.kind in (END, ABORT)
            yield frame
            del frame
        thread.join()
    finally:
        left.set()
        while not arrived.empty():  # whoever waits with a frame may go
            arrived.get_nowait()


def _in_order(channel: Channel, deadline: float) -> Iterator[Frame]:
    kind = BUCKET
    while kind not in (END, ABORT):
        frame = receive_frame(channel, deadline)
        kind = frame.kind
        yield frame
        del frame


def agree(channel: Channel, ok: bool, deadline: float) -> int:
    """Every member says whether it is content; the number of members that are not."""
    status = torch.tensor([0 if ok else 1], dtype=torch.int64, device=channel.device)
    channel.sum(status, _left(deadline))
    return int(status.item())


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise WeightTransferError("the deadline of the push passed")
    return left
