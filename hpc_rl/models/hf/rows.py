"""A row of sequences through a Transformers model: packed as it is, or unpacked into a padded batch.

Packed is what we want: no padding, attention at the cost of the sequences. Some models cannot: their
recurrent state would run on into the next sequence, their chunks would be counted from the start of the
row, their images reach the text by cross attention. Those get the row as a batch [B, L] with the mask made
from lengths (never from ids), and only the logits at `keep` come back, so nobody else sees a difference.
Which way it is, is decided at the start, checked, and said in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rl.models.base import Media, ModelError, ParallelSpec
from hpc_rl.models.hf import attention
from hpc_rl.models.hf.classes import has_vision
from hpc_rl.models.hf.media import PACKED, PackedMedia, media_rows, packed_media, padded_media

LOG = logging.getLogger("hpc_rl.models")
PACKABLE = {"full_attention", "sliding_attention"}
Rows = Callable[[Any, Tensor, Tensor, Tensor, Sequence[Media | None] | None], Tensor]


def reason_to_pad(config: Any, implementation: str | None) -> str:
    """Why a model of `config` cannot have packed rows, as far as its config says; "" if it can.

    `implementation` is the attention that the recipe names."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or []) - PACKABLE
    if config.model_type == "mllama":
        return "its text reaches images by cross attention"
    if config.model_type == "gpt_neo":
        return "its masks are as long as its positions, and a row is longer"
    if kinds:
        return f"its {', '.join(sorted(kinds))} layers would run on into the next sequence"
    if has_vision(config) and config.model_type not in PACKED:
        return f"how images of {config.model_type} go into a packed row is not known"
    if has_vision(config) and PACKED[config.model_type].bidirectional and implementation is not None:
        return f"attention {implementation} cannot see images of a packed row in both directions"
    return ""


def packed(
    module: Any, ids: Tensor, positions: Tensor, keep: Tensor, media: Sequence[Media | None] | None
) -> Tensor:
    """Logits [N, V] at `keep`. Our own attention gets the layout of the row; others get no mask, and
    transformers finds the boundaries in `position_ids`."""
    inputs: dict[str, Any] = {}
    on_device = positions.to(ids.device, non_blocking=True)
    place, blocks = on_device.unsqueeze(0), None
    rule = PACKED.get(module.config.model_type, PackedMedia())
    if rule.mrope:  # text positions, which mark the sequences, and three more
        place = on_device.expand(4, 1, -1)
    if media is not None and any(media):
        spans = attention.spans_of(positions)
        inputs, place, blocks = packed_media(module, rule, ids, on_device, spans, media)
    if module.config.get_text_config()._attn_implementation == attention.NAME:
        inputs["packed_layout"] = attention.layout_of(positions, blocks, ids.device)
        inputs["attention_mask"] = attention.no_mask(ids.device)
    output = module(
        input_ids=ids.unsqueeze(0), position_ids=place, use_cache=False, logits_to_keep=keep, **inputs
    )
    return output.logits.squeeze(0)


def padded(
    module: Any, ids: Tensor, positions: Tensor, keep: Tensor, media: Sequence[Media | None] | None
) -> Tensor:
    """Logits [N, V] at `keep`, by way of a batch padded on the right."""
    spans = attention.spans_of(positions)
    lengths = [end - start for start, end in spans]
    rows = [ids[start:end] for start, end in spans]
    pad = module.config.get_text_config().pad_token_id or 0
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    sizes = torch.tensor(lengths, device=ids.device)
    mask = (torch.arange(batch.shape[1], device=ids.device) < sizes[:, None]).long()
    inputs: dict[str, Any] = {}
    if media is not None and any(media):
        inputs = padded_media(media, lengths, ids.device)
        if module.config.model_type == "mllama":
            inputs["media_rows"] = media_rows(media, ids.device)
    starts = torch.tensor([start for start, _ in spans], device=ids.device)
    row = torch.searchsorted(starts, keep, right=True) - 1
    places = row * batch.shape[1] + keep - starts[row]

    def kept(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1).index_select(0, places).unsqueeze(0), *args[1:])

    head = module.get_output_embeddings()
    if head is None:
        output = module(input_ids=batch, attention_mask=mask, use_cache=False, **inputs)
        return output.logits.flatten(0, 1).index_select(0, places)
    # The head runs on what is kept only; what comes after it (soft caps, scales) is elementwise.
    hook = head.register_forward_pre_hook(kept)
    try:
        output = module(input_ids=batch, attention_mask=mask, use_cache=False, **inputs)
    finally:
        hook.remove()
    return output.logits.squeeze(0)


def close_cross_attention(module: Any) -> None:
    """Mllama alone skips its cross-attention layers for a text without image. In a batch with others they
    run; then they must add nothing to that text. (Its own mask spares the MLP, not the attention.)"""
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    def closed(_: nn.Module, __: Any, kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> Any:
        rows = kwargs.get("media_rows")
        return output if rows is None else (output[0] * rows.to(output[0].dtype), *output[1:])

    for part in module.modules():
        if isinstance(part, MllamaTextCrossAttention):
            part.register_forward_hook(closed, with_kwargs=True)


class Leak(ModelError):
    """What a sequence gets depends on its neighbour in the row."""


@torch.no_grad()
def check_rows(module: Any, rows: Rows, parallel: ParallelSpec, *, sharded: bool) -> None:
    """What a sequence gets must not depend on its neighbour, and in a packed row be what the model gives it
    with positions of its own. A collective when sharded. Raises Leak or NotPacked.

    Transformers finds the boundaries of packed rows for most models, not for all (GPT-OSS makes its masks
    without the position ids), and says nothing where it does not.
    """
    usual = usual_ids(module.config)
    results = []
    module.eval()  # dropout draws anew for every forward
    for first in (1, 2):
        tokens = [usual[i % len(usual)] for i in (*range(first, first + 12), *range(3, 7))]
        positions = torch.cat([torch.arange(12), torch.arange(4)]).to(parallel.device)
        keep = torch.arange(12, 16, device=parallel.device)
        logits = rows(module, torch.tensor(tokens, device=parallel.device), positions, keep, None)
        results.append(logits.float().log_softmax(-1))
    if rows is packed and not has_vision(module.config):
        results += _one_sequence(module, torch.tensor(tokens, device=parallel.device))
    if sharded:
        module.reshard()  # a forward without backward leaves the root's parameters whole
    module.train()
    limit = 1e-4 if parallel.compute_dtype == torch.float32 else 5e-2
    difference = float((results[0] - results[1]).abs().max())
    if not difference <= limit:
        raise Leak(
            f"sequences leak into each other in {type(module).__name__} with attention "
            f"{module.config.get_text_config()._attn_implementation} (log-probs moved by {difference:.2g})"
        )
    if len(results) == 4 and not (difference := float((results[2] - results[3]).abs().max())) <= limit:
        raise attention.NotPacked(
            f"{type(module).__name__} counts positions in its own way (log-probs moved by {difference:.2g})"
        )


def _one_sequence(module: Any, ids: Tensor) -> list[Tensor]:
    """Log-probs [T, V] of one sequence with our positions, and with those that the model makes itself.

    Both are the same computation where the model's positions begin at 0 (RoBERTa's do not)."""
    positions, inputs = torch.arange(len(ids)), {}
    if module.config.get_text_config()._attn_implementation == attention.NAME:
        inputs["packed_layout"] = attention.layout_of(positions, device=ids.device)
    ours = packed(module, ids, positions, positions.to(ids.device), None)
    own = module(input_ids=ids.unsqueeze(0), use_cache=False, **inputs).logits.squeeze(0)
    return [logits.float().log_softmax(-1) for logits in (ours, own)]


def usual_ids(config: Any) -> list[int]:
    """The first ids but those that stand for an image or the like, which no probe of plain text may hold."""
    unusual = {
        value for key, value in config.to_dict().items() if key.endswith(("_token_id", "_token_index"))
        and isinstance(value, int)
    }  # fmt: skip
    return [i for i in range(min(config.get_text_config().vocab_size, 64 + len(unusual))) if i not in unusual]
