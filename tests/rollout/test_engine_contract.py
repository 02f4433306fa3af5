"""The contract of every rollout engine, against real engines: `hf` and `vllm`.

One engine per kind lives through all tests of this file, in this order; the last ones break it.
Reference log-probs are a plain Transformers fp32 forward without a cache.
"""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from hpc_rl.recipe.extensions import registry
from hpc_rl.rollout.engine import (
    Engine,
    EngineError,
    EngineSettings,
    PromptError,
    Sample,
    TransferSettings,
    make_engine,
)
from hpc_rl.types import EngineLoad, Sampling
from hpc_rl.weights.gloo import GlooTransport
from hpc_rl.weights.protocol import PushResult, WeightSource, WeightTransferError
from tests.tiny_models import EOS, FileSource, save_checkpoint

pytestmark = [
    pytest.mark.redis,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(180, func_only=True),
]
T = TypeVar("T")
PROMPT = [5, 6, 7, 8, 9]
LONG = Sampling(temperature=0.7, top_p=1.0, max_tokens=300, seed=11)
SHORT = Sampling(temperature=0.7, top_p=1.0, max_tokens=12, seed=3)


@dataclass
class Harness:
    """An engine, its event loop, and the policy's end of the weight transfer."""

    name: str
    runner: asyncio.Runner
    engine: Engine
    bus_file: Path
    folders: dict[int, Path]  # version -> checkpoint with its weights
    attempt: int  # one of its own: transfer groups meet under it in the Redis that all engines share
    models: dict[int, Any] = field(default_factory=dict)
    sender: Any = None
    changes: bool = True  # pushes hold what changed, for who has the version before

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def log_probs(
        self, version: int, prompt: list[int], tokens: list[int], temperature: float
    ) -> torch.Tensor:
        if version not in self.models:
            folder = self.folders[version]
            self.models[version] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits = self.models[version](ids).logits[0].float() / temperature
        return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[
            :, 0
        ]

    def push(
        self, version: int, source: WeightSource, timeout_s: float = 30.0
    ) -> tuple[threading.Thread, list]:
        """Send in a thread, as the policy process would."""
        if self.sender is None:
            self.sender = GlooTransport.sender(
                self.bus_file,
                attempt=self.attempt,
                workers=1,
                bucket_bytes=1 << 20,
                timeout_s=timeout_s,
                keep=True,
                changes=self.changes,
            )
        results: list[PushResult] = []
        thread = threading.Thread(target=lambda: results.append(self.sender.push(version, source, [0], [0])))
        thread.start()
        return thread, results

    async def update(
        self, version: int, source: WeightSource | None = None, early: bool = False
    ) -> PushResult:
        thread, results = self.push(version, source or FileSource(self.folders[version]))
        if early:
            await self.engine.fetch_weights(version, 30.0)
            assert self.engine.version != version
        await self.engine.pause()
        try:
            report = await self.engine.receive_weights(version, 30.0)
        finally:
            await asyncio.to_thread(thread.join, 40)
        await self.engine.resume()
        assert report.version == version
        assert report.tensors == len(FileSource(self.folders[version]).tensors)
        return results[0]


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def harness(
    request: pytest.FixtureRequest, bus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Harness]:
    root = tmp_path_factory.mktemp(request.param)
    # tied embeddings: vLLM's CPU head keeps a repacked copy that an update must refresh
    folders = {version: save_checkpoint(root / str(version), seed=version) for version in range(4)}
    attempt = ["hf", "vllm"].index(request.param)
    settings = EngineSettings(
        model=str(folders[0]),
        options=registry("engines").config_class(request.param)(),
        dtype="float32",
        max_model_len=400,
        transfer=TransferSettings(bus_file, attempt, 0, 0, keep=True),
    )
    with asyncio.Runner() as runner:
        engine = make_engine(request.param, settings)
        runner.run(engine.start())
        yield Harness(request.param, runner, engine, bus_file, folders, attempt)
        runner.run(engine.close())


def check_spans(sample: Sample) -> None:
    assert len(sample.log_probs) == len(sample.token_ids)
    edges = [0] + [span.end for span in sample.spans]
    assert [span.start for span in sample.spans] == edges[:-1]
    assert edges[-1] == len(sample.token_ids)


def check_log_probs(harness: Harness, sample: Sample, temperature: float, prompt: list[int] = PROMPT) -> None:
    """The trainer-sampler mismatch gate: every token against the weights that its span names."""
    differences = []
    for span in sample.spans:
        expected = harness.log_probs(span.version, prompt, sample.token_ids, temperature)
        differences.append(
            expected[span.start : span.end] - torch.tensor(sample.log_probs[span.start : span.end])
        )
    difference = torch.cat(differences).abs()
    assert difference.mean() < 1e-6
    assert difference.max() < 1e-5


def test_log_probs_spans_and_finish(harness: Harness) -> None:
    samples = harness.run(harness.engine.generate(PROMPT, SHORT, 4, "a"))
    assert len(samples) == 4
    for sample in samples:
        check_spans(sample)
        check_log_probs(harness, sample, SHORT.temperature)
        assert [span.version for span in sample.spans] == [0]
        if sample.token_ids[-1] == EOS:
            assert sample.finish == "stop"
        else:
            assert sample.finish == "length"
            assert len(sample.token_ids) == SHORT.max_tokens
    assert len({tuple(sample.token_ids) for sample in samples}) == 4


def test_a_seed_reproduces_beside_other_traffic(harness: Harness) -> None:
    async def twice() -> tuple[list[Sample], list[Sample], list[Sample]]:
        first = await harness.engine.generate(PROMPT, SHORT, 3, "s1")
        others = [harness.engine.generate([20 + i, 21], SHORT, 2, f"o{i}") for i in range(3)]
        second, *_ = await asyncio.gather(harness.engine.generate(PROMPT, SHORT, 3, "s2"), *others)
        seed = Sampling(SHORT.temperature, 1.0, SHORT.max_tokens, SHORT.seed + 1)
        return first, second, await harness.engine.generate(PROMPT, seed, 1, "s3")

    first, second, shifted = harness.run(twice())
    assert [s.token_ids for s in first] == [s.token_ids for s in second]
    assert shifted[0].token_ids == first[1].token_ids  # sample i has seed + i


def test_end_of_sequence_and_greedy(harness: Harness) -> None:
    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=6, seed=0)
    one, two = harness.run(harness.engine.generate(PROMPT, greedy, 2, "g"))
    assert one.token_ids == two.token_ids
    model = AutoModelForCausalLM.from_pretrained(harness.folders[0], dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + one.token_ids])).logits[0]
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == one.token_ids
    hot = Sampling(temperature=1.5, top_p=1.0, max_tokens=380, seed=0)  # 1 token in ~500 is the end
    samples = harness.run(harness.engine.generate(PROMPT, hot, 8, "hot"))
    ended = [s for s in samples if s.finish == "stop"]
    assert ended
    for sample in ended:
        assert sample.token_ids.index(EOS) == len(sample.token_ids) - 1


def test_more_prompt_tokens_at_once_than_one_batch_holds(harness: Harness) -> None:
    """Seeded requests whose prompts do not fit into one scheduler step must not be cut into pieces."""

    async def many() -> list[list[Sample]]:
        prompts = [[10 + (7 * i + j) % 400 for j in range(350)] for i in range(20)]
        return await asyncio.gather(
            *(harness.engine.generate(prompt, SHORT, 2, f"m{i}") for i, prompt in enumerate(prompts))
        )

    answers = harness.run(many())
    assert all(len(samples) == 2 for samples in answers)


def test_top_p_is_renormalised(harness: Harness) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.5, max_tokens=1, seed=1)
    samples = harness.run(harness.engine.generate(PROMPT, sampling, 16, "p"))
    model = AutoModelForCausalLM.from_pretrained(harness.folders[0], dtype=torch.float32)
    with torch.no_grad():
        probs = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    ordered, index = probs.sort(descending=True)
    kept = int((ordered.cumsum(0) - ordered < 0.5).sum())
    mass = ordered[:kept].sum()
    for sample in samples:
        token = sample.token_ids[0]
        assert token in index[:kept].tolist()
        assert abs(sample.log_probs[0] - float((probs[token] / mass).log())) < 1e-4


def test_score_and_bad_prompts(harness: Harness) -> None:
    ids = [*PROMPT, 30, 31, 32]
    scores = harness.run(harness.engine.score(ids))
    assert torch.allclose(torch.tensor(scores), harness.log_probs(0, ids[:1], ids[1:], 1.0), atol=1e-5)
    with pytest.raises(PromptError, match="max_model_len"):
        harness.run(harness.engine.generate([7] * 400, SHORT, 1, "long"))
    with pytest.raises(PromptError):
        harness.run(harness.engine.generate([100_000], SHORT, 1, "vocab"))
    tight = harness.run(harness.engine.generate([7] * 395, LONG, 1, "tight"))
    assert len(tight[0].token_ids) <= 5


def test_abort_gives_what_there_is(harness: Harness) -> None:
    async def aborted() -> list[Sample]:
        task = asyncio.create_task(harness.engine.generate(PROMPT, LONG, 2, "x"))
        await asyncio.sleep(0.1)
        await harness.engine.abort("x")
        return await asyncio.wait_for(task, 20)

    samples = harness.run(aborted())
    assert "abort" in {sample.finish for sample in samples}
    for sample in samples:
        check_spans(sample)


def test_load_says_what_runs_and_what_waits(harness: Harness) -> None:
    async def scenario() -> tuple[EngineLoad, EngineLoad]:
        tasks = [
            asyncio.create_task(harness.engine.generate(PROMPT, SHORT, 2, f"load-{i}")) for i in range(3)
        ]
        most = EngineLoad()
        while not all(task.done() for task in tasks):
            now = harness.engine.load()
            if now.running + now.waiting > most.running + most.waiting:
                most = now
            await asyncio.sleep(0.001)
        return most, harness.engine.load()

    most, after = harness.run(scenario())
    assert 2 <= most.running <= most.running + most.waiting <= 6
    assert (after.running, after.waiting) == (0, 0)
    assert (most.kv_used > 0) == (harness.name == "vllm") and most.kv_used < 1


def test_update_in_flight(harness: Harness) -> None:
    """Tokens before the boundary are those of the old weights, after it of the new ones."""

    async def updated() -> tuple[list[Sample], PushResult]:
        task = asyncio.create_task(harness.engine.generate(PROMPT, LONG, 3, "u"))
        await asyncio.sleep(0.15)
        result = await harness.update(1)
        assert not task.done()
        return await task, result

    samples, result = harness.run(updated())
    assert result.failed == {}
    assert harness.engine.version == 1
    assert any([span.version for span in sample.spans] == [0, 1] for sample in samples)
    for sample in samples:
        check_spans(sample)
        check_log_probs(harness, sample, LONG.temperature)
    fresh = harness.run(harness.engine.generate(PROMPT, SHORT, 2, "fresh"))  # no stale prefix cache
    assert {span.version for sample in fresh for span in sample.spans} == {1}
    for sample in fresh:
        check_log_probs(harness, sample, SHORT.temperature)


def test_second_update_uses_the_same_group_and_arrives_while_generation_goes_on(harness: Harness) -> None:
    async def updated() -> tuple[list[Sample], PushResult]:
        task = asyncio.create_task(harness.engine.generate(PROMPT, LONG, 2, "early"))
        await asyncio.sleep(0.1)
        result = await harness.update(2, early=True)
        return await task, result

    samples, result = harness.run(updated())
    assert result.failed == {}
    samples += harness.run(harness.engine.generate(PROMPT, SHORT, 2, "second"))
    assert samples[-1].spans[0].version == 2
    for sample, sampling in zip(samples, (LONG, LONG, SHORT, SHORT), strict=True):
        check_spans(sample)
        check_log_probs(harness, sample, sampling.temperature)


def descendants() -> list[psutil.Process]:
    """Those that live: an earlier test may have left a child that nobody waited for, or that just ends."""
    living = []
    for process in psutil.Process().children(recursive=True):
        try:
            process.cmdline()
            process.net_connections()
        except psutil.NoSuchProcess:  # a zombie, or gone
            continue
        living.append(process)
    return living


def test_an_engine_on_one_node_listens_on_loopback_only(harness: Harness) -> None:
    """Its workers have sockets of their own (vLLM's groups, ours for weights); no other host reaches them."""
    workers = [p for p in descendants() if "VLLM" in " ".join(p.cmdline())]
    assert bool(workers) == (harness.name == "vllm")
    processes = workers or [psutil.Process()]
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening, "the transfer group of the updates above listens"
    assert listening <= {"127.0.0.1", "::1"}


def test_unix_sockets_lie_in_a_folder_of_our_own(harness: Harness) -> None:
    """vLLM's processes unpickle what comes over them."""
    processes = [psutil.Process(), *descendants()]
    bound = {
        Path(connection.laddr).parent
        for process in processes
        for connection in process.net_connections(kind="unix")
        if "hpc-rl-vllm-" in str(connection.laddr)
    }
    assert len(bound) == (harness.name == "vllm")
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in bound)


LOST = "model.layers.1.self_attn.k_proj.weight"


async def push_without_k(harness: Harness) -> list[PushResult]:
    """Only q and v of a fused qkv arrive: silent in vLLM, an error here, on both sides."""
    source = FileSource(harness.folders[3])
    del source.tensors[LOST]
    await harness.engine.pause()
    thread, results = harness.push(3, source)
    with pytest.raises(WeightTransferError, match=f"not sent: {LOST}"):
        await harness.engine.receive_weights(3, 30.0)
    await asyncio.to_thread(thread.join, 40)
    return results


def test_partial_update_is_refused_and_version_stays(harness: Harness) -> None:
    results = harness.run(push_without_k(harness))
    assert list(results[0].failed) == [0]
    assert harness.engine.version == 2
    # the push was taken in whole before anything was replaced
    harness.run(harness.engine.resume())
    samples = harness.run(harness.engine.generate(PROMPT, SHORT, 1, "old"))
    check_log_probs(harness, samples[0], SHORT.temperature)


def test_partial_update_bucket_by_bucket_leaves_an_engine_that_refuses_to_go_on(harness: Harness) -> None:
    if harness.name == "hf":
        return  # it never loads bucket by bucket
    engine: Any = harness.engine
    transfer = replace(engine.settings.transfer, keep=False)
    engine.settings = replace(engine.settings, transfer=transfer)
    results = harness.run(push_without_k(harness))
    assert list(results[0].failed) == [0]
    assert engine.version == 2
    with pytest.raises(EngineError, match="cannot resume with mixed weights"):
        harness.run(engine.resume())
