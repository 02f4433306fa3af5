"""Attention over packed sequences at the cost of the sequences, with torch's SDPA on any device.

Transformers' own way for a packed row is a T x T block mask: quadratic in the whole row, in time and
memory. Here the row is cut into its sequences, those of similar length are stacked (padded on the right,
where causal attention does not look), and each stack is one causal SDPA call. Tokens of one image may see
each other in both directions (Gemma 3). Registered through transformers' `AttentionInterface` under the
name `hpc_rl_packed`; without a layout (generation) it is plain `sdpa`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hpc_rl_packed"


class NotPacked(RuntimeError):
    """The model cannot run a packed row with this attention; another way must be taken."""


@dataclass(frozen=True)
class Stack:
    """`count` sequences, padded to `width`. `gather` [B * L] takes the row's positions (padding repeats a
    sequence's first token). `blocks` [B, L], where a sequence has images, is the number of the image
    that a token belongs to, and -1 elsewhere."""

    gather: Tensor
    count: int
    width: int
    blocks: Tensor | None = None


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed row are. `restore` [T] brings the concatenated outputs of all
    stacks back into the row's order. `in_order`: there is one stack, of sequences of one length, which is
    the row itself, and nothing has to be copied."""

    stacks: list[Stack]
    restore: Tensor
    in_order: bool = False


def spans_of(position_ids: Tensor) -> list[tuple[int, int]]:
    """`(start, end)` of each sequence of a row whose `position_ids` [T] start anew at 0 with each."""
    starts = torch.nonzero(position_ids == 0).flatten().tolist()
    return list(zip(starts, [*starts[1:], len(position_ids)], strict=True))


def layout_of(
    position_ids: Tensor, blocks: Tensor | None = None, device: torch.device | None = None
) -> PackedLayout:
    """The layout of a row whose `position_ids` [T] start anew at 0 with each sequence; `blocks` [T]
    numbers the tokens of images (-1: no image's).

    Sequences are stacked by length rounded up to a power of two, so at most half of a stack is padding;
    those with images (they need a mask) apart from those without. The layout is for a row on `device`; the
    positions are best on the host, or asking for them waits for the GPU.
    """
    positions, device = position_ids.cpu(), device or position_ids.device
    own_blocks = blocks.cpu() if blocks is not None else torch.full_like(positions, -1)
    by_size: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    for start, end in spans_of(positions):
        images = bool((own_blocks[start:end] >= 0).any())
        by_size.setdefault(((end - start - 1).bit_length(), images), []).append((start, end - start))
    stacks, homes, filled = [], torch.empty(len(positions), dtype=torch.long), 0
    for (_, images), spans in by_size.items():
        first = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([length for _, length in spans])[:, None]
        width = int(lengths.max())
        offsets = torch.arange(width)[None]
        inside = offsets < lengths
        gather = first + torch.where(inside, offsets, torch.zeros_like(offsets))
        places = filled + torch.arange(gather.numel()).view_as(gather)
        homes[gather[inside]] = places[inside]
        # Padding belongs to no image, or an image at the start of a sequence would see it.
        ours = torch.where(inside, own_blocks[gather], -1).to(device) if images else None
        stacks.append(Stack(gather.flatten().to(device), len(spans), width, ours))
        filled += gather.numel()
    # Sequences of one length may still be in two stacks: with and without images.
    lengths_seen = {length for spans in by_size.values() for _, length in spans}
    in_order = len(stacks) == 1 and len(lengths_seen) == 1
    return PackedLayout(stacks, homes.to(device), in_order)


def no_mask(device: torch.device) -> Tensor:
    """A 4-D mask passes through transformers untouched, so that none is built for the whole row."""
    return torch.zeros(1, 1, 1, 1, device=device)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    Soft-capped scores and attention sinks (`s_aux` [H]), which SDPA does not have, are computed plainly.
    """
    if packed_layout is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise NotPacked(f"{type(module).__name__} does not get the keyword arguments of its model")
        if softcap is not None or s_aux is not None:
            raise NotPacked(f"{type(module).__name__} can only run packed with {NAME}")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if key.shape[2] != query.shape[2]:
        raise NotPacked(f"{type(module).__name__} attends to something else than its own row")
    if sliding_window is None and _has_window(module):
        raise NotPacked(f"{type(module).__name__} puts its sliding window into the mask alone")
    outputs = []
    for stack in packed_layout.stacks:
        shape = (stack.count, stack.width)
        rows = [
            t[0] if packed_layout.in_order else t[0].index_select(1, stack.gather)
            for t in (query, key, value)
        ]
        q, k, v = (t.unflatten(1, shape).transpose(0, 1) for t in rows)
        mask = _mask(stack, sliding_window, q.device)
        if softcap is not None or s_aux is not None:
            out = _plain(q, k, v, scaling, mask, softcap, s_aux)
        else:
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * L, H, D]
    if packed_layout.in_order:
        return outputs[0].unsqueeze(0), None
    return torch.cat(outputs).index_select(0, packed_layout.restore).unsqueeze(0), None


def _has_window(module: Any) -> bool:
    """Whether the config gives this layer a window. (Phimoe and Doge have it in their masks, which are not
    looked at here, and do not say it to the attention.)"""
    config = getattr(module, "config", None)
    if getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True):
        return False
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return kinds is None or index is None or kinds[index] == "sliding_attention"


def _causal(width: int, device: torch.device) -> Tensor:
    i = torch.arange(width, device=device)
    return i[:, None] >= i[None]


def _mask(stack: Stack, window: int | None, device: torch.device) -> Tensor | None:
    """True where query i may see key j: j <= i, with a window i - window < j, and always within one image.
    [L, L], with images [B, 1, L, L]; None where it is the causal mask."""
    windowed = window is not None and stack.width > window
    if not windowed and stack.blocks is None:
        return None
    seen = _causal(stack.width, device)
    if windowed:
        i = torch.arange(stack.width, device=device)
        seen = seen & (i[:, None] - i[None] < window)
    if stack.blocks is None:
        return seen
    same = (stack.blocks[:, :, None] == stack.blocks[:, None]) & (stack.blocks[:, :, None] >= 0)
    return (seen | same).unsqueeze(1)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention written out: scores capped at +-softcap, and a sink that takes part of the
    weight and gives nothing. fp32 softmax."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = _causal(q.shape[2], q.device) if mask is None else mask
    scores = scores.float().masked_fill(~seen, float("-inf"))
    if sinks is None:
        return scores.softmax(-1).to(q.dtype) @ v
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1].to(q.dtype) @ v


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
