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


@dataclass(frozen=True)
class Fixed:
    """What is made of a micro-batch before the first update of its step, all [N] (None: not needed), and
    where the weights are: `progress` of a version after `start_version`."""

    reference: Tensor | None = None
    proximal: Tensor | None = None
    advantages: Tensor | None = None
    start_version: float = 0.0
    progress: float = 0.0

    def fill(self, tokens: TokenBatch) -> None:
        """Into the micro-batch, packed again."""
        tokens.reference_log_probs, tokens.proximal_log_probs = self.reference, self.proximal
        tokens.start_version, tokens.progress = self.start_version, self.progress
        if self.advantages is not None:
            tokens.advantages = self.advantages


def pack_samples(
    samples: list[TrainSample],
    denominator: float,
    device: torch.device,
    media: list[Media | None] | None = None,
    placeholders: frozenset[int] = frozenset(),
) -> PackedBatch:
    """One row out of `samples`, with the media of each (`media`, else their own) if any has some.

    With preference pairs, sequence 2 i is what pair i chose and 2 i + 1 what it rejected.
    Generated tokens that are `placeholders` of media are trained on, but not read: an engine ends an answer
    there, and the model would look for their pictures.
    Without any trained token the row still has one masked position, because every rank must run a
    forward and a backward for its peers' collectives.
    """
    ids, positions, keep, targets, sequence = [], [], [], [], []
    sampler, advantages, teacher, versions = [], [], [], []
    start, width = 0, 2 if any(sample.split for sample in samples) else 1
    for number, sample in enumerate(samples):
        bounds, mask = sample.bounds, np.asarray(sample.loss_mask, dtype=bool)
        if any(mask[first:end][:1].any() for first, end in bounds):
            raise ValueError(f"sample {sample.ordinal}.{sample.sample}: nothing predicts the first token")
        trained = np.nonzero(mask)[0]
        tokens = np.asarray(sample.token_ids, dtype=np.int64)
        ids.append(_readable(tokens, sample, placeholders))
        positions += [np.arange(end - first) for first, end in bounds]
        keep.append(start + trained - 1)
        targets.append(tokens[trained])
        sequence.append(width * number + ((trained >= sample.split) & (sample.split > 0)))
        sampler.append(_per_token(sample.log_probs, trained))
        advantages.append(_per_token(sample.advantages, trained))
        teacher.append(_per_token(sample.teacher_log_probs, trained, missing=np.nan))
        versions.append(_versions(sample)[trained])
        start += len(tokens)
    trained_tokens = sum(len(k) for k in keep)
    mask = np.ones(trained_tokens, dtype=np.float32)
    if trained_tokens == 0:
        keep, targets, sequence = [np.zeros(1)], [np.zeros(1)], [np.zeros(1)]
        sampler, advantages, teacher, mask = [np.zeros(1)], [np.zeros(1)], [np.zeros(1)], np.zeros(1)
        versions = [np.zeros(1)]
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
            versions=put(versions, torch.float32),
        ),
    )


def _readable(tokens: np.ndarray, sample: TrainSample, placeholders: frozenset[int]) -> np.ndarray:
    """The tokens without places of media that the policy wrote itself."""
    if not placeholders or not sample.spans:
        return tokens
    generated = np.zeros(len(tokens), dtype=bool)
    for span in sample.spans:
        generated[span.start : span.end] = True
    return np.where(generated & np.isin(tokens, list(placeholders)), 0, tokens)


def _versions(sample: TrainSample) -> np.ndarray:
    """Of the weights that sampled each token; the oldest where no span says."""
    found = np.full(len(sample.token_ids), sample.version, dtype=np.float32)
    for span in sample.spans:
        found[span.start : span.end] = span.version
    return found


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
