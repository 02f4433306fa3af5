"""An exponential moving average of the trained weights, in fp32 and sharded as they are.

    ema <- decay * ema + (1 - decay) * weight        after every step

Up to `start_step` it is a copy of the weights. Frozen weights are their own average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hpc_rl.recipe.schema import Ema


class WeightAverage:
    """`shadow` has one fp32 tensor per trained parameter, by the parameter's name."""

    def __init__(self, module: nn.Module, options: Ema) -> None:
        self.options = options
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow: dict[str, Tensor] = {}
        self.restart()
        self._average = get_ema_multi_avg_fn(options.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Take the weights as they are now."""
        self.shadow = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`."""
        averages, weights = self._pairs()
        if step <= self.options.start_step:
            torch._foreach_copy_(averages, weights)
        else:
            self._average(averages, weights, None)  # type: ignore[arg-type]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold the average (and the shadow the weights)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            kept = weight.clone()  # one tensor at a time: no second copy of the model
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Local tensors of the averages and of the parameters."""
        averages = [_local(value) for value in self.shadow.values()]
        return averages, [_local(parameter.detach()) for parameter in self._parameters.values()]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
