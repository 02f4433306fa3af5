"""The gate of item "numbers that are right": vLLM's log-probs are the policy's, version after version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpc_rl.models.base import ParallelSpec, Row
from hpc_rl.models.hf.model import HfModel, build
from hpc_rl.recipe.schema import Model
from hpc_rl.rollout.engine import EngineSettings, Sample, TransferSettings
from hpc_rl.rollout.engines.config import VllmOptions
from hpc_rl.types import Sampling
from hpc_rl.weights.gloo import GlooTransport
from hpc_rl.weights.protocol import PushResult, WeightTransferError
from tests.tiny_models import save_checkpoint

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]
STEPS = 50
PROMPT = [5, 6, 7, 8]


def apart(model: HfModel, samples: list[Sample], loss: bool = False) -> torch.Tensor:
    """Differences between the sampler's and the policy's log-probs, token by token; with `loss` it is also
    backpropagated through a policy gradient."""
    found = []
    for number, sample in enumerate(samples):
        ids = torch.tensor(PROMPT + sample.token_ids)
        keep = torch.arange(len(PROMPT) - 1, len(ids) - 1)
        with torch.set_grad_enabled(loss):
            ours, _ = model.log_probs(Row(ids, torch.arange(len(ids)), keep, ids[len(PROMPT) :]))
        if loss:
            (-(1.0 - number) * ours.mean()).backward()
        found.append((ours.detach() - torch.tensor(sample.log_probs)).abs())
    return torch.cat(found)


@pytest.mark.vllm
@pytest.mark.redis
@pytest.mark.slow
def test_fifty_steps_and_pushes_leave_vllm_and_the_policy_with_the_same_numbers(
    bus_file: Path, tmp_path: Path
) -> None:
    """fp32, mean < 1e-6 and max < 1e-5 at every version; weights that were not pushed are seen at once."""
    from hpc_rl.rollout.engines.vllm import VllmEngine

    torch.set_num_threads(1)
    folder = save_checkpoint(tmp_path / "model", seed=1)
    spec = ParallelSpec(torch.device("cpu"), torch.float32)
    model = build(Model(path=str(folder), dtype="float32"), spec)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-4)
    settings = EngineSettings(
        model=str(folder),
        options=VllmOptions.model_validate({}),
        dtype="float32",
        max_model_len=128,
        transfer=TransferSettings(bus_file, 1, 0, 0, keep=True),
    )
    sender = GlooTransport.sender(
        bus_file, attempt=1, workers=1, bucket_bytes=1 << 20, timeout_s=60.0, keep=True
    )
    results: list[PushResult] = []
    unpushed = torch.zeros(1)

    async def run() -> None:
        nonlocal unpushed
        engine = VllmEngine(settings)
        await engine.start()
        try:
            for version in range(STEPS + 1):
                sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=16, seed=version * 10)
                samples = await engine.generate(PROMPT, sampling, 2, f"v{version}")
                assert {span.version for sample in samples for span in sample.spans} == {version}
                difference = apart(model, samples, loss=True)
                assert difference.mean() < 1e-6, f"version {version}: {difference.mean()}"
                assert difference.max() < 1e-5, f"version {version}: {difference.max()}"
                optimizer.step()
                optimizer.zero_grad()
                if version == STEPS:
                    unpushed = apart(model, samples)
                    return
                sender.start(version + 1, model, [0], [0], results.append)
                await engine.fetch_weights(version + 1, 60.0)
                await engine.pause()
                await engine.receive_weights(version + 1, 60.0)
                await engine.resume()
        finally:
            await engine.close()

    asyncio.run(run())
    sender.wait()
    sender.close()
    assert [result.failed for result in results] == [{}] * STEPS
    assert unpushed.mean() > 1e-4  # what the gate would see of an update that is not applied


class Deaf(torch.nn.Module):
    """A model of vLLM's kind that leaves one tensor out without a word, or says nothing at all."""

    def __init__(self, says: bool = True) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.says = says

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
        loaded = {name for name, _ in weights if name != "second.weight"}
        return loaded if self.says else None


@pytest.mark.vllm
def test_a_parameter_that_vllm_does_not_load_is_named() -> None:
    from hpc_rl.weights.vllm_gloo import load_buckets

    buckets = [list(Deaf().first.named_parameters("first")), list(Deaf().second.named_parameters("second"))]
    names = [name for name, _ in Deaf().named_parameters()]
    with pytest.raises(WeightTransferError, match=r"no new weights to 1 of its parameters: second\.weight"):
        load_buckets(Deaf(), buckets, names)
    load_buckets(Deaf(), buckets, [name for name in names if name != "second.weight"])
    load_buckets(Deaf(says=False), buckets, names)  # a model that does not say what it loads
