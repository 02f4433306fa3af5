"""The policy's side of a push, the same for every transport: one lane (thread) per replica.

Buckets are gathered and packed once and handed to all lanes; while they travel the next one is
gathered, so at most two buckets are in memory. A replica that is dead or slow fails alone: its lane
gives up at its deadline, and the others go on. Transfer groups live over many pushes; a new one is
made at the first push to a new incarnation, or after a failure.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.protocol import (
    ABORT,
    END,
    Channel,
    EndMeta,
    Frame,
    PushResult,
    WeightSource,
    WeightTransferError,
    agree,
    names_digest,
    pack_bucket,
    send_frame,
)

log = logging.getLogger(__name__)

OpenChannel = Callable[[str, float], Channel]
"""(group prefix, timeout in s) -> the channel whose root is this process."""


def group_prefix(attempt: int, replica: int, incarnation: int, version: int) -> str:
    """The rendezvous prefix of the transfer group that is made for the push of `version`."""
    return f"weights:{attempt}:{replica}:{incarnation}:{version}"


class _Lane:
    """The connection to one replica, and the thread that serves it during a push."""

    def __init__(self, replica: int, incarnation: int) -> None:
        self.replica = replica
        self.incarnation = incarnation
        self.channel: Channel | None = None
        self.error: str | None = None
        self._frame: Frame | None = None
        self._has_frame = threading.Event()
        self.idle = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self, open_channel: OpenChannel, prefix: str, connect_s: float, deadline: float) -> None:
        self.error = None
        self._has_frame.clear()
        self.idle.set()

        def run() -> None:
            try:
                if self.channel is None:
                    self.channel = open_channel(prefix, min(connect_s, deadline - time.monotonic()))
                self._serve(self.channel, deadline)
            # WeightTransferError, DistStoreError and what gloo and NCCL raise are all RuntimeErrors
            except (RuntimeError, OSError) as error:
                self.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                self.close()
            finally:
                self.idle.set()

        self.thread = threading.Thread(target=run, name=f"push-{self.replica}", daemon=True)
        self.thread.start()

    def _serve(self, channel: Channel, deadline: float) -> None:
        while True:
            if not self._has_frame.wait(max(0.0, deadline - time.monotonic())):
                raise WeightTransferError("the policy gathered no further bucket before the deadline")
            self._has_frame.clear()
            frame, self._frame = self._frame, None
            assert frame is not None
            send_frame(channel, frame, deadline - time.monotonic())
            if frame.kind == ABORT:
                raise WeightTransferError("the policy gave up this push")
            if frame.kind == END:
                break
            del frame
            self.idle.set()
        failed = agree(channel, True, deadline)
        if failed:
            raise WeightTransferError(f"{failed} worker(s) of the replica could not load the weights")

    def offer(self, frame: Frame, limit_s: float) -> None:
        """Hand over a frame once the previous one is sent, or mark the lane as failed."""
        if self.error is None and not self.idle.wait(max(0.0, limit_s)):
            self.fail(f"the replica did not take the previous bucket within {limit_s:.0f} s")
        if self.error is None:
            self._frame = frame
            self.idle.clear()
            self._has_frame.set()

    def fail(self, reason: str) -> None:
        if self.error is None:
            self.error = reason

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class BroadcastSender:
    """`Sender` over channels that `open_channel` makes. Used by the gloo and the NCCL transport.

    `timeout_s` bounds a whole push, `connect_s` the making of a transfer group, `stall_s` how long one
    bucket may take before its replica is given up.
    """

    def __init__(
        self,
        open_channel: OpenChannel,
        *,
        attempt: int,
        device: torch.device,
        bucket_bytes: int,
        timeout_s: float,
        connect_s: float = 60.0,
        stall_s: float = 60.0,
    ) -> None:
        self._open = open_channel
        self._attempt = attempt
        self._buffers = BufferPool(device)
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._connect_s = connect_s
        self._stall_s = stall_s
        self._lanes: dict[int, _Lane] = {}

    def push(
        self, version: int, source: WeightSource, replicas: Sequence[int], incarnations: Sequence[int]
    ) -> PushResult:
        began = time.monotonic()
        deadline = began + self._timeout_s
        lanes = [self._lane(r, i) for r, i in zip(replicas, incarnations, strict=True)]
        for lane in lanes:
            prefix = group_prefix(self._attempt, lane.replica, lane.incarnation, version)
            lane.begin(self._open, prefix, self._connect_s, deadline)
        result = PushResult(version)
        try:
            names = self._send_buckets(version, source, lanes, deadline, result)
        except BaseException:
            self._offer_all(lanes, Frame(ABORT, b"", torch.empty(0, dtype=torch.uint8)), deadline)
            raise
        end = msgspec.msgpack.encode(EndMeta(version, len(names), names_digest(names)))
        self._offer_all(lanes, Frame(END, end, torch.empty(0, dtype=torch.uint8)), deadline)
        for lane in lanes:
            assert lane.thread is not None
            if lane.error is None:
                lane.thread.join(max(0.0, deadline - time.monotonic()) + 1.0)
                if lane.thread.is_alive():
                    lane.fail("the replica did not confirm before the deadline")
            if lane.error is not None:
                result.failed[lane.replica] = lane.error
                self._lanes.pop(lane.replica, None)
                log.warning("push of version %d to replica %d failed: %s", version, lane.replica, lane.error)
        result.tensors = len(names)
        result.seconds = time.monotonic() - began
        return result

    def _send_buckets(
        self, version: int, source: WeightSource, lanes: list[_Lane], deadline: float, result: PushResult
    ) -> list[str]:
        names: list[str] = []
        for index, bucket in enumerate(source.buckets(self._bucket_bytes)):
            names.extend(name for name, _ in bucket)
            # When nobody is left the source is still exhausted: gathering is a collective of all ranks.
            if any(lane.error is None for lane in lanes):
                frame = pack_bucket(version, index, bucket, self._buffers)
                result.nbytes += frame.payload.numel()
                self._offer_all(lanes, frame, deadline)
        return names

    def _offer_all(self, lanes: list[_Lane], frame: Frame, deadline: float) -> None:
        limit = min(deadline, time.monotonic() + max(self._stall_s, self._connect_s))
        for lane in lanes:
            lane.offer(frame, limit - time.monotonic())

    def _lane(self, replica: int, incarnation: int) -> _Lane:
        lane = self._lanes.get(replica)
        if lane is None or lane.incarnation != incarnation:
            self.drop(replica)
            lane = self._lanes[replica] = _Lane(replica, incarnation)
        return lane

    def drop(self, replica: int) -> None:
        lane = self._lanes.pop(replica, None)
        if lane is not None:
            lane.close()

    def close(self) -> None:
        for replica in list(self._lanes):
            self.drop(replica)
