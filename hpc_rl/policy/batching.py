"""From train samples to the tensors of one packed forward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_rl.algorithms.base import TokenBatch
from hpc_rl.models.base import Media, Row
from hpc_rl.types import TrainSample


@dataclass
class PackedBatch:
    """One row on the device (its positions on the host: where sequences begin is asked of them, and a GPU
    would first finish all it has to do), and the tokens that are trained, as many as `row.keep`."""

    row: Row
    tokens: TokenBatch


def pack_samples(
    samples: list[TrainSample],
    denominator: float,
    device: torch.device,
    media: list[Media | None] | None = None,
) -> PackedBatch:
    """One row out of `samples`, with the media of each (`media`, else their own) if any has some.

    With preference pairs, sequence 2 i is what pair i chose and 2 i + 1 what it rejected.
    Without any trained token the row still has one masked position, because every rank must run a
    forward and a backward for its peers' collectives.
    """
    ids, positions, keep, targets, sequence = [], [], [], [], []
    sampler, advantages, teacher = [], [], []
    start, width = 0, 2 if any(sample.split for sample in samples) else 1
    for number, sample in enumerate(samples):
        bounds, mask = sample.bounds, np.asarray(sample.loss_mask, dtype=bool)
        if any(mask[first:end][:1].any() for first, end in bounds):
            raise ValueError(f"sample {sample.ordinal}.{sample.sample}: nothing predicts the first token")
        trained = np.nonzero(mask)[0]
        tokens = np.asarray(sample.token_ids, dtype=np.int64)
        ids.append(tokens)
        positions += [np.arange(end - first) for first, end in bounds]
        keep.append(start + trained - 1)
        targets.append(tokens[trained])
        sequence.append(width * number + ((trained >= sample.split) & (sample.split > 0)))
        sampler.append(_per_token(sample.log_probs, trained))
        advantages.append(_per_token(sample.advantages, trained))
        teacher.append(_per_token(sample.teacher_log_probs, trained, missing=np.nan))
        start += len(tokens)
    trained_tokens = sum(len(k) for k in keep)
    mask = np.ones(trained_tokens, dtype=np.float32)
    if trained_tokens == 0:
        keep, targets, sequence = [np.zeros(1)], [np.zeros(1)], [np.zeros(1)]
        sampler, advantages, teacher, mask = [np.zeros(1)], [np.zeros(1)], [np.zeros(1)], np.zeros(1)
    if start == 0:
        ids, positions = [np.zeros(1)], [np.zeros(1)]

    def put(parts: list[np.ndarray] | np.ndarray, dtype: torch.dtype) -> Tensor:
        array = np.concatenate(parts) if isinstance(parts, list) else parts
        return torch.as_tensor(array, dtype=dtype).to(device, non_blocking=True)

    if media is None:
        media = [sample.media for sample in samples for _ in sample.bounds]
    next_tokens = put(targets, torch.long)
    return PackedBatch(
        Row(
            put(ids, torch.long),
            torch.as_tensor(np.concatenate(positions), dtype=torch.long),
            put(keep, torch.long),
            next_tokens,
            _on(device, media),
        ),
        TokenBatch(
            targets=next_tokens,
            mask=put(mask, torch.float32),
            sequence=put(sequence, torch.long),
            num_sequences=width * max(1, len(samples)),
            denominator=denominator,
            sampler_log_probs=put(sampler, torch.float32),
            advantages=put(advantages, torch.float32),
            teacher_log_probs=put(teacher, torch.float32),
        ),
    )


def _per_token(values: list[float], trained: np.ndarray, missing: float = 0.0) -> np.ndarray:
    """The values at the trained positions; SFT has none."""
    if not values:
        return np.full(len(trained), missing, dtype=np.float32)
    return np.asarray(values, dtype=np.float32)[trained]


def _on(device: torch.device, media: list[Media | None] | None) -> list[Media | None] | None:
    if media is None or not any(media):
        return None
    return [
        None if one is None else {name: value.to(device, non_blocking=True) for name, value in one.items()}
        for one in media
    ]
