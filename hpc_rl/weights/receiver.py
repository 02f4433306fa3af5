"""The receiving half of a push: names, versions, checksums; bucket by bucket, or into a `Mirror`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import torch

from hpc_rl.weights.mirror import Mirror
from hpc_rl.weights.protocol import (
    ABORT,
    BUCKET,
    DELTA,
    END,
    BucketMeta,
    Channel,
    DeltaMeta,
    EndMeta,
    Frame,
    WeightTransferError,
    agree,
    frames,
    names_digest,
    unpack_bucket,
)

LOG = logging.getLogger(__name__)
# Buffers that some checkpoint files hold although they are no parameters; a source need not send them.
NOT_PARAMETERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".embeddings.position_ids")


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
            if self._ended(frame, names, version):
                return
            if frame.kind != BUCKET:
                raise WeightTransferError(
                    f"frame of unexpected kind {frame.kind}: the streams are out of step"
                )
            meta = msgspec.msgpack.decode(frame.meta, type=BucketMeta)
            self._check_version(meta.version, version)
            bucket = unpack_bucket(meta, frame.payload)
            names.extend(name for name, _ in bucket)
            self.nbytes += frame.payload.numel()
            del frame  # with its bucket goes the memory, which the next one needs
            yield bucket
            del bucket

    def fetch(self, version: int, deadline: float, mirror: Mirror) -> None:
        """Bring `mirror` to `version`, all of it verified; the caller loads from it and calls `finish`.

        A push may hold only what changed since the version in `mirror`. Where that is not what the policy
        thinks it is (another version, a damaged copy), the policy is told and sends everything. Raises
        WeightTransferError; the mirror is then of no version.
        """
        base, mirror.version = mirror.version, None
        self.tensors = self.nbytes = 0
        changed, stale = self._fill(version, deadline, mirror, base)
        if changed and agree(self.channel, not stale, deadline):
            LOG.warning("version %d comes again, whole: %s", version, stale or "another worker asked for it")
            self._fill(version, deadline, mirror, None)
        mirror.version = version

    def _fill(self, version: int, deadline: float, mirror: Mirror, base: int | None) -> tuple[bool, str]:
        """All frames of a push, up to its END: `(whether it was changes, why they were of no use)`."""
        names: list[str] = []
        changed, stale, count = False, "", 0
        for frame in frames(self.channel, deadline):
            if self._ended(frame, names, version):
                break
            self.nbytes += frame.payload.numel()
            if frame.kind == DELTA:
                change = msgspec.msgpack.decode(frame.meta, type=DeltaMeta)
                self._check_version(change.version, version)
                names.extend(item.name for item in change.tensors)
                changed, count = True, change.index + 1
                stale = stale or self._change(mirror, base, change, frame.payload.cpu())
            elif frame.kind == BUCKET:
                meta = msgspec.msgpack.decode(frame.meta, type=BucketMeta)
                self._check_version(meta.version, version)
                names.extend(mirror.hold(meta, frame.payload.cpu()))
                count = meta.index + 1
            else:
                raise WeightTransferError(f"frame of unknown kind {frame.kind}: the streams are out of step")
            del frame
        mirror.cut(count)
        return changed, stale

    @staticmethod
    def _change(mirror: Mirror, base: int | None, meta: DeltaMeta, payload: torch.Tensor) -> str:
        """Why these changes are of no use here; empty where they are made."""
        if base != meta.base:
            return f"the changes are those since version {meta.base}, the weights here are of version {base}"
        try:
            mirror.change(meta, payload)
        except WeightTransferError as error:
            return str(error)
        return ""

    def finish(self, ok: bool, deadline: float) -> None:
        """Tell the others how loading went. Raises WeightTransferError if any worker failed."""
        failed = agree(self.channel, ok, deadline)
        if ok and failed:
            raise WeightTransferError(f"{failed} other worker(s) of this replica could not load the weights")

    def _ended(self, frame: Frame, names: list[str], version: int) -> bool:
        if frame.kind == ABORT:
            raise WeightTransferError(f"the policy gave up the push of version {version}")
        if frame.kind != END:
            return False
        end = msgspec.msgpack.decode(frame.meta, type=EndMeta)
        if end.version != version or end.tensors != len(names) or end.names != names_digest(names):
            raise WeightTransferError(
                f"the push of version {end.version} had {end.tensors} tensors, {len(names)} arrived"
            )
        check_names(names, self._expected, self._tied)
        self.tensors = len(names)
        return True

    @staticmethod
    def _check_version(sent: int, expected: int) -> None:
        if sent != expected:
            raise WeightTransferError(f"expected version {expected}, the policy sends {sent}")
