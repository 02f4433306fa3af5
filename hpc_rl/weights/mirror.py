"""The tensors of one version in host memory, in the buckets in which they travel.

The policy's rank 0 keeps one of what it sent last, each worker of a replica one of what it received last:
weights can then leave while the next step runs, arrive while generation goes on, and be sent as what changed.
It costs one copy of the weights in the dtype that travels, in each of these processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpc_rl.weights import delta
from hpc_rl.weights.checksum import tensor_checksum
from hpc_rl.weights.protocol import (
    Bucket,
    BucketMeta,
    DeltaMeta,
    Frame,
    TensorMeta,
    WeightTransferError,
    bucket_frame,
    delta_frame,
    layout,
    unpack_bucket,
    view_of,
)


@dataclass
class _Held:
    metas: list[TensorMeta]
    payload: torch.Tensor  # uint8

    def bytes_of(self, meta: TensorMeta) -> torch.Tensor:
        return self.payload[meta.offset : meta.offset + meta.nbytes]


class Mirror:
    """`version` is that of all tensors in it, or None where they are of none (yet)."""

    def __init__(self) -> None:
        self.version: int | None = None
        self._buckets: list[_Held] = []

    @property
    def nbytes(self) -> int:
        return sum(held.payload.numel() for held in self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)

    def buckets(self) -> Iterator[Bucket]:
        """Views; they stay right until the next version is put in."""
        for held in self._buckets:
            yield [(meta.name, view_of(meta, held.payload)) for meta in held.metas]

    # --- the policy's side ----------------------------------------------------------------------------
    def put(self, index: int, bucket: Bucket) -> None:
        """Copy in bucket `index` of the version being gathered."""
        metas, nbytes = layout(bucket)
        held = self._room(index, metas, nbytes)
        for meta, (_, tensor) in zip(metas, bucket, strict=True):
            view_of(meta, held.payload).copy_(tensor.detach())

    def put_changes(self, index: int, bucket: Bucket) -> list[tuple[delta.Patch, list[np.ndarray]]] | None:
        """`put`, and what it changed tensor by tensor; None where the bucket held other tensors before."""
        metas, _ = layout(bucket)
        if index >= len(self._buckets) or not _alike(self._buckets[index].metas, metas):
            self.put(index, bucket)
            return None
        held = self._buckets[index]
        patches = []
        for meta, (_, tensor) in zip(metas, bucket, strict=True):
            old = held.bytes_of(meta)
            new = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            patch, parts = delta.encode(old, new, tensor.element_size())
            if patch.form == delta.WHOLE:
                parts = [old.numpy()]  # which is about to be the new one; `new` may be the model's own memory
            patches.append((patch, parts))
            old.copy_(new)
        return patches

    def cut(self, count: int) -> None:
        """Forget buckets from `count` on: the version gathered has no more."""
        del self._buckets[count:]

    def frame(self, version: int, index: int) -> Frame:
        """Bucket `index` whole, with its checksums. The payload is the mirror's own memory."""
        held = self._buckets[index]
        metas = [_checked(meta, held.bytes_of(meta)) for meta in held.metas]
        held.metas = metas
        return bucket_frame(version, index, metas, held.payload)

    def change_frame(
        self, version: int, base: int, index: int, patches: list[tuple[delta.Patch, list[np.ndarray]]]
    ) -> Frame:
        """What `put_changes` found; `frame` of this bucket made the checksums."""
        parts = [part.view(np.uint8) for _, tensor_parts in patches for part in tensor_parts]
        payload = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)
        forms = [patch for patch, _ in patches]
        return delta_frame(version, base, index, self._buckets[index].metas, forms, payload)

    # --- the replica's side ---------------------------------------------------------------------------
    def hold(self, meta: BucketMeta, payload: torch.Tensor) -> list[str]:
        """Keep a whole bucket that arrived; the names in it. Raises WeightTransferError."""
        unpack_bucket(meta, payload)
        if meta.index > len(self._buckets):
            raise WeightTransferError(f"bucket {meta.index} came after {len(self._buckets)} buckets")
        held = _Held(list(meta.tensors), payload)
        self._buckets[meta.index : meta.index + 1] = [held]
        return [item.name for item in meta.tensors]

    def change(self, meta: DeltaMeta, payload: torch.Tensor) -> None:
        """Patch a bucket in place; `payload` is on the host.

        Raises WeightTransferError where what is here is not what the policy thinks it is: the bucket must
        then come whole."""
        if meta.index >= len(self._buckets) or not _alike(self._buckets[meta.index].metas, meta.tensors):
            raise WeightTransferError(f"bucket {meta.index} holds other tensors than the policy's")
        held = self._buckets[meta.index]
        start = 0
        for item, patch in zip(meta.tensors, meta.patches, strict=True):
            mine = held.bytes_of(item)
            try:
                delta.apply(patch, payload[start : start + patch.nbytes], mine)
            except (ValueError, IndexError) as error:
                raise WeightTransferError(f"the changes of {item.name} do not fit: {error}") from error
            if tensor_checksum(mine) != item.checksum:
                raise WeightTransferError(f"checksum of {item.name} is wrong after its changes")
            start += patch.nbytes
        held.metas = list(meta.tensors)

    def _room(self, index: int, metas: list[TensorMeta], nbytes: int) -> _Held:
        if index < len(self._buckets) and self._buckets[index].payload.numel() == nbytes:
            self._buckets[index].metas = metas
            return self._buckets[index]
        held = _Held(metas, torch.empty(nbytes, dtype=torch.uint8))
        self._buckets[index : index + 1] = [held]
        return held


def _alike(ours: Sequence[TensorMeta], theirs: Sequence[TensorMeta]) -> bool:
    """Whether two buckets hold the same tensors in the same places."""
    return [(m.name, m.dtype, m.shape, m.offset) for m in ours] == [
        (m.name, m.dtype, m.shape, m.offset) for m in theirs
    ]


def _checked(meta: TensorMeta, data: torch.Tensor) -> TensorMeta:
    return TensorMeta(meta.name, meta.dtype, meta.shape, meta.offset, meta.nbytes, tensor_checksum(data))
