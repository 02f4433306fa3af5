"""Prompts with images and videos: the engine's log-probs are those of the packed learner, to 1e-5."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hpc_rl.policy.batching import pack_samples
from hpc_rl.rollout.engine import Engine, EngineSettings, PromptError, Sample, TransferSettings, make_engine
from hpc_rl.rollout.engines.config import HfOptions, VllmOptions
from hpc_rl.rollout.engines.vllm_media import check_expanded, media_prompt
from hpc_rl.rollout.prompts import PromptCodec
from hpc_rl.types import Sampling, TrainSample
from hpc_rl.weights.gloo import GlooTransport
from tests import vision_prompts as v
from tests.models import contract as c
from tests.tiny_models import FileSource

pytestmark = [pytest.mark.redis, pytest.mark.torch, pytest.mark.timeout(180)]
torch.set_num_threads(1)
LONG = Sampling(v.SAMPLING.temperature, 1.0, 100, 5)  # so long that a push comes between two tokens
TEMPERATURE = v.SAMPLING.temperature


@torch.no_grad()
def packed_log_probs(folder: Path, samples: Sequence[TrainSample]) -> list[torch.Tensor]:
    """Of the answers, all in one packed row of the learner."""
    model = c.build_model(folder)
    batch = pack_samples(list(samples), 1.0, c.CPU, placeholders=model.placeholders)
    found, _ = model.log_probs(batch.row, TEMPERATURE)
    return [found[batch.tokens.sequence == number] for number in range(len(samples))]


def differences(folder: Path, samples: Sequence[TrainSample], version: int = 0) -> torch.Tensor:
    """|engine - learner| of the tokens that `version` made."""
    found = []
    for ours, sample in zip(packed_log_probs(folder, samples), samples, strict=True):
        before = sample.loss_mask.index(1)
        for span in sample.spans:
            if span.version == version:
                theirs = torch.tensor(sample.log_probs[span.start : span.end])
                found.append(ours[span.start - before : span.end - before] - theirs)
    return torch.cat(found).abs()


async def sampled(
    engine: Engine, folder: Path, rows: Path, which: Sequence[int], sampling: Sampling = v.SAMPLING
) -> list[TrainSample]:
    """Three answers to each of the prompts, all generated at once."""
    make, codec = v.prompts(folder, rows), PromptCodec.load(str(folder), None, False)

    async def one(row: int) -> list[TrainSample]:
        media = None if row == v.TEXT else make(row)
        ids = codec.encode(make.messages(row) or "", v.spec_of(rows)) if media is None else media.token_ids
        samples: list[Sample] = await engine.generate(ids, sampling, 3, f"row-{row}", media)
        return [v.train_sample(media, ids, sample, row) for sample in samples]

    return [sample for some in await asyncio.gather(*(one(row) for row in which)) for sample in some]


async def push(engine: Engine, bus_file: Path, attempt: int, folder: Path, version: int) -> None:
    sender = GlooTransport.sender(bus_file, attempt=attempt, workers=1, bucket_bytes=1 << 20, timeout_s=60.0)
    await engine.pause()
    sending = asyncio.create_task(asyncio.to_thread(sender.push, version, FileSource(folder), [0], [0]))
    await engine.receive_weights(version, 60.0)
    assert (await sending).failed == {}
    await engine.resume()


def settings_of(folder: Path, bus_file: Path, attempt: int, options: object) -> EngineSettings:
    transfer = TransferSettings(bus_file, attempt, 0, 0)
    return EngineSettings(str(folder), options, dtype="float32", max_model_len=256, seed=1, transfer=transfer)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3_vlm"])
def test_the_hf_engine_samples_what_the_learner_scores(family: str, bus_file: Path, tmp_path: Path) -> None:
    """Pictures, a clip and text alone in one packed row; again, and over a push, with other weights."""
    old, new = v.save_model(tmp_path / "old", family), v.save_model(tmp_path / "new", family, 1)
    rows = v.write_rows(tmp_path / "data")
    attempt = 120 + ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3_vlm"].index(family)
    which = (v.PICTURES, v.CLIP, v.TEXT, v.TWO)

    async def body() -> tuple[list[TrainSample], list[TrainSample]]:
        engine = make_engine("hf", settings_of(old, bus_file, attempt, HfOptions(threads=1)))
        await engine.start()
        before = await sampled(engine, old, rows, which)
        under_way = asyncio.create_task(sampled(engine, old, rows, which, LONG))
        while not engine.load().running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await push(engine, bus_file, attempt, new, 4)
        after = await under_way
        await engine.close()
        return before, after

    before, after = asyncio.run(body())
    assert len(before) == 3 * len(which)
    found = differences(old, before)
    assert float(found.max()) < 1e-5
    assert float(found.mean()) < 1e-6
    assert {span.version for sample in after for span in sample.spans} == {0, 4}
    assert float(differences(new, after, 4).max()) < 1e-5


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_vllm_samples_what_the_learner_scores(family: str, bus_file: Path, tmp_path: Path) -> None:
    """As above, with vLLM; neither its encoder's cache nor its processor's outlives the push."""
    old, new = v.save_model(tmp_path / "old", family), v.save_model(tmp_path / "new", family, 1)
    for folder in (old, new):
        v.name_as_on_the_hub(folder)
    rows = v.write_rows(tmp_path / "data")
    attempt = 130 + ["qwen2_5_vl", "qwen3_vl"].index(family)
    which = (v.PICTURES, v.CLIP, v.TEXT, v.TWO)

    async def body() -> tuple[list[TrainSample], list[TrainSample]]:
        engine = make_engine("vllm", settings_of(old, bus_file, attempt, VllmOptions()))
        try:
            await engine.start()
            before = await sampled(engine, old, rows, which)
            await push(engine, bus_file, attempt, new, 4)
            return before, await sampled(engine, old, rows, which)
        finally:
            await engine.close()

    before, after = asyncio.run(body())
    found = differences(old, before)
    assert float(found.max()) < 1e-5
    assert float(found.mean()) < 1e-6
    assert {span.version for sample in after for span in sample.spans} == {4}
    assert float(differences(new, after, 4).max()) < 1e-5


def test_media_that_are_not_of_the_prompt_are_refused(tmp_path: Path) -> None:
    rows, model = v.write_rows(tmp_path / "data", clips=False), v.save_model(tmp_path / "model", "llava")
    media = v.prompts(model, rows)(v.PICTURES)
    assert len(media.token_ids) > len(media.short_ids)
    assert media.short([*media.token_ids, 7]) == [*media.short_ids, 7]
    with pytest.raises(PromptError, match="do not begin with the prompt"):
        media_prompt([5, 6], media)
    check_expanded(media.token_ids, list(media.token_ids))
    with pytest.raises(PromptError, match=r"vLLM makes 2 tokens .* 3 \(they differ from token 1 on"):
        check_expanded([1, 2, 3], [1, 3])
