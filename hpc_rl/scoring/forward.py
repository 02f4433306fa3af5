"""Right-padded forwards: rows of tokens in, what the output layer says at chosen positions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def padded(rows: Sequence[Sequence[int]], pad: int, where: torch.device) -> tuple[Tensor, Tensor]:
    """`(input_ids, attention_mask)`, both [B, T], padded on the right with token `pad`."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids.to(where), mask.to(where)


@torch.inference_mode()
def logits_at(model: Any, rows: Sequence[Sequence[int]], wanted: Sequence[range]) -> Tensor:
    """Logits [N, V] of a causal model at the positions `wanted` of each row, row after row.

    Only these go through the output layer: the model's own forward runs, and the layer is handed the hidden
    states of `wanted` alone, so that whatever a family does to its logits afterwards is done to them.
    """
    ids, mask = padded(rows, 0, model.get_input_embeddings().weight.device)
    width = ids.shape[1]
    at = torch.tensor([index * width + t for index, span in enumerate(wanted) for t in span])
    layer = model.get_output_embeddings()

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # [B, T, H]
        return (hidden.reshape(-1, hidden.shape[-1])[at.to(hidden.device)].unsqueeze(0), *args[1:])

    hook = layer.register_forward_pre_hook(choose)
    try:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    logits: Tensor = out.logits.squeeze(0)
    assert logits.shape[0] == len(at), "the output layer ran on other rows than it was given"
    return logits
