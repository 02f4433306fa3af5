"""The default trainer: any Hugging Face causal LM under FSDP2, with SFT or GRPO."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_rl.algorithms.base import Algorithm, LossOutput
from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.bus.messages import CheckpointSaved, ModelExported, TrainStep
from hpc_rl.checkpoint.export import Export, ExportError
from hpc_rl.checkpoint.saver import Saver, SaveResult
from hpc_rl.data.rows import load_rows
from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.folder import load_tokenizer, model_folder
from hpc_rl.models.hf.model import HfModel, build, check_parallel
from hpc_rl.policy import process_group
from hpc_rl.policy.batching import PackedBatch, pack_samples
from hpc_rl.policy.optimizer import clip_gradients, learning_rate, make_optimizer
from hpc_rl.policy.sft_data import SftData, total_steps
from hpc_rl.policy.state import restore, training_state
from hpc_rl.policy.trainer import NonFiniteError, TrainerContext
from hpc_rl.recipe.extensions import registry
from hpc_rl.types import TrainSample

EXPORT_LIMIT_S = 1800.0


class Fsdp2Trainer:
    """See `Trainer`. One optimizer step per command; gradients add up over its micro-batches."""

    model: HfModel
    optimizer: torch.optim.Optimizer
    algorithm: Algorithm

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
        self.saver = Saver(self.rank, self.world_size, token)
        self.exports: list[tuple[int, str, float, Export]] = []
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
        self.model = build(recipe.model, parallel)
        self.optimizer = make_optimizer(self.model.module, recipe.policy.optimizer)
        self.algorithm = self._make_algorithm()
        self._count_steps()
        newest = self.context.run_dir.latest_complete()
        if newest is not None:
            folder = self.context.run_dir.checkpoint(newest) / "policy"
            self.step = restore(folder, self.model.module, self.optimizer, self.rank)
        return self.step

    def info(self) -> dict[str, str]:
        return {
            "total_steps": str(self.total_steps),
            "parameters": str(self.model.num_parameters()),
            "model": type(self.model.module).__name__,
            "device": str(self.device),
        }

    def _make_algorithm(self) -> Algorithm:
        options = dict(self.recipe.algorithm)
        name = str(options.get("name", "sft" if self.recipe.kind == "sft" else "grpo"))
        algorithms = registry("algorithms")
        algorithm: Algorithm = algorithms.load(name)(algorithms.config(name, options))
        return algorithm

    def _count_steps(self) -> None:
        policy, spec = self.recipe.policy, self.recipe.data.train
        if self.recipe.kind == "sft":
            rows = load_rows(spec, self.context.run_dir.root)
            tokenizer = load_tokenizer(self.recipe.model)
            self.sft = SftData(rows, spec, tokenizer, policy, self.recipe.seed, self.data_parallel)
            self.total_steps = self.sft.total_steps
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
        if self.sft is not None:
            micro_batches, denominator = self.sft.micro_batches(command.step, self.dp_rank)
        else:
            micro_batches = [micro_batch.samples for micro_batch in command.micro_batches]
            denominator = command.denominator
            if denominator == 0:  # nothing to train on, on any rank: not even momentum may move the weights
                self.step = command.step
                return {"train/skipped": 1.0}
        rate = learning_rate(self.recipe.policy.optimizer, command.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        totals, maxima, bad = self._forward_backward(micro_batches, denominator)
        parameters = list(self.model.module.parameters())
        norm = clip_gradients(parameters, self.recipe.policy.optimizer.clip_norm)
        metrics = self._reduce(totals, maxima, bad, norm, command.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = command.step
        return metrics | {"train/lr": rate}

    def _forward_backward(
        self, micro_batches: list[list[TrainSample]], denominator: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        """Gradients of all micro-batches; totals and maxima of this rank, and samples with bad losses."""
        totals: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        losses = []
        for number, samples in enumerate(micro_batches):
            if self.model.sharded:
                # HSDP: replicas agree once, after the last micro-batch.
                self.model.module.set_requires_all_reduce(number == len(micro_batches) - 1)
            batch = pack_samples(samples, denominator, self.device)
            output = self._loss(batch)
            # FSDP averages over the data-parallel ranks; our shares of the loss add up.
            (output.loss * (self.data_parallel if self.model.sharded else 1)).backward()
            losses.append(output.loss.detach())
            for name, value in output.sums.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
            for name, value in output.maxima.items():
                maxima[name] = torch.maximum(maxima.get(name, value), value).detach()
            sequences = torch.tensor(float(len(samples)), dtype=torch.float64, device=self.device)
            totals["sequences"] = totals.get("sequences", 0.0) + sequences
        stacked = torch.stack(losses)
        totals["loss"] = stacked.double().sum()
        bad = [
            f"{sample.ordinal}.{sample.sample}"
            for number in torch.nonzero(~torch.isfinite(stacked)).flatten().tolist()
            for sample in micro_batches[number]
        ]
        return totals, maxima, bad

    def _loss(self, batch: PackedBatch) -> LossOutput:
        logits = self.model.logits(batch.input_ids, batch.position_ids, batch.keep, batch.media)
        log_probs, entropy = token_log_probs(
            logits, batch.tokens.targets, self.algorithm.temperature, self.algorithm.needs_entropy
        )
        return self.algorithm.loss(batch.tokens, log_probs, entropy)

    def _reduce(
        self,
        totals: dict[str, Tensor],
        maxima: dict[str, Tensor],
        bad: list[str],
        norm: Tensor,
        step: int,
    ) -> dict[str, float]:
        """Totals over all ranks as metrics. Raises NonFiniteError on every rank if any has a bad loss."""
        names, tops = sorted(totals), sorted(maxima)
        flags = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        flags[self.rank] = float(bool(bad))
        # The ranks of one tensor-parallel group count the same tokens.
        sums = torch.cat([torch.stack([totals[name] for name in names]) / self.tp, flags])
        largest = torch.stack([maxima[name].double() for name in tops]) if tops else sums[:0]
        if self.world_size > 1:
            dist.all_reduce(sums)
            if tops:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        values = dict(zip(names, sums.tolist(), strict=False))
        grad_norm = float(norm)
        culprits = torch.nonzero(sums[len(names) :]).flatten().tolist()
        if culprits or not math.isfinite(grad_norm):
            what = f"samples {', '.join(bad[:16])}" if bad else f"policy rank(s) {culprits}"
            if not culprits:
                what = "the gradient only (the losses are finite)"
            raise NonFiniteError(f"step {step}: the loss is not finite; in {what}")
        tokens = max(values["tokens"], 1.0)
        metrics = {"train/loss": values["loss"], "train/grad_norm": grad_norm}
        metrics["train/tokens"] = values["tokens"]
        metrics["train/sequences"] = values["sequences"]
        for name in names:
            if name not in ("loss", "tokens", "sequences"):
                metrics[f"train/{name}"] = values[name] / tokens
        metrics |= {f"train/{name}": value for name, value in zip(tops, largest.tolist(), strict=True)}
        return metrics

    # --- weights, checkpoints, exports ---------------------------------------------------------------
    def source(self) -> HfModel:
        return self.model

    def stage_checkpoint(self, step: int, folder: Path, sync: bool) -> float:
        if step != self.step:
            raise ValueError(f"a checkpoint of step {step} was commanded after step {self.step}")
        state = training_state(self.model.module, self.optimizer, step, self.rank)
        began = time.monotonic()
        self.saver.stage(step, folder, state)
        if sync:
            self._saved = self.saver.wait()
        return time.monotonic() - began

    def export(self, step: int, label: str, folder: Path) -> None:
        began = time.monotonic()
        if self.rank != 0:
            for _ in self.model.buckets(512 << 20):
                pass
            return
        spec = self.recipe.model
        tokenizer = model_folder(spec.tokenizer) if spec.tokenizer is not None else None
        export = Export(folder, self.model.folder, tokenizer, self.model.file_dtype)
        export.feed(self.model)
        self.exports.append((step, label, began, export))

    def poll(self) -> Iterator[CheckpointSaved | ModelExported]:
        saved, self._saved = [*self._saved, *self.saver.poll()], []
        for result in saved:
            if self.rank == 0:
                yield CheckpointSaved(result.step, result.seconds, result.error)
        for entry in [entry for entry in self.exports if entry[3].done]:
            self.exports.remove(entry)
            yield self._exported(*entry, wait_s=0.0)

    def finish(self) -> Iterator[CheckpointSaved | ModelExported]:
        self._saved += self.saver.wait()
        for entry in list(self.exports):
            self.exports.remove(entry)
            yield self._exported(*entry, wait_s=EXPORT_LIMIT_S)
        yield from self.poll()

    def _exported(self, step: int, label: str, began: float, export: Export, wait_s: float) -> ModelExported:
        try:
            path, error = str(export.join(wait_s)), ""
        except ExportError as failed:
            path, error = str(export.target), str(failed)
        return ModelExported(step, label, path, time.monotonic() - began, error)

    def close(self) -> None:
        self.saver.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _rank_seed(seed: int, rank: int) -> int:
    """Different on every rank, the same in every run; 2**31 - 1 is prime, so no two small ranks meet."""
    return (seed * 1_000_003 + rank * 7_919 + 1) % (2**31 - 1)
