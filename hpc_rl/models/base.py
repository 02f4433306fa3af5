"""What the policy room needs of a model, whatever its family: the one adapter protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from hpc_rl.algorithms.chunked_head import Weights

# What a processor made of the images and videos of one sequence (`pixel_values`, `image_grid_thw`, ...),
# by the names of the model's forward; without `input_ids` and `attention_mask`.
Media = dict[str, Tensor]


class ModelError(ValueError):
    """The model cannot be built or loaded as the recipe says; the message says what to change."""


@dataclass(frozen=True)
class Row:
    """One packed row: sequences of `input_ids` [T] one after the other, `position_ids` [T] (best on the host)
    starting anew at 0 with each. `keep` [N] are the positions whose next token is wanted, `targets` [N] those
    tokens. `media` has one entry per sequence (None: all are text)."""

    input_ids: Tensor
    position_ids: Tensor
    keep: Tensor
    targets: Tensor
    media: Sequence[Media | None] | None = None


@dataclass(frozen=True)
class ParallelSpec:
    """How to shard: the mesh sizes of the plan, the compute dtype, and where the shards live."""

    device: torch.device
    compute_dtype: torch.dtype
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    activation_checkpointing: bool = False
    cpu_offload: bool = False

    @property
    def data_parallel(self) -> int:
        return self.dp_replicate * self.dp_shard


class ModelAdapter(Protocol):
    """A model of some family, sharded over the ranks of the default process group.

    Building and loading are collectives: all ranks call them in the same order.
    """

    module: nn.Module
    folder: Path
    placeholders: frozenset[int]
    """Tokens that stand for a medium; none in a model of text alone."""

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keep: Tensor,
        media: Sequence[Media | None] | None = None,
    ) -> Tensor:
        """Logits [N, V] at the positions `keep` [N] of one packed row: sequences of `input_ids` [T]
        one after the other, `position_ids` [T] (best on the host) starting anew at 0 with each. `media`
        has one entry per sequence of the row (None: all are text)."""
        ...

    def log_probs(
        self, row: Row, temperature: float = 1.0, with_entropy: bool = False, weights: Weights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`(log_probs [N], entropy [N] or None)` of the row's targets, in fp32, without logits of all of them
        where the head allows it. `weights` are for a loss whose gradient by the log-probs is a multiple of
        them (`algorithms.chunked_head`)."""
        ...

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """A `weights.WeightSource`: full tensors under the names of the safetensors file."""
        ...

    def num_parameters(self) -> int: ...
