"""Images and videos beside a row: what the processor made for each sequence becomes the model's input.

Two ways, as for the text (`rows.py`). In a packed row, pixels and grids of all sequences follow each other,
and what a sequence's tokens know of them (rotary positions in three dimensions, which tokens are one image)
is worked out sequence by sequence. In a padded batch, fields with one entry per token are padded with the
tokens, and the model works the rest out itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_rl.models.base import Media, ModelError

# One entry per token: 0 for text.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
CROSS = "cross_attention_mask"


@dataclass(frozen=True)
class PackedMedia:
    """How a family's images go into a packed row. `mrope`: rotary positions come from the model's own
    `get_rope_index`. `bidirectional`: tokens of one image see each other in both directions."""

    mrope: bool = False
    bidirectional: bool = False


# By model type. Only what the families' contract test proves; the others take the padded way.
PACKED: dict[str, PackedMedia] = {
    "llava": PackedMedia(),
    "gemma3": PackedMedia(bidirectional=True),
    "qwen2_vl": PackedMedia(mrope=True),
    "qwen2_5_vl": PackedMedia(mrope=True),
    "qwen3_vl": PackedMedia(mrope=True),
    "qwen3_vl_moe": PackedMedia(mrope=True),
}


def placeholder_ids(config: Any) -> frozenset[int]:
    """The tokens at which a model of this config reads an image or a video instead of the token."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = config.to_dict()
    return frozenset(found[name] for name in names if isinstance(found.get(name), int))


def packed_media(
    module: Any,
    rule: PackedMedia,
    ids: Tensor,
    positions: Tensor,
    spans: list[tuple[int, int]],
    media: Sequence[Media | None],
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """`(model inputs, position_ids [1, T] or [4, 1, T], image number per token [T] or None)` of one row
    of `ids` [T]; `media` has one entry per span."""  # fmt: skip
    if len(media) != len(spans):
        raise ValueError(f"media of {len(media)} sequences beside a row of {len(spans)}")
    types = _token_types(media, spans, len(ids), ids.device)
    place = positions.unsqueeze(0)
    if rule.mrope:
        place = _rotary_positions(module, ids, positions, types, spans, media)
    blocks = _images_of(types, spans) if rule.bidirectional else None
    return _flat(media), place, blocks


def padded_media(
    media: Sequence[Media | None], lengths: list[int], device: torch.device
) -> dict[str, Tensor]:
    """Model inputs for a batch of sequences of `lengths`, padded on the right."""
    inputs = _batched(media, lengths, device) if any(m and CROSS in m for m in media) else _flat(media)
    for name in PER_TOKEN:
        if any(m and name in m for m in media):
            rows = [_fitted(m, name, n, device) for m, n in zip(media, lengths, strict=True)]
            inputs[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return inputs


def _flat(media: Sequence[Media | None]) -> dict[str, Tensor]:
    """Pixels, grids and the like of all sequences, one image after the other."""
    parts: dict[str, list[Tensor]] = {}
    for one in media:
        for name, value in (one or {}).items():
            if name not in PER_TOKEN:
                parts.setdefault(name, []).append(value)
    try:
        return {name: torch.cat(values) for name, values in parts.items()}
    except RuntimeError as error:
        shapes = {name: [tuple(v.shape) for v in values] for name, values in parts.items()}
        raise ModelError(
            f"media of several sequences do not fit together: {shapes}; "
            "let the processor make images of one size, or set policy.micro_batch_size to 1"
        ) from error


def _fitted(one: Media | None, name: str, length: int, device: torch.device) -> Tensor:
    """A per-token field [length]. The processor saw the prompt; what was added after it is text."""
    value = torch.zeros(length, dtype=torch.long, device=device)
    if one is not None and name in one:
        given = one[name].flatten()[:length]
        value[: len(given)] = given
    return value


def _token_types(
    media: Sequence[Media | None], spans: list[tuple[int, int]], total: int, device: torch.device
) -> Tensor:
    """[T]: 0 text, 1 image, 2 video; by whichever name the processor has for it."""
    types = torch.zeros(total, dtype=torch.long, device=device)
    for one, (start, end) in zip(media, spans, strict=True):
        for name in PER_TOKEN:
            if one is not None and name in one:
                types[start:end] = _fitted(one, name, end - start, device)
    return types


def _rotary_positions(
    module: Any,
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    spans: list[tuple[int, int]],
    media: Sequence[Media | None],
) -> Tensor:
    """[4, 1, T]: the text positions, which mark the sequences, then the model's own three dimensions."""
    place = positions.expand(4, -1).clone()
    for one, (start, end) in zip(media, spans, strict=True):
        if one is not None:
            place[1:, start:end] = rotary_positions(module, ids[start:end], types[start:end], one)
    return place.unsqueeze(1)


def rotary_positions(module: Any, ids: Tensor, types: Tensor, media: Media) -> Tensor:
    """[3, T]: time, height and width of the tokens of one sequence, by the model's `get_rope_index`.

    What follows a medium begins after the largest of its positions, as Qwen2-VL and Qwen2.5-VL were trained
    and vLLM has it. Transformers 5 begins after its height and width, so that text behind a long clip shares
    positions with its frames.
    """
    grids = {name: value for name, value in media.items() if name not in PER_TOKEN}
    found, _ = module.model.get_rope_index(ids[None], mm_token_type_ids=types[None], **grids)
    place: Tensor = found[:, 0]
    ends = (torch.nonzero(types[1:] != types[:-1]).flatten() + 1).tolist()
    for start, end in itertools.pairwise([0, *ends]):
        missing = place[:, start:end].max() + 1 - place[:, end].min()
        place[:, end:] += missing.clamp(min=0)
    return place


def _images_of(types: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """[T]: which image of the row a token belongs to, -1 for text. Neighbouring image tokens of one
    sequence are one image, as in Transformers' masks for Gemma 3."""
    inside = types == 1
    before = torch.roll(inside, 1)
    before[[start for start, _ in spans]] = False
    return torch.where(inside, torch.cumsum(inside & ~before, 0) - 1, -1)


def _batched(media: Sequence[Media | None], lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    """Mllama's fields have a row per sequence and a column per image: `pixel_values` [B, I, tiles, C, H, W],
    `aspect_ratio_ids` [B, I], `aspect_ratio_mask` [B, I, tiles], `cross_attention_mask` [B, L, I, tiles]."""
    some = next(one for one in media if one)
    counts = {one["pixel_values"].shape[1] for one in media if one}
    if len(counts) > 1:
        # Text before a sequence's first image attends evenly to every image of the batch, padding included.
        raise ModelError(
            f"sequences with {' and '.join(map(str, sorted(counts)))} images cannot share a forward of "
            "mllama; set policy.micro_batch_size to 1"
        )
    (images,) = counts
    batch, longest = len(media), max(lengths)
    inputs = {}
    for name, value in some.items():
        shape = (
            (batch, longest, images, *value.shape[3:]) if name == CROSS else (batch, images, *value.shape[2:])
        )
        inputs[name] = torch.zeros(shape, dtype=value.dtype, device=device)
    if "aspect_ratio_mask" in inputs:
        inputs["aspect_ratio_mask"][:, :, 0] = 1  # as the processor has it for an image that is not there
    for row, (one, length) in enumerate(zip(media, lengths, strict=True)):
        for name, value in (one or {}).items():
            if name == CROSS:
                seen = value[0, :length]
                inputs[name][row, : len(seen), : seen.shape[1]] = seen
                inputs[name][row, len(seen) : length, : seen.shape[1]] = seen[-1]  # generated tokens see on
            else:
                inputs[name][row, : value.shape[1]] = value[0]
    return inputs


def media_rows(media: Sequence[Media | None], device: torch.device) -> Tensor:
    """[B, 1, 1]: 1 for sequences with an image, 0 for those without."""
    return torch.tensor([float(bool(one)) for one in media], device=device).view(-1, 1, 1)
