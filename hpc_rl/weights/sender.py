"""The policy's side of a push, the same for every transport: one lane (thread) per replica.

Without a mirror, buckets are gathered and packed once and handed to all lanes; while they travel the next
one is gathered, so at most two buckets are in memory. With one (`keep`), all buckets are gathered into it and
the push goes on in the background, whatever happens to the weights meanwhile; with `changes` too, replicas
that hold the version before get only what changed since. A replica that is dead or slow fails alone: its lane
gives up at its deadline, and the others go on. Transfer groups live over many pushes; a new one is
made at the first push to a new incarnation, or after a failure.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.mirror import Mirror
from hpc_rl.weights.outgoing import NO_PAYLOAD, Outgoing
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
CONFIRM_S = 5.0  # a lane that has passed its deadline ends within this


def group_prefix(attempt: int, replica: int, incarnation: int, version: int) -> str:
    """The rendezvous prefix of the transfer group that is made for the push of `version`."""
    return f"weights:{attempt}:{replica}:{incarnation}:{version}"


class _Lane:
    """The connection to one replica, and the thread that serves it during a push."""

    def __init__(self, replica: int, incarnation: int) -> None:
        self.replica = replica
        self.incarnation = incarnation
        self.channel: Channel | None = None
        self.version: int | None = None  # what the replica has confirmed over this channel
        self.error: str | None = None
        self.nbytes = 0
        self.repeated = False
        self.thread: threading.Thread | None = None

    def begin(
        self,
        open_channel: OpenChannel,
        prefix: str,
        version: int,
        out: Outgoing,
        *,
        connect_s: float,
        stall_s: float,
        deadline: float,
    ) -> None:
        self.error, self.nbytes, self.repeated = None, 0, False

        def run() -> None:
            try:
                if self.channel is None:
                    self.channel = open_channel(prefix, min(connect_s, deadline - time.monotonic()))
                self._serve(self.channel, out, stall_s, deadline)
                if self.error is None:
                    self.version = version
            # WeightTransferError, DistStoreError and what gloo and NCCL raise are all RuntimeErrors
            except (RuntimeError, OSError) as error:
                self.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                self.close()
                out.gone(self.replica)

        self.thread = threading.Thread(target=run, name=f"push-{self.replica}", daemon=True)
        self.thread.start()

    def _serve(self, channel: Channel, out: Outgoing, stall_s: float, deadline: float) -> None:
        changes = out.base is not None and self.version == out.base
        self.version = None  # until it confirms
        self._send_all(channel, out, changes, stall_s, deadline)
        if changes and agree(channel, True, deadline):
            # What the replica has is not what we think it has.
            self.repeated = True
            self._send_all(channel, out, False, stall_s, deadline)
        failed = agree(channel, True, deadline)
        if failed:
            raise WeightTransferError(f"{failed} worker(s) of the replica could not load the weights")

    def _send_all(
        self, channel: Channel, out: Outgoing, changes: bool, stall_s: float, deadline: float
    ) -> None:
        index = 0
        while True:
            frame = out.frame(index, changes, deadline)
            send_frame(channel, frame, min(stall_s, deadline - time.monotonic()))
            self.nbytes += frame.payload.numel()
            if frame.kind == ABORT:
                raise WeightTransferError("the policy gave up this push")
            if frame.kind == END:
                return
            del frame
            index += 1
            out.sent(self.replica, index)

    def fail(self, reason: str) -> None:
        if self.error is None:
            self.error = reason

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None


@dataclass
class _Push:
    """One push under way."""

    version: int
    lanes: list[_Lane]
    out: Outgoing
    began: float
    deadline: float
    names: list[str] = field(default_factory=list)

    def living(self) -> list[int]:
        return [lane.replica for lane in self.lanes if lane.error is None]


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
        keep: bool = False,
        changes: bool = False,
        connect_s: float = 60.0,
        stall_s: float = 60.0,
    ) -> None:
        self._open = open_channel
        self._attempt = attempt
        self._buffers = BufferPool(device)
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._mirror = Mirror() if keep or changes else None
        self._changes = changes
        self._connect_s = connect_s
        self._stall_s = stall_s
        self._lanes: dict[int, _Lane] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def push(
        self, version: int, source: WeightSource, replicas: Sequence[int], incarnations: Sequence[int]
    ) -> PushResult:
        results: list[PushResult] = []
        self.start(version, source, replicas, incarnations, results.append)
        self.wait()
        return results[0]

    def start(
        self,
        version: int,
        source: WeightSource,
        replicas: Sequence[int],
        incarnations: Sequence[int],
        done: Callable[[PushResult], None],
    ) -> None:
        """See `Sender.start`."""
        self.wait()
        base = self._mirror.version if self._mirror is not None and self._changes else None
        push = self._begin(version, replicas, incarnations, Outgoing(base))
        try:
            if self._mirror is None:
                self._send_buckets(push, source)
                done(self._confirmed(push))
                return
            self._gather(push, source, self._mirror, done)
        except BaseException:
            push.out.finish(Frame(ABORT, b"", NO_PAYLOAD))
            raise

    def wait(self) -> None:
        """Until the push in the background is over (it has deadlines of its own). Raises what ended it."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what ended the push in the background, which no replica is to blame for."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _begin(
        self, version: int, replicas: Sequence[int], incarnations: Sequence[int], out: Outgoing
    ) -> _Push:
        began = time.monotonic()
        lanes = [self._lane(r, i) for r, i in zip(replicas, incarnations, strict=True)]
        push = _Push(version, lanes, out, began, began + self._timeout_s)
        for lane in lanes:
            prefix = group_prefix(self._attempt, lane.replica, lane.incarnation, version)
            lane.begin(
                self._open,
                prefix,
                version,
                out,
                connect_s=self._connect_s,
                stall_s=self._stall_s,
                deadline=push.deadline,
            )
        return push

    # --- bucket by bucket -----------------------------------------------------------------------------
    def _send_buckets(self, push: _Push, source: WeightSource) -> None:
        for index, bucket in enumerate(source.buckets(self._bucket_bytes)):
            push.names.extend(name for name, _ in bucket)
            # When nobody is left the source is still exhausted: gathering is a collective of all ranks.
            if push.living():
                frame = pack_bucket(push.version, index, bucket, self._buffers)
                self._wait_sent(push)
                push.out.publish(frame)
        self._wait_sent(push)
        push.out.finish(_end(push))

    def _wait_sent(self, push: _Push) -> None:
        """Until all lanes have sent what they were given; those that do not are failed."""
        limit = min(push.deadline - time.monotonic(), max(self._stall_s, self._connect_s))
        push.out.wait_sent(push.living(), max(0.0, limit))
        late = push.out.behind(push.living())
        for lane in push.lanes:
            if lane.replica in late:
                lane.fail(f"the replica did not take the previous bucket within {limit:.0f} s")
        push.out.forget()

    # --- through the mirror ---------------------------------------------------------------------------
    def _gather(
        self, push: _Push, source: WeightSource, mirror: Mirror, done: Callable[[PushResult], None]
    ) -> None:
        """Copy all buckets; a thread describes and sends them."""
        gathered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        base, mirror.version = push.out.base, None
        self._thread = threading.Thread(
            target=self._send_mirror, args=(push, mirror, gathered, done), name="push", daemon=True
        )
        self._thread.start()
        count = 0
        try:
            for index, bucket in enumerate(source.buckets(self._bucket_bytes)):
                push.names.extend(name for name, _ in bucket)
                patches = None
                if base is None:
                    mirror.put(index, bucket)
                else:
                    patches = mirror.put_changes(index, bucket)
                gathered.put((index, patches))
                count += 1
            mirror.cut(count)
            mirror.version = push.version
        finally:
            gathered.put(None)

    def _send_mirror(
        self,
        push: _Push,
        mirror: Mirror,
        gathered: queue.SimpleQueue[Any],
        done: Callable[[PushResult], None],
    ) -> None:
        try:
            while (item := gathered.get()) is not None:
                index, patches = item
                whole = mirror.frame(push.version, index)
                change = None
                if patches is not None and push.out.base is not None:
                    change = mirror.change_frame(push.version, push.out.base, index, patches)
                push.out.publish(whole, change)
            if mirror.version != push.version:
                return  # the source failed, and told so where it was called
            push.out.finish(_end(push))
            done(self._confirmed(push))
        except BaseException as error:  # noqa: BLE001 -- raised again by `check` in the policy's own thread
            push.out.finish(Frame(ABORT, b"", NO_PAYLOAD))
            self._error = error

    def _confirmed(self, push: _Push) -> PushResult:
        """Wait for what the replicas say of the push."""
        result = PushResult(push.version, tensors=len(push.names))
        for lane in push.lanes:
            assert lane.thread is not None
            if lane.error is None:
                lane.thread.join(max(0.0, push.deadline - time.monotonic()) + CONFIRM_S)
                if lane.thread.is_alive():
                    lane.fail("the replica did not confirm before the deadline")
            result.nbytes = max(result.nbytes, lane.nbytes)
            if lane.error is not None:
                result.failed[lane.replica] = lane.error
                self._lanes.pop(lane.replica, None)
                log.warning(
                    "push of version %d to replica %d failed: %s", push.version, lane.replica, lane.error
                )
            elif lane.repeated:
                log.warning("replica %d did not hold version %s: it got all", lane.replica, push.out.base)
        result.seconds = time.monotonic() - push.began
        return result

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


def _end(push: _Push) -> Frame:
    end = EndMeta(push.version, len(push.names), names_digest(push.names))
    return Frame(END, msgspec.msgpack.encode(end), NO_PAYLOAD)
