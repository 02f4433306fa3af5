"""The frozen model that a KL penalty or a preference loss holds the policy to (`policy.reference`).

Its log-probs are made by the same code, over the same packed rows and chunks of the head as the policy's, so
that a policy equal to its reference has log-probs equal to the reference's, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.hf.model import HfModel, build
from hpc_rl.policy.batching import PackedBatch
from hpc_rl.recipe.reference_model import reference_mode, reference_model
from hpc_rl.recipe.schema import Recipe


class Reference(ABC):
    """Log-probs of a model that is not trained, at the algorithm's `temperature`."""

    def __init__(self, model: HfModel, temperature: float) -> None:
        self.model, self.temperature = model, temperature

    @abstractmethod
    def frozen(self) -> AbstractContextManager[None]:
        """Inside, `model` is the reference."""

    @torch.no_grad()
    def log_probs(self, batch: PackedBatch) -> Tensor:
        """Those of the batch's tokens [N], fp32, without a graph. A collective when the model is sharded."""
        module = self.model.module
        training = module.training
        module.eval()
        with self.frozen():
            found, _ = self.model.log_probs(batch.row, self.temperature)
            if self.model.sharded:
                module.reshard()  # a forward without backward leaves the root's parameters whole
        module.train(training)
        return found

    def after_step(self, step: int) -> None:
        """Once optimizer step `step` is done."""
        return

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it, by name; references to the (sharded) tensors."""
        return {}


class AdaptersOff(Reference):
    """The policy's own model without its adapters: no memory, and exact while the rest is frozen."""

    def frozen(self) -> AbstractContextManager[None]:
        from hpc_rl.models.hf.lora import adapters_off

        return adapters_off(self.model.module)


class SecondModel(Reference):
    """A copy of its own. With `reset_every` it becomes `policy` after every so many steps, and is saved."""

    def __init__(self, model: HfModel, temperature: float, policy: HfModel, reset_every: int | None) -> None:
        super().__init__(model, temperature)
        model.module.requires_grad_(False)
        model.module.eval()
        self.reset_every = reset_every
        self._trained: dict[str, tuple[Tensor, Tensor]] = {}
        if reset_every is not None:
            own = dict(model.module.named_parameters())
            trained = [(name, p) for name, p in policy.module.named_parameters() if p.requires_grad]
            self._trained = {name: (own[name], parameter) for name, parameter in trained}

    def frozen(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.reset_every is not None and step % self.reset_every == 0:
            for own, parameter in self._trained.values():
                _local(own).copy_(_local(parameter))

    def state(self) -> dict[str, Tensor]:
        return {name: own for name, (own, _) in self._trained.items()}


def make_reference(
    recipe: Recipe, policy: HfModel, parallel: ParallelSpec, temperature: float
) -> Reference | None:
    """The reference of the recipe, None if its algorithm asks for none. A collective: it may be built and
    sharded here. Raises ModelError if its words are not the policy's."""
    mode = reference_mode(recipe)
    if mode is None:
        return None
    if mode == "lora_off":
        return AdaptersOff(policy, temperature)
    spec, options = reference_model(recipe), recipe.policy.reference
    offload = options.cpu_offload or parallel.cpu_offload
    frozen = replace(parallel, cpu_offload=offload, activation_checkpointing=False)
    model = build(spec, frozen, recipe.seed)
    ours, theirs = (m.module.config.get_text_config().vocab_size for m in (policy, model))
    if ours != theirs:
        raise ModelError(
            f"policy.reference.path: {spec.path} has {theirs} words in its vocabulary, the policy {ours}; a "
            "reference must read the policy's tokens"
        )
    return SecondModel(model, temperature, policy, options.reset_every)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
