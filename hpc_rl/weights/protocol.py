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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch

from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.checksum import tensor_checksum

BUCKET, END, ABORT = 1, 2, 3
ALIGN = 16
# Buffers that some checkpoint files hold although they are no parameters; a source need not send them.
NOT_PARAMETERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".embeddings.position_ids")


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


def pack_bucket(
    version: int, index: int, bucket: Sequence[tuple[str, torch.Tensor]], buffers: BufferPool
) -> Frame:
    """Copy a bucket into one uint8 payload out of `buffers` and describe it."""
    metas: list[TensorMeta] = []
    offset = 0
    for name, tensor in bucket:
        nbytes = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), offset, nbytes, tensor_checksum(tensor)))
        offset += (nbytes + ALIGN - 1) // ALIGN * ALIGN
    payload = buffers.take(offset)
    for meta, (_, tensor) in zip(metas, bucket, strict=True):
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        payload[meta.offset : meta.offset + meta.nbytes].copy_(flat)
    return Frame(BUCKET, msgspec.msgpack.encode(BucketMeta(version, index, metas)), payload)


def unpack_bucket(meta: BucketMeta, payload: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Views into `payload`. Raises WeightTransferError for a tensor whose checksum is wrong."""
    bucket = []
    for item in meta.tensors:
        dtype = getattr(torch, item.dtype)
        flat = payload[item.offset : item.offset + item.nbytes]
        tensor = flat.view(dtype).reshape(item.shape)
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
            last = frame.kind != BUCKET
            yield frame
            del frame
        thread.join()
    finally:
        left.set()
        while not arrived.empty():  # whoever waits with a frame may go
            arrived.get_nowait()


def _in_order(channel: Channel, deadline: float) -> Iterator[Frame]:
    kind = BUCKET
    while kind == BUCKET:
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


def check_names(received: Sequence[str], expected: Iterable[str] | None, tied: Iterable[str] = ()) -> None:
    """Compare the names of a push with those of the checkpoint file. `tied` names may be absent.

    Raises WeightTransferError naming up to five missing or unknown tensors, or a repeated one.
    """
    names = set(received)
    if len(names) != len(received):
        twice = sorted({name for name in names if list(received).count(name) > 1})
        raise WeightTransferError(f"sent more than once: {', '.join(twice[:5])}")
    if expected is None:
        return
    wanted, optional = set(expected), set(tied)
    missing = sorted(n for n in wanted - names - optional if not n.endswith(NOT_PARAMETERS))
    unknown = sorted(names - wanted - optional)
    if missing:
        raise WeightTransferError(
            f"{len(missing)} tensors of the checkpoint were not sent: {', '.join(missing[:5])}"
        )
    if unknown:
        raise WeightTransferError(
            f"{len(unknown)} tensors are not in the checkpoint: {', '.join(unknown[:5])}"
        )


class Receiver:
    """The receiving half of a push over one channel; engines load what `receive` yields."""

    def __init__(
        self, channel: Channel, expected: Iterable[str] | None = None, tied: Iterable[str] = ()
    ) -> None:
        self.channel = channel
        self._expected = None if expected is None else frozenset(expected)
        self._tied = frozenset(tied)
        self.tensors = 0
        self.nbytes = 0

    def receive(self, version: int, deadline: float) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield the verified buckets of the push of `version`; `deadline` is on time.monotonic().

        The caller loads each bucket and then calls `finish`. Raises WeightTransferError when the sender
        is late or gone, a checksum or the version is wrong, or the set of names is not complete.
        """
        names: list[str] = []
        self.tensors = self.nbytes = 0
        for frame in frames(self.channel, deadline):
            if frame.kind == ABORT:
                raise WeightTransferError(f"the policy gave up the push of version {version}")
            if frame.kind == END:
                end = msgspec.msgpack.decode(frame.meta, type=EndMeta)
                self._check_end(end, names, version)
                self.tensors = len(names)
                return
            if frame.kind != BUCKET:
                raise WeightTransferError(f"frame of unknown kind {frame.kind}: the streams are out of step")
            meta = msgspec.msgpack.decode(frame.meta, type=BucketMeta)
            if meta.version != version:
                raise WeightTransferError(f"expected version {version}, the policy sends {meta.version}")
            bucket = unpack_bucket(meta, frame.payload)
            names.extend(name for name, _ in bucket)
            self.nbytes += frame.payload.numel()
            del frame  # with its bucket goes the memory, which the next one needs
            yield bucket
            del bucket

    def finish(self, ok: bool, deadline: float) -> None:
        """Tell the others how loading went. Raises WeightTransferError if any worker failed."""
        failed = agree(self.channel, ok, deadline)
        if ok and failed:
            raise WeightTransferError(f"{failed} other worker(s) of this replica could not load the weights")

    def _check_end(self, end: EndMeta, names: list[str], version: int) -> None:
        if end.version != version or end.tensors != len(names) or end.names != names_digest(names):
            raise WeightTransferError(
                f"the push of version {end.version} had {end.tensors} tensors, {len(names)} arrived"
            )
        check_names(names, self._expected, self._tied)
