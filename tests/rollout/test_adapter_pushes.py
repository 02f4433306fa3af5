"""`rollout.weights.lora: adapter` against real engines: a policy's adapter arrives alone, over gloo, and the
engine computes with what the policy would have merged. One engine per kind lives through this file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.adapted import AdaptedModel
from hpc_rl.models.hf.model import build
from hpc_rl.policy.adapter_source import AdapterSource
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Lora, Model, Recipe
from hpc_rl.rollout.engine import (
    AdapterShape,
    EngineError,
    EngineSettings,
    Sample,
    TransferSettings,
    make_engine,
)
from hpc_rl.rollout.engines.hf import HfEngine
from hpc_rl.rollout.engines.vllm import adapter_arguments
from hpc_rl.rollout.settings import adapter_shape
from hpc_rl.types import Sampling
from hpc_rl.weights.adapter import AdapterMeta, factor_names, meta_entry
from hpc_rl.weights.protocol import PushResult, WeightSource, WeightTransferError
from tests.rollout.test_engine_contract import PROMPT, SHORT, Harness, check_log_probs, check_spans
from tests.tiny_models import FileSource, save_checkpoint

pytestmark = [
    pytest.mark.redis,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(180, func_only=True),
]
LONG = Sampling(temperature=0.7, top_p=1.0, max_tokens=200, seed=11)
Bucket = list[tuple[str, torch.Tensor]]
# Ranks and scales that differ between the layers of one fused module.
ADAPTER = Lora(
    r=4, alpha=6.0, use_rslora=True, r_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3.0, "down_proj": 5.0}
)


@dataclass
class Kept:
    """What a source yielded once."""

    content: list[Bucket] = field(default_factory=list)

    def buckets(self, max_bytes: int) -> Iterator[Bucket]:
        yield from self.content

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for bucket in self.content for _, tensor in bucket)


@dataclass
class AdapterHarness(Harness):
    pushes: dict[int, Kept] = field(default_factory=dict)

    async def update(self, version: int, source: WeightSource | None = None) -> PushResult:
        await self.engine.pause()
        thread, results = self.push(version, source or self.pushes[version])
        try:
            report = await self.engine.receive_weights(version, 30.0)
        finally:
            await asyncio.to_thread(thread.join, 40)
        await self.engine.resume()
        assert report.version == version
        assert (
            report.tensors
            == results[0].tensors
            == 1
            + sum(name.endswith(".weight") for bucket in self.pushes[version].content for name, _ in bucket)
        )
        assert report.nbytes == results[0].nbytes
        return results[0]


def policy_states(root: Path, base: Path) -> tuple[dict[int, Path], dict[int, Kept]]:
    """Versions 1 and 2 of a policy with adapters: merged as files, and the pushes of the adapter alone."""
    spec = Model(path=str(base), dtype="float32", lora=ADAPTER)
    model = build(spec, ParallelSpec(torch.device("cpu"), torch.float32), seed=5)
    assert isinstance(model, AdaptedModel)
    folders, pushes = {0: base}, {}
    generator = torch.Generator().manual_seed(1)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.module.parameters():
                if parameter.requires_grad:
                    parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        folders[version] = save_checkpoint(root / str(version), seed=0)
        merged = {name: tensor.clone() for bucket in model.buckets(1 << 20) for name, tensor in bucket}
        save_file(merged, folders[version] / "model.safetensors", metadata={"format": "pt"})
        kept = [
            [(name, tensor.clone()) for name, tensor in bucket]
            for bucket in AdapterSource(model).buckets(1 << 14)
        ]
        assert len(kept) > 2
        pushes[version] = Kept(kept)
    return folders, pushes


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def harness(
    request: pytest.FixtureRequest, bus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AdapterHarness]:
    root = tmp_path_factory.mktemp(f"adapter-{request.param}")
    folders, pushes = policy_states(root, save_checkpoint(root / "0", seed=0))
    attempt = 10 + ["hf", "vllm"].index(request.param)
    settings = EngineSettings(
        model=str(folders[0]),
        options=registry("engines").config_class(request.param)(),
        dtype="float32",
        max_model_len=300,
        transfer=TransferSettings(bus_file, attempt, 0, 0),
        adapter=AdapterShape(rank=8),
    )
    with asyncio.Runner() as runner:
        engine = make_engine(request.param, settings)
        runner.run(engine.start())
        yield AdapterHarness(
            request.param, runner, engine, bus_file, folders, attempt, pushes=pushes, changes=False
        )
        runner.run(engine.close())


def test_requests_under_way_go_on_with_the_new_adapter(harness: AdapterHarness) -> None:
    """Version 0 is the model as it was loaded; from the boundary on the tokens are the adapted model's."""

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


def test_the_next_version_replaces_it_and_no_cache_is_stale(harness: AdapterHarness) -> None:
    before = harness.run(harness.engine.generate(PROMPT, SHORT, 2, "before"))
    result = harness.run(harness.update(2))
    assert result.failed == {}
    samples = harness.run(harness.engine.generate(PROMPT, SHORT, 2, "after"))
    for sample in samples:
        assert [span.version for span in sample.spans] == [2]
        check_log_probs(harness, sample, SHORT.temperature)
    ids = PROMPT + before[0].token_ids
    scores = torch.tensor(harness.run(harness.engine.score(ids)))
    torch.testing.assert_close(scores, harness.log_probs(2, ids[:1], ids[1:], 1.0), rtol=0, atol=1e-5)
    old = harness.log_probs(1, ids[:1], ids[1:], 1.0)
    assert (scores - old).abs().max() > 1e-2, "the two versions differ, or nothing is shown here"
    # Each factor once, in fp32: what a user saves by it.
    assert harness.pushes[2].nbytes <= result.nbytes < 1.1 * harness.pushes[2].nbytes
    whole = sum(tensor.nbytes for tensor in FileSource(harness.folders[2]).tensors.values())
    assert result.nbytes < whole / 4
    if isinstance(harness.engine, HfEngine):  # vLLM keeps the factors beside the weights
        held = harness.engine._model.state_dict()
        for name, tensor in FileSource(harness.folders[2]).tensors.items():
            assert torch.equal(held[name], tensor), f"{name} has not the bits of a merged push"


def test_a_layer_that_the_engine_lacks_is_refused(harness: AdapterHarness) -> None:
    """vLLM itself would leave it out without a word."""
    source = OneLayerMore(harness.pushes[2])

    async def refused() -> list[PushResult]:
        await harness.engine.pause()
        thread, results = harness.push(3, source)
        with pytest.raises(WeightTransferError, match=r"model\.layers\.7\.mlp\.up_proj"):
            await harness.engine.receive_weights(3, 30.0)
        await asyncio.to_thread(thread.join, 40)
        return results

    results = harness.run(refused())
    assert list(results[0].failed) == [0]
    assert harness.engine.version == 2
    if harness.name == "hf":
        harness.run(harness.engine.resume())
        samples = harness.run(harness.engine.generate(PROMPT, SHORT, 1, "old"))
        check_log_probs(harness, samples[0], SHORT.temperature)
    else:
        with pytest.raises(EngineError, match="cannot resume with mixed weights"):
            harness.run(harness.engine.resume())


def test_vllm_makes_room_in_the_adapted_layers_only(tmp_path: Path) -> None:
    recipe = {
        "name": "n",
        "kind": "rl",
        "model": {"path": "m", "lora": {"r": 4, "target_modules": ["self_attn.q_proj", "up_proj"]}},
        "data": {"train": {"path": "d"}},
        "rollout": {"weights": {"lora": "adapter"}},
    }
    assert adapter_shape(Recipe.model_validate(recipe)) == AdapterShape(4, ("q_proj", "up_proj"))
    recipe["rollout"]["weights"]["lora"] = "merged"  # type: ignore[index]
    assert adapter_shape(Recipe.model_validate(recipe)) is None
    settings = EngineSettings(str(save_checkpoint(tmp_path, seed=0)), None)
    arguments = adapter_arguments(settings, AdapterShape(9))
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (arguments["lora_target_modules"], arguments["max_lora_rank"]) == (linear, 16)


class OneLayerMore:
    """A push with one more layer than the model has."""

    def __init__(self, push: Kept) -> None:
        tensors = dict(entry for bucket in push.content for entry in bucket)
        meta = msgspec.json.decode(tensors.pop("adapter.json").numpy().tobytes(), type=AdapterMeta)
        layer = "model.layers.7.mlp.up_proj"
        scales = {**meta.scales, layer: 1.0}
        tensors |= dict(zip(factor_names(layer), (torch.ones(4, 8), torch.ones(8, 4)), strict=True))
        self.content = [meta_entry(AdapterMeta(meta.base, scales)), *tensors.items()]

    def buckets(self, max_bytes: int) -> Iterator[Bucket]:
        yield self.content
