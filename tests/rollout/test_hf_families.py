"""The hf engine serves what vLLM does not, and takes file names that differ from its modules' names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from hpc_rl.rollout.engine import EngineSettings, TransferSettings, make_engine
from hpc_rl.rollout.engines.config import HfOptions
from hpc_rl.types import Sampling
from hpc_rl.weights.gloo import GlooTransport
from tests.families import FAMILIES
from tests.models.contract import reference
from tests.tiny_models import FileSource, save_checkpoint
from tests.tiny_vlms import save_vlm

pytestmark = [pytest.mark.redis, pytest.mark.torch, pytest.mark.timeout(180)]


def save(folder: Path, family: str, seed: int) -> Path:
    if FAMILIES[family].vision:
        return save_vlm(folder, family, seed)
    return save_checkpoint(folder, seed, family=family)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mllama", "gemma3_vlm"])
def test_weights_arrive_under_the_names_of_the_file(family: str, bus_file: Path, tmp_path: Path) -> None:
    old, new = save(tmp_path / "old", family, 0), save(tmp_path / "new", family, 1)
    attempt = 90 + list(FAMILIES).index(family)  # one of its own in the Redis that all tests share
    settings = EngineSettings(
        model=str(old),
        options=HfOptions(),
        dtype="float32",
        transfer=TransferSettings(bus_file, attempt, 0, 1),
    )
    source = FileSource(new)
    modules = dict(reference(new).state_dict())
    assert (source.tensors.keys() - modules.keys() == set()) == (family == "gpt_oss")

    async def body() -> list[float]:
        engine = make_engine("hf", settings)
        await engine.start()
        sender = GlooTransport.sender(
            bus_file, attempt=attempt, workers=1, bucket_bytes=1 << 20, timeout_s=60.0
        )
        await engine.pause()
        push = asyncio.create_task(asyncio.to_thread(sender.push, 5, source, [0], [1]))
        report = await engine.receive_weights(5, 60.0)
        assert (await push).failed == {}
        assert report.tensors == len(source.tensors)
        await engine.resume()
        scores = await engine.score([5, 6, 7, 8])
        sampled = await engine.generate([5, 6], Sampling(1.0, 1.0, 3, 0), 2, "a")
        assert sampled[0].spans[0].version == 5
        await engine.close()
        return scores

    scores = torch.tensor(asyncio.run(body()))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = reference(new)(ids).logits
    expected = torch.log_softmax(logits, -1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(scores, expected, atol=1e-5)
