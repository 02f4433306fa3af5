"""The output head of a packed Transformers model, run chunk by chunk instead of over all trained rows.

The model's own forward is run, so that FSDP's hooks and whatever a family does before the head happen as
ever; only the head's layer is spared its rows, and what it would have got goes through it in chunks
(`algorithms.chunked_head`). That is right where logits are the layer's output, scaled or soft-capped: which
it is, is compared at the start with the model's own logits, and where nothing fits, logits it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpc_rl.algorithms.chunked_head import Head, Weights, chunk_rows, chunked_log_probs, finish
from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.models.base import ParallelSpec, Row
from hpc_rl.models.hf.rows import packed, usual_ids

LOG = logging.getLogger("hpc_rl.models")


@dataclass(frozen=True)
class ChunkedHead:
    """Log-probs of `module`, whose output layer is `layer`; `scale` and `soft_cap` as in
    `algorithms.chunked_head.Head`. A layer that is not `plain` (split by tensor, with an adapter) is called
    itself for each chunk, and once more in backward."""

    module: Any
    layer: Any
    plain: bool
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def _vocabulary(self) -> int:
        return int(self.module.config.get_text_config().vocab_size)

    def pays(self, keep: Tensor) -> bool:
        """Whether the logits at `keep` [N] are more than one chunk."""
        return chunk_rows(len(keep), self._vocabulary, keep.device) < len(keep)

    def log_probs(
        self, row: Row, temperature: float = 1.0, with_entropy: bool = False, weights: Weights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `ModelAdapter.log_probs`."""
        hidden, rest = self._hidden(row)
        if self.plain:
            # Only now: FSDP has gathered the weight for the forward, and the root keeps it until backward.
            head = Head(self.layer.weight, self.layer.bias, self.scale, self.soft_cap)
            found = chunked_log_probs(hidden, head, row.targets, temperature, with_entropy, weights)
        else:
            found = self._through_layer(hidden, row.targets, temperature, with_entropy)
        # FSDP begins its backward at what the module gave out.
        return found[0] + rest.sum().to(found[0].dtype) * 0.0, found[1]

    def _hidden(self, row: Row) -> tuple[Tensor, Tensor]:
        """What the layer would get for `row.keep` [N, H], and the logits of the rows that it gets: none, or
        one where that would be a special case (of collectives, of adapters)."""
        held: list[Tensor] = []

        def hold(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            held.append(args[0])
            return (args[0][:, : 0 if self.plain else 1], *args[1:])

        def without_weight(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> Tensor:
            # The weight has a gradient of no rows as well: zeros, as large as itself. Only where nothing
            # before it is trained it must be in the graph, because FSDP begins its backward there.
            weight = self.layer.weight
            return nn.functional.linear(args[0], weight.detach() if args[0].requires_grad else weight)

        hooks = [self.layer.register_forward_pre_hook(hold)]
        if self.plain:
            hooks.append(self.layer.register_forward_hook(without_weight))
        try:
            rest = packed(self.module, row.input_ids, row.position_ids, row.keep, row.media)
        finally:
            for hook in hooks:
                hook.remove()
        if len(held) != 1:
            raise _NotOnce(f"the output layer was called {len(held)} times")
        return held[0].squeeze(0), rest

    def _through_layer(
        self, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        def run(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
            logits = self.layer(hidden.unsqueeze(0)).squeeze(0)
            z, _ = finish(logits, self.scale, self.soft_cap, temperature)
            return token_log_probs(z, targets, 1.0, with_entropy)

        rows = chunk_rows(len(targets), self._vocabulary, hidden.device)
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        found = [checkpoint(run, *chunk, use_reentrant=False) for chunk in chunks]
        log_probs = torch.cat([part for part, _ in found])
        return log_probs, torch.cat([entropy for _, entropy in found]) if with_entropy else None


class _NotOnce(ValueError):
    """The output layer is not called once per forward."""


def chunked_head(module: Any, parallel: ParallelSpec, *, sharded: bool) -> ChunkedHead | None:
    """The head of `module` (loaded, with packed rows) if it can be run in chunks, else None, which the log
    says. A collective when sharded."""
    module.eval()  # dropout draws anew for every forward
    found = next((head for head in _candidates(module, parallel) if _same(head, parallel)), None)
    if sharded:
        module.reshard()  # a forward without backward leaves the root's parameters whole
    module.train()
    if found is None:
        LOG.info(
            "%s makes the logits of all trained tokens at once: they are not what its output layer gives, "
            "scaled or soft-capped",
            type(module).__name__,
        )
    return found


def _candidates(module: Any, parallel: ParallelSpec) -> Iterator[ChunkedHead]:
    """What the config says (families name the scale differently, and some divide by it), then neither."""
    layer = module.get_output_embeddings()
    if layer is None:
        return
    plain = parallel.tp == 1 and type(layer) is nn.Linear
    config: dict[str, Any] = module.config.get_text_config().to_dict()
    scales = [config.get(name) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    for scale in (float(s) for s in scales if s and s != 1):
        yield ChunkedHead(module, layer, plain, scale=scale)
        yield ChunkedHead(module, layer, plain, scale=1 / scale)
    if cap := config.get("final_logit_softcapping"):
        yield ChunkedHead(module, layer, plain, soft_cap=float(cap))
    yield ChunkedHead(module, layer, plain)


@torch.no_grad()
def _same(head: ChunkedHead, parallel: ParallelSpec) -> bool:
    """Whether `head` gives the log-probs of the model's own logits, on a few tokens."""
    usual = usual_ids(head.module.config)
    tokens = torch.tensor([usual[i % len(usual)] for i in range(17)], device=parallel.device)
    positions = torch.arange(16)
    keep = positions.to(parallel.device)
    expected, _ = token_log_probs(packed(head.module, tokens[:-1], positions, keep, None), tokens[1:])
    try:
        ours, _ = head.log_probs(Row(tokens[:-1], positions, keep, tokens[1:]))
    except _NotOnce:
        return False
    limit = 1e-5 if parallel.compute_dtype == torch.float32 else 5e-2
    return bool((ours - expected).abs().max() <= limit)
