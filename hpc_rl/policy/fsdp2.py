"""The default trainer: any Hugging Face causal LM under FSDP2, with SFT or GRPO."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from hpc_rl.algorithms.base import Algorithm
from hpc_rl.bus.messages import CheckpointSaved, ModelExported, TrainStep
from hpc_rl.checkpoint.saver import Saver, SaveResult
from hpc_rl.data.rows import load_rows
from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.model import HfModel, build, check_parallel
from hpc_rl.models.hf.rows import packed
from hpc_rl.policy import process_group
from hpc_rl.policy.ema import WeightAverage
from hpc_rl.policy.exports import EXPORT_LIMIT_S, Exports
from hpc_rl.policy.guard import SpikeGuard, name_samples
from hpc_rl.policy.optimizer import clip_gradients, make_optimizer, schedule_factor, set_rates
from hpc_rl.policy.preference import evaluate_pairs
from hpc_rl.policy.profiling import StepProfiler
from hpc_rl.policy.reference import Reference, make_reference
from hpc_rl.policy.restore import Restorer, stage_file
from hpc_rl.policy.rl_media import RlMedia
from hpc_rl.policy.sft_data import SftData, total_steps
from hpc_rl.policy.sft_open import open_sft_data
from hpc_rl.policy.state import TrainingState
from hpc_rl.policy.step import Ranks, Reduced, SampleId, StepRunner, Totals
from hpc_rl.policy.throughput import StepTimer, throughput_of
from hpc_rl.policy.trainer import BadStepError, NonFiniteError, SpikeError, TrainerContext
from hpc_rl.policy.updates import RolloutUpdates, Update, together
from hpc_rl.recipe.extensions import registry
from hpc_rl.weights.protocol import WeightSource


class Fsdp2Trainer:
    """See `Trainer`. One step per command; gradients add up over the micro-batches of an update."""

    model: HfModel
    optimizer: torch.optim.Optimizer
    algorithm: Algorithm
    runner: StepRunner
    ema: WeightAverage | None = None
    reference: Reference | None = None
    rollouts: RolloutUpdates | None = None
    media: RlMedia | None = None

    def __init__(self, context: TrainerContext) -> None:
        self.context, self.recipe = context, context.recipe
        self.rank, self.world_size = context.rank, context.world_size
        mesh = context.plan.mesh
        check_parallel(mesh.model_dump())
        self.data_parallel = mesh.dp_replicate * mesh.dp_shard
        if self.data_parallel * mesh.tp != self.world_size:
            raise ValueError(f"a mesh of {mesh.world_size} ranks in {self.world_size} processes")
        # Neighbouring ranks are one tensor-parallel group: they share a node, and they see the same data.
        self.dp_rank, self.tp = self.rank // mesh.tp, mesh.tp
        self.total_steps = 0
        self.sft: SftData | None = None
        token = f"{context.attempt}.{context.incarnation}"
        self.saver = Saver(self.rank, self.world_size, token, stage=stage_file(context))
        self.exports = Exports(self.recipe.model, self.rank, self.world_size, token)
        self.guard = SpikeGuard(self.recipe.policy.guard)
        profiles = context.run_dir.root / "profile"
        self.profiler = StepProfiler(self.recipe.policy.profile, profiles, self.rank)
        self._saved: list[SaveResult] = []  # ended, not reported yet
        self.step = 0

    # --- start ---------------------------------------------------------------------------------------
    def load(self) -> int:
        recipe, mesh = self.recipe, self.context.plan.mesh
        self.device = process_group.local_device(self.context)
        self._store = process_group.join(self.context, self.device)
        if recipe.checkpoint.enabled:
            self.saver.prepare()
        torch.manual_seed(_rank_seed(recipe.seed, self.rank))
        dtype = getattr(torch, recipe.model.dtype)
        parallel = ParallelSpec(
            self.device,
            dtype,
            dp_replicate=mesh.dp_replicate,
            dp_shard=mesh.dp_shard,
            tp=mesh.tp,
            activation_checkpointing=recipe.policy.activation_checkpointing,
            cpu_offload=recipe.policy.cpu_offload,
        )
        self.model = build(recipe.model, parallel, recipe.seed)
        if recipe.rollout is not None:
            self.source()  # what cannot be pushed as the recipe says is refused before the first step
        self.optimizer = make_optimizer(self.model.module, recipe.policy.optimizer)
        self.algorithm = self._make_algorithm()
        ranks = Ranks(self.rank, self.world_size, self.data_parallel, self.tp, self.device)
        self.reference = make_reference(recipe, self.model, parallel, self.algorithm.temperature)
        self.runner = StepRunner(self.model, self.algorithm, ranks, self.model.sharded, self.reference)
        if recipe.kind == "rl":
            self.rollouts = self._make_rollouts()
            self.media = RlMedia(recipe, self.context.run_dir, ranks, needs_media=self.model.needs_media)
        if recipe.policy.ema is not None:
            self.ema = WeightAverage(self.model.module, recipe.policy.ema)
        self.timer = StepTimer(self.device)
        self.throughput = throughput_of(self.model, self.device, recipe.model.dtype, self.world_size)
        self._count_steps()
        context = self.context
        restorer = Restorer(
            context.run_dir, context.attempt, self.rank, self.device, self._state(0).restore, context.log
        )
        self.step = restorer.newest()
        if self.sft is not None:  # with epochs the steps left follow from the position
            self.total_steps = self.sft.total_steps
        if recipe.checkpoint.enabled:
            self.saver.prepare(self._state(0).staging_bytes())
        return self.step

    def info(self) -> dict[str, str]:
        return {
            "total_steps": str(self.total_steps),
            "parameters": str(self.model.num_parameters()),
            "model": type(self.model.module).__name__,
            "device": str(self.device),
            "eval_rows": str(self.sft.eval_rows if self.sft is not None else 0),
        }

    def _make_algorithm(self) -> Algorithm:
        options = dict(self.recipe.algorithm)
        name = str(options.get("name", {"sft": "sft", "preference": "dpo"}.get(self.recipe.kind, "grpo")))
        algorithms = registry("algorithms")
        algorithm: Algorithm = algorithms.load(name)(algorithms.config(name, options))
        return algorithm

    def _make_rollouts(self) -> RolloutUpdates:
        options = dict(self.recipe.algorithm)
        config = registry("algorithms").config(str(options.get("name", "grpo")), options)
        return RolloutUpdates(self.runner, config, self.recipe.policy.updates, self.recipe.seed)

    def _count_steps(self) -> None:
        policy, spec = self.recipe.policy, self.recipe.data.train
        if self.recipe.supervised:
            self.sft = open_sft_data(
                self.recipe,
                self.context.run_dir,
                self.runner.ranks,
                needs_picture=self.model.needs_media,
                packed=self.model.rows is packed,
                store=process_group.data_store(self.context),
            )
        elif policy.steps is not None:
            self.total_steps = policy.steps
        else:
            group_size = int(self.recipe.algorithm.get("group_size", 8))
            self.total_steps = total_steps(
                policy, len(load_rows(spec, self.context.run_dir.root)), group_size
            )

    # --- the step --------------------------------------------------------------------------------------
    def train_step(self, command: TrainStep) -> dict[str, float]:
        if command.step != self.step + 1:
            raise ValueError(f"step {command.step} was commanded after step {self.step}")
        self.profiler.before(command.step)
        self.timer.begin()
        updates = self._updates(command)
        if not updates:  # nothing to train on, on any rank: not even momentum may move the weights
            self.step = command.step
            self.profiler.after(command.step)
            return {"train/skipped": 1.0} | (self.sft.skipped(command.step) if self.sft is not None else {})
        self.timer.mark("data")
        options = self.recipe.policy.optimizer
        factor = schedule_factor(options, command.step, self.total_steps)
        set_rates(self.optimizer, factor)
        reduced = together([self._update(command.step, update) for update in updates])
        self.step = command.step
        if self.ema is not None:
            self.ema.update(self.step)
        if self.reference is not None:
            self.reference.after_step(self.step)
        self.timer.mark("optimizer")
        metrics = reduced.metrics() | {"train/lr": options.lr * factor} | self.timer.metrics()
        if self.sft is not None:
            metrics |= self.sft.metrics()
        metrics |= self.throughput.metrics(reduced.sums, self.timer.seconds())
        self.profiler.after(command.step)
        return metrics

    def _updates(self, command: TrainStep) -> list[Update]:
        """Of this step; none if there is nothing to train on."""
        if self.sft is not None:
            micro_batches, denominator = self.sft.micro_batches(command.step, self.dp_rank)
            return [Update(micro_batches, denominator)] if denominator > 0 else []
        assert self.rollouts is not None
        if self.media is not None:
            self.media.fill([micro_batch.samples for micro_batch in command.micro_batches])
        return self.rollouts.of(command)

    def _update(self, step: int, update: Update) -> Reduced:
        """One optimizer update, and its numbers over all ranks."""
        totals = self.runner.forward_backward(update.micro_batches, update.denominator, update.fixed)
        self.timer.mark("forward_backward")
        norm = clip_gradients(list(self.model.module.parameters()), self.recipe.policy.optimizer.clip_norm)
        reduced = self.runner.reduce(totals, norm)
        self.timer.mark("reduce")
        self._check(step, totals, reduced)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return reduced

    def _check(self, step: int, totals: Totals, reduced: Reduced) -> None:
        """Before an update changes a weight. All ranks see the same numbers, and stop together or not at all.

        Raises NonFiniteError or SpikeError.
        """
        kind: type[BadStepError] = NonFiniteError
        if reduced.bad_ranks:
            what, samples = "the loss is not finite", totals.bad_samples()
        elif not reduced.finite:
            what, samples = "the gradient is not finite (the losses are)", totals.all_samples()
        else:
            verdict = self.guard.judge(reduced.sums["loss"])
            if verdict is None:
                return
            kind, what, samples = SpikeError, verdict, totals.all_samples()
        raise kind(f"step {step}: {what}; {self._blame(self.runner.gather_samples(samples))}")

    def _blame(self, samples: list[SampleId]) -> str:
        """The samples of a bad step in words, with their rows, and where the run can go on from."""
        words = f"samples {name_samples(samples)}"
        if self.sft is not None and samples:
            rows = sorted({self.sft.row(ordinal) for ordinal, _ in samples})
            words += f" (rows {name_samples([(row, 0) for row in rows])} of {self.recipe.data.train.path})"
        newest = self.context.run_dir.latest_complete()
        kept = "there is no checkpoint" if newest is None else "the newest complete checkpoint is "
        return f"{words}; {kept}{self.context.run_dir.checkpoint(newest) if newest is not None else ''}"

    def evaluate(self, step: int) -> dict[str, float]:
        if step != self.step:
            raise ValueError(f"an evaluation at step {step} was commanded after step {self.step}")
        assert self.sft is not None, "RL has no validation loss; it evaluates by its rewards"
        with self._averaged():
            micro_batches = self.sft.eval_micro_batches(self.dp_rank)
            if self.recipe.kind == "preference":
                return evaluate_pairs(self.runner, micro_batches)
            return self.runner.evaluate(micro_batches)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if the recipe asks for an average."""
        if self.ema is None:
            yield
            return
        with self.ema.swapped():
            yield

    # --- weights, checkpoints, exports ---------------------------------------------------------------
    def source(self) -> WeightSource:
        return self._source

    @functools.cached_property
    def _source(self) -> WeightSource:
        rollout = self.recipe.rollout
        if self.recipe.model.lora is None or rollout is None or rollout.weights.lora != "adapter":
            return self.model
        from hpc_rl.models.hf.adapted import AdaptedModel
        from hpc_rl.policy.adapter_source import AdapterSource

        assert isinstance(self.model, AdaptedModel)
        return AdapterSource(self.model)

    def stage_checkpoint(self, step: int, folder: Path, sync: bool) -> float:
        if step != self.step:
            raise ValueError(f"a checkpoint of step {step} was commanded after step {self.step}")
        began = time.monotonic()
        self.saver.stage(step, folder, self._state(step).tensors())
        if sync:
            self._saved += self.saver.wait()
        return time.monotonic() - began

    def _state(self, step: int) -> TrainingState:
        # Read from the model's files only where the checkpoint leaves weights to them.
        partly = any(not p.requires_grad for p in self.model.module.parameters())
        frozen = self.model.fingerprint if partly else b""
        reference = self.reference.state() if self.reference is not None else {}
        return TrainingState(
            self.model.module,
            self.optimizer,
            self.ema,
            self.guard,
            step,
            self.rank,
            frozen,
            self.sft,
            reference,
        )

    def export(self, step: int, label: str, folder: Path) -> None:
        with self._averaged():
            self.exports.start(self.model, step, label, folder)

    def poll(self) -> Iterator[CheckpointSaved | ModelExported]:
        saved, self._saved = [*self._saved, *self.saver.poll()], []
        for result in saved:
            if self.rank == 0:
                yield CheckpointSaved(result.step, result.seconds, result.error)
        yield from self.exports.ended()

    def finish(self) -> Iterator[CheckpointSaved | ModelExported]:
        self._saved += self.saver.wait()
        yield from self.exports.ended(EXPORT_LIMIT_S)
        yield from self.poll()

    def close(self) -> None:
        self.profiler.close()
        self.saver.close()
        self.exports.close()
        if self.sft is not None:
            self.sft.close()
        if self.media is not None:
            self.media.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _rank_seed(seed: int, rank: int) -> int:
    """Different on every rank, the same in every run; 2**31 - 1 is prime, so no two small ranks meet."""
    return (seed * 1_000_003 + rank * 7_919 + 1) % (2**31 - 1)
