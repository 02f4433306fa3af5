"""Attention over packed sequences at the cost of the sequences, with torch's SDPA on any device.

Transformers' own way for a packed row is a T x T block mask: quadratic in the whole row, in time and
memory. Here the row is cut into its sequences, those of similar length are stacked (padded on the right,
where causal attention does not look), and each stack is one causal SDPA call. Registered through
transformers' `AttentionInterface` under the name `hpc_rl_packed`; without a layout (generation) it is
plain `sdpa`.
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


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed row are. For each stack: `gather` [B * L] takes the row's
    positions (padding repeats a sequence's first token), B and L. `restore` [T] brings the concatenated
    outputs of all stacks back into the row's order."""

    stacks: list[tuple[Tensor, int, int]]
    restore: Tensor


def layout_of(position_ids: Tensor) -> PackedLayout:
    """The layout of a row whose `position_ids` [T] start anew at 0 with each sequence.

    Sequences are stacked by length rounded up to a power of two, so at most half of a stack is padding.
    """
    positions = position_ids.cpu()
    starts = torch.nonzero(positions == 0).flatten()
    ends = torch.cat([starts[1:], torch.tensor([len(positions)])])
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        by_size.setdefault((end - start - 1).bit_length(), []).append((start, end - start))
    stacks, homes, filled = [], torch.empty(len(positions), dtype=torch.long), 0
    for spans in by_size.values():
        first = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([length for _, length in spans])[:, None]
        width = int(lengths.max())
        offsets = torch.arange(width)[None]
        inside = offsets < lengths
        gather = first + torch.where(inside, offsets, torch.zeros_like(offsets))
        places = filled + torch.arange(gather.numel()).view_as(gather)
        homes[gather[inside]] = places[inside]
        stacks.append((gather.flatten().to(position_ids.device), len(spans), width))
        filled += gather.numel()
    return PackedLayout(stacks, homes.to(position_ids.device))


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
            raise RuntimeError(
                f"{type(module).__name__} does not get the keyword arguments of its model; "
                "set model.attn_implementation to sdpa"
            )
        if softcap is not None or s_aux is not None:
            raise RuntimeError(f"{type(module).__name__} can only run packed with {NAME}")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    outputs = []
    for gather, count, width in packed_layout.stacks:
        q, k, v = (
            t[0].index_select(1, gather).unflatten(1, (count, width)).transpose(0, 1)
            for t in (query, key, value)
        )
        window = sliding_window if sliding_window is not None and width > sliding_window else None
        if softcap is not None or s_aux is not None:
            out = _plain(q, k, v, scaling, window, softcap, s_aux)
        else:
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_causal(width, window, q.device) if window is not None else None,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * L, H, D]
    return torch.cat(outputs).index_select(0, packed_layout.restore).unsqueeze(0), None


def _causal(width: int, window: int | None, device: torch.device) -> Tensor:
    """True where query i may see key j: j <= i, and with a window i - window < j."""
    i = torch.arange(width, device=device)
    distance = i[:, None] - i[None]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    window: int | None,
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
    scores = scores.float().masked_fill(~_causal(q.shape[2], window, q.device), float("-inf"))
    if sinks is None:
        return scores.softmax(-1).to(q.dtype) @ v
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1].to(q.dtype) @ v


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
