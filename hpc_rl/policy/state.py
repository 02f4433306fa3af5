"""What a checkpoint of the policy holds, as flat names: model, optimizer, averages, step, every rank's RNG.

    model.<parameter or buffer>    optim.<parameter>.<exp_avg | exp_avg_sq | step>    ema.<parameter>
    reference.<parameter>    guard    step    frozen    data_state    rng_<rank>    rng_cuda_<rank>

Tensors only; learning rates and the like come from the recipe and the step. Frozen weights are those of the
model's files, which `frozen` tells apart from others. Optimizer state goes by the
parameter's name, so that the recipe's parameter groups may change between save and resume.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_rl.checkpoint.loader import CheckpointError, load_into, tensors_of
from hpc_rl.policy.ema import WeightAverage
from hpc_rl.policy.guard import SpikeGuard
from hpc_rl.policy.optimizer import create_state
from hpc_rl.policy.sft_data import SftData

PAGE = 4096
LOG = logging.getLogger("hpc_rl.policy")


@dataclass
class TrainingState:
    """Everything that a step changes. `ema` and `guard` may be None. `frozen` identifies the files that the
    weights which are not trained come from (`HfModel.fingerprint`). `reference` is what a
    reference model that changes has (`policy.reference.Reference.state`)."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: WeightAverage | None
    guard: SpikeGuard | None
    step: int
    rank: int
    frozen: bytes = b""
    data: SftData | None = None
    reference: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """References to the live tensors (RNG states, the guard's window and the step are copies)."""
        saved = set(self.module.state_dict())
        named = dict(self.module.named_parameters())  # ties once
        state: dict[str, Tensor] = {f"model.{name}": p for name, p in named.items() if p.requires_grad}
        state |= {f"model.{name}": b for name, b in self.module.named_buffers() if name in saved}
        for name, parameter in named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"optim.{name}.{key}"] = value
        if self.ema is not None:
            state |= {f"ema.{name}": value for name, value in self.ema.shadow.items()}
        state |= {f"reference.{name}": value for name, value in self.reference.items()}
        if self.guard is not None:
            state |= self.guard.state()
        if self.frozen:
            state["frozen"] = torch.frombuffer(bytearray(self.frozen), dtype=torch.uint8)
        if self.data is not None:
            state["data_state"] = torch.frombuffer(bytearray(self.data.state()), dtype=torch.uint8)
        state["step"] = torch.tensor(self.step)
        state[f"rng_{self.rank}"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state[f"rng_cuda_{self.rank}"] = torch.cuda.get_rng_state()
        return state

    def staging_bytes(self) -> int:
        """What this rank stages for a save, about: optimizer state that is yet to come is counted in."""
        moments = 2 if isinstance(self.optimizer, torch.optim.AdamW | torch.optim.Adam) else 0
        total = 0
        for tensor in self.tensors().values():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            total += local.nbytes + 2 * PAGE  # with what DCP puts around each
            if (
                isinstance(tensor, nn.Parameter)
                and tensor.requires_grad
                and tensor not in self.optimizer.state
            ):
                total += moments * (local.nbytes + 2 * PAGE)
        return total

    def restore(self, folder: Path) -> int:
        """Fill everything from `folder` (saved by any number of ranks); the step.

        A rank that the saving run did not have draws from a fresh seed, a function of its own and the step.
        An average or a guard's window that is
        not in the checkpoint (or another size) starts anew. Raises CheckpointError.
        """
        create_state(self.optimizer)
        state, saved = self.tensors(), tensors_of(folder)
        optional = {name for name in state if name.startswith("rng_")}
        optional |= _without_state(self.module, self.optimizer, set(saved))
        averages = {name for name in state if name.startswith("ema.")}
        fresh_average = bool(averages) and not averages & set(saved)
        if fresh_average:
            LOG.warning("%s has no averaged weights: policy.ema starts from the weights there", folder)
            optional |= averages
        copies = {name for name in state if name.startswith("reference.")}
        if copies and not copies & set(saved):
            LOG.warning("%s has no reference model: it is the one that the recipe names", folder)
            optional |= copies
        if "guard" in state and ("guard" not in saved or saved["guard"].size != state["guard"].shape):
            LOG.warning("%s has no losses for policy.guard (or another window): it starts anew", folder)
            del state["guard"]
        if "data_state" in state:  # JSON, of another length each time
            size = saved["data_state"].size if "data_state" in saved else state["data_state"].shape
            state["data_state"] = torch.empty(size, dtype=torch.uint8)
            optional.add("data_state")
        loaded = load_into(folder, state, optional=frozenset(optional))
        if "frozen" in loaded and bytes(state["frozen"].tolist()) != self.frozen:
            raise CheckpointError(
                f"{folder} was trained over frozen weights of other files than the model's are now; "
                "put the model's folder back as it was"
            )
        if self.ema is not None and fresh_average:
            self.ema.restart()
        if self.guard is not None and "guard" in loaded:
            self.guard.restore(state)
        if f"rng_{self.rank}" in loaded:
            torch.set_rng_state(state[f"rng_{self.rank}"])
        else:
            torch.manual_seed((torch.initial_seed() * 1_000_003 + int(state["step"])) % 2**63)
        if f"rng_cuda_{self.rank}" in loaded:
            torch.cuda.set_rng_state(state[f"rng_cuda_{self.rank}"])
        step = int(state["step"].item())
        if self.data is not None:
            if "data_state" in loaded:
                self.data.load_state(bytes(state["data_state"].tolist()))
            else:
                self.data.start_at(step)
        return step


def _without_state(module: nn.Module, optimizer: torch.optim.Optimizer, names: set[str]) -> set[str]:
    """Forget the fresh optimizer state of parameters that have none among the saved `names`; its names.

    The optimizer makes state at a parameter's first gradient. Some never get one: a vision tower that
    trains on text alone, an expert that no token went to.
    """
    saved = {name.rpartition(".")[0] for name in names if name.startswith("optim.")}
    forgotten: set[str] = set()
    if not saved:
        return forgotten  # no state at all is no accident of the data: the load says what lacks
    for name, parameter in module.named_parameters():
        if f"optim.{name}" not in saved:
            forgotten |= {f"optim.{name}.{key}" for key in optimizer.state.pop(parameter, {})}
    return forgotten
