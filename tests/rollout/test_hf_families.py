"""The hf engine takes file names that differ from its modules' names (mixture of experts)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hpc_rl.rollout.engine import EngineSettings, TransferSettings, make_engine
from hpc_rl.rollout.engines.config import HfOptions
from hpc_rl.types import Sampling
from hpc_rl.weights.gloo import GlooTransport
from tests.tiny_models import FileSource, save_checkpoint

pytestmark = [pytest.mark.redis, pytest.mark.torch, pytest.mark.timeout(180)]


def test_mixture_of_experts(bus_file: Path, tmp_path: Path) -> None:
    old = save_checkpoint(tmp_path / "old", 0, family="qwen3_moe")
    new = save_checkpoint(tmp_path / "new", 1, family="qwen3_moe")
    settings = EngineSettings(
        model=str(old), options=HfOptions(), dtype="float32", transfer=TransferSettings(bus_file, 9, 0, 1)
    )
    source = FileSource(new)
    assert any(".experts.3." in name for name in source.tensors)

    async def body() -> list[float]:
        engine = make_engine("hf", settings)
        await engine.start()
        sender = GlooTransport.sender(bus_file, attempt=9, workers=1, bucket_bytes=1 << 20, timeout_s=60.0)
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
        logits = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)(ids).logits
    expected = torch.log_softmax(logits, -1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(scores, expected, atol=1e-5)
