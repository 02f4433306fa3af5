"""The loop of one replica: prompts in, scored prompt groups out, new weights between two tokens.

The inbox is read in order by one task. A `Generate` becomes a task of its own, so many groups are under
way at once; `ReceiveWeights` is carried out before the next message is read, while those groups wait
inside the engine. A bad prompt or a failing verifier costs that group or sample; an engine that fails, or
a push that leaves the weights in doubt, ends the process, and the controller starts a new incarnation.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from typing import Any

from hpc_rl.bus import messages as m
from hpc_rl.checkpoint.evaluated import use_checkpoint
from hpc_rl.rewards.pool import ScorerPool
from hpc_rl.roles import RoleProcess
from hpc_rl.rollout.dialogue import Dialogue
from hpc_rl.rollout.engine import Engine, EngineError, make_engine
from hpc_rl.rollout.episodes import EpisodeRunner
from hpc_rl.rollout.groups import GroupRunner
from hpc_rl.rollout.model_scores import ModelScores
from hpc_rl.rollout.prompts import PromptCodec
from hpc_rl.rollout.settings import engine_settings, scorer_pool, text_simulator
from hpc_rl.simulators.base import TextSimulator, simulator_config
from hpc_rl.weights.protocol import WeightTransferError

POLL_S = 1.0
LOAD_LIMIT_S = 1800.0
SYNC_MARGIN_S = 60.0
PROBE_LIMIT_S = 2.0
PROBE_TOKENS = 16
CLOSE_LIMIT_S = 20.0


class Worker:
    """One replica's work. `run` returns when told to stop and raises when the replica is lost."""

    def __init__(self, process: RoleProcess) -> None:
        self.process = process
        recipe, plan = process.recipe, process.plan
        assert recipe.rollout is not None
        self.rollout = recipe.rollout
        self._settings = engine_settings(
            recipe,
            plan,
            bus_file=process.run_dir.bus_file(process.attempt),
            attempt=process.attempt,
            replica=process.index,
            incarnation=process.incarnation,
        )
        self._engine: Engine | None = None  # made when it is known where the model is read from
        self.pool: ScorerPool = scorer_pool(recipe, plan, process.run_dir.code)
        self.models = ModelScores(recipe, process.bus, process.index, process.incarnation)
        self.simulator: TextSimulator | None = text_simulator(recipe, plan, process.run_dir.code)
        self.runner: GroupRunner | None = None  # made by _load
        self.groups: set[asyncio.Task[None]] = set()
        self.working: dict[str, asyncio.Future[m.GroupDone | m.GroupFailed]] = {}  # by the tag of a hand-out
        self.cancelled: set[str] = set()  # of these, by CancelGroups
        self.probe = math.nan
        self.failed: asyncio.Future[None] | None = None

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the engine is made by _load"
        return self._engine

    async def run(self) -> None:
        self.failed = asyncio.get_running_loop().create_future()
        try:
            await self._load()
            inbox = asyncio.create_task(self._serve(), name="inbox")
            await asyncio.wait({inbox, self.failed}, return_when=asyncio.FIRST_COMPLETED)
            if self.failed.done():
                inbox.cancel()
                self.failed.result()
            await inbox
        finally:
            await self._close()

    async def _load(self) -> None:
        process, model = self.process, self.process.recipe.model
        process.phase("load", LOAD_LIMIT_S)
        process.register(engine=self.rollout.engine)
        began = time.monotonic()
        if process.recipe.eval.checkpoint is not None:
            await asyncio.to_thread(
                use_checkpoint, process.recipe, process.run_dir, process.index, LOAD_LIMIT_S
            )
            self._settings = replace(self._settings, model=model.path, revision=None, tokenizer=None)
        tokenizer = model.tokenizer or model.path
        codec = await asyncio.to_thread(PromptCodec.load, tokenizer, model.revision, model.trust_remote_code)
        if model.stage is not None:
            from hpc_rl.models.hf.staging import staged_folder  # it imports torch, which takes seconds

            folder = await asyncio.to_thread(staged_folder, model)
            self._settings = replace(self._settings, model=str(folder))
        self._engine = make_engine(self.rollout.engine, self._settings)
        await asyncio.gather(self.engine.start(), self.pool.start())
        episodes = await self._episodes(codec)
        self.models.start()
        self.runner = GroupRunner(process, self.engine, codec, self.pool, self.models, episodes)
        self.probe = await self._probe_weights()
        seconds = time.monotonic() - began
        process.log.info("engine %s is loaded (%.1f s)", self.rollout.engine, seconds)
        process.phase("idle")
        await self._send(
            m.ReplicaReady(
                replica=process.index,
                incarnation=process.incarnation,
                version=self.engine.version,
                info={"engine": self.rollout.engine, "load_s": f"{seconds:.1f}"},
            )
        )

    async def _episodes(self, codec: PromptCodec) -> EpisodeRunner | None:
        """What plays episodes of several turns. Raises SimulatorError, or DataError for the chat template."""
        if self.simulator is None:
            return None
        await self.simulator.start()
        dialogue = Dialogue(codec, self.simulator.tools)
        return EpisodeRunner(self.engine, self.simulator, dialogue, simulator_config(self.process.recipe))

    # --- messages ----------------------------------------------------------------------------------
    async def _serve(self) -> None:
        while True:
            for message in await asyncio.to_thread(self.process.inbox.poll, POLL_S):
                match message:
                    case m.Generate():
                        self._start_group(message)
                    case m.CancelGroups():
                        self._cancel(message.tags)
                    case m.ReceiveWeights():
                        await self._receive_weights(message.version)
                    case m.Stop():
                        self.process.log.info("stopping: %s", message.reason)
                        await self._send(m.RoleStopped(role="rollout", index=self.process.index))
                        return
                    case _:
                        self.process.log.warning("a replica cannot obey %s", type(message).__name__)

    def _start_group(self, request: m.Generate) -> None:
        assert self.runner is not None
        work = asyncio.ensure_future(self.runner.answer(request))
        if request.purpose == "train":  # now: the next message may cancel it
            self.working[request.tag] = work
        task = asyncio.create_task(self._group(request, work), name=f"prompt-{request.prompt.ordinal}")
        self.groups.add(task)
        self.process.phase("generate")
        task.add_done_callback(self._group_ended)

    def _group_ended(self, task: asyncio.Task[None]) -> None:
        self.groups.discard(task)
        if not self.groups:
            self.process.phase("idle")
        if not task.cancelled() and (error := task.exception()) is not None:
            assert self.failed is not None
            if not self.failed.done():
                self.failed.set_exception(error)

    async def _send(self, *messages: Any) -> None:
        await asyncio.to_thread(self.process.send, *messages)

    # --- generation --------------------------------------------------------------------------------
    async def _group(self, request: m.Generate, work: asyncio.Future[m.GroupDone | m.GroupFailed]) -> None:
        try:
            answer = await work
        except asyncio.CancelledError:
            if request.tag not in self.cancelled:
                raise  # the process is ending
            cause = "cancelled: slower than the others of its step"
            ours = (self.process.index, self.process.incarnation)
            answer = m.GroupFailed(*ours, request.purpose, request.tag, request.prompt.ordinal, cause)
        finally:
            self.working.pop(request.tag, None)
            self.cancelled.discard(request.tag)
        if isinstance(answer, m.GroupDone):
            answer.load = self.engine.load()
        await self._send(answer)

    def _cancel(self, tags: list[str]) -> None:
        """The engine's own requests end with the task that waits for them."""
        for tag in tags:
            if tag in self.working:
                self.cancelled.add(tag)
                self.working[tag].cancel()

    # --- weights -----------------------------------------------------------------------------------
    async def _receive_weights(self, version: int) -> None:
        process, limit_s = self.process, self.rollout.weights.timeout_s
        with process.within("sync", 2 * limit_s + SYNC_MARGIN_S):
            try:
                fetching = time.monotonic()
                await self.engine.fetch_weights(version, limit_s)
                began = time.monotonic()
                await self.engine.pause()
                paused = time.monotonic() - began
                report = await self.engine.receive_weights(version, limit_s)
                await self.engine.resume()
            except (WeightTransferError, EngineError) as error:
                await self._send(m.WeightsFailed(process.index, process.incarnation, version, str(error)))
                raise
        stalled = time.monotonic() - began
        metrics = {f"weights/{name}_s": seconds for name, seconds in report.seconds.items()}
        metrics |= {
            "weights/pause_s": paused,
            "weights/stall_s": stalled,
            "weights/fetch_s": began - fetching,
        }
        metrics["weights/bytes"] = float(report.nbytes)
        probe = await self._probe_weights()
        if math.isfinite(probe):
            metrics["weights/probe_log_prob"] = probe
            if math.isfinite(self.probe):
                metrics["weights/probe_change"] = abs(probe - self.probe)
        self.probe = probe
        process.step = version
        process.log.info(
            "version %d: %d tensors, %.3f MB, generation stalled %.3f s",
            version,
            report.tensors,
            report.nbytes / 1e6,
            stalled,
        )
        applied = m.WeightsApplied(process.index, process.incarnation, version, report.tensors, metrics)
        await self._send(applied)

    async def _probe_weights(self) -> float:
        """Mean log-prob of a fixed token sequence, the same on all replicas: it moves when weights do.

        NaN when the engine is too busy to score it soon: the probe watches, the checksums prove.
        """
        size = self.engine.vocab_size
        ids = [(13 + 7919 * i) % size for i in range(PROBE_TOKENS)]
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                scores = await self.engine.score(ids)
        except TimeoutError:
            return math.nan
        return sum(scores) / len(scores)

    # --- the end -----------------------------------------------------------------------------------
    async def _close(self) -> None:
        for task in [*self.groups, *self.working.values()]:
            task.cancel()
        await asyncio.gather(*self.groups, return_exceptions=True)
        if self.runner is not None:
            self.runner.media.close()
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await self.models.close()
            await self.pool.close()
            if self.simulator is not None:
                await self.simulator.close()
            if self._engine is not None:
                await self._engine.close()


def body(process: RoleProcess) -> int:
    """What `python -m hpc_rl.rollout` runs inside its RoleProcess."""
    asyncio.run(_run(process))
    return 0


async def _run(process: RoleProcess) -> None:
    await Worker(process).run()
