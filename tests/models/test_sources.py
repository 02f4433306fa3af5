"""Blocks of tensors, converted ones too: what Transformers makes, and no other bytes of files are read."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf import reading
from hpc_rl.models.hf.classes import build_on_meta
from hpc_rl.models.hf.conversion import transforms_of
from hpc_rl.models.hf.folder import weight_files
from hpc_rl.models.hf.loading import fill, materialise, plan_of, realised
from hpc_rl.models.hf.reading import Reader
from hpc_rl.models.hf.sharding import shard
from hpc_rl.models.hf.sources import Source, convert
from hpc_rl.recipe.schema import Model
from tests.models import contract as c
from tests.models.test_classes import save_in_four_bits
from tests.ranks import run_ranks

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
EXACT = 1  # every run counts, however short


def blocks_of(shape: tuple[int, ...], chance: random.Random) -> list[tuple[tuple[int, ...], list[int]]]:
    """The whole tensor, and some blocks: `(offset, size)`."""
    found: list[tuple[tuple[int, ...], list[int]]] = [((0,) * len(shape), list(shape))]
    for _ in range(12):
        ends = [sorted(chance.sample(range(n + 1), 2)) for n in shape]
        found.append((tuple(low for low, _ in ends), [high - low for low, high in ends]))
    return found


def same_blocks(source: Source, expected: Tensor, reader: Reader | None = None) -> None:
    """Bit for bit; with `reader`, as many bytes were read as the blocks have in the file (4 to a number)."""
    assert source.shape == tuple(expected.shape)
    chance = random.Random(0)
    for offset, size in blocks_of(source.shape, chance):
        before = reader.nbytes if reader is not None else 0
        target = torch.zeros(size)
        source.fill(target, offset)
        block = expected[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
        assert torch.equal(target, block.float()), (offset, size)
        if reader is not None:
            assert reader.nbytes - before == 4 * target.numel(), (offset, size)


@pytest.mark.parametrize("buffer", [64, 8 << 20])
@pytest.mark.parametrize("run", [EXACT, 24, 4096])
def test_blocks_of_a_file(run: int, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, cast, into memory that is not in rows; runs read alone or out of whole rows."""
    monkeypatch.setattr(reading, "MIN_RUN_BYTES", run)
    monkeypatch.setattr(reading, "BUFFER_BYTES", buffer)
    torch.manual_seed(0)
    tensors = {"flat": torch.randn(9), "two": torch.randn(7, 11), "three": torch.randn(4, 5, 6)}
    save_file(tensors, tmp_path / "a.safetensors")
    reader = Reader(dict.fromkeys(tensors, tmp_path / "a.safetensors"))
    chance = random.Random(1)
    for name, value in tensors.items():
        for offset, size in blocks_of(tuple(value.shape), chance):
            expected = value[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            turned = torch.zeros(size[::-1]).permute(*range(len(size) - 1, -1, -1))
            for target in (torch.zeros(size), torch.zeros(size, dtype=torch.float64), turned):
                before = reader.nbytes
                reader.block_into(target, name, offset)
                assert torch.equal(target, expected.to(target.dtype)), (name, offset, size)
                if run == EXACT:
                    assert reader.nbytes - before == expected.nbytes
    assert reader._buffer.numel() <= max(buffer, 7 * 11 * 4)
    reader.close()


# --- conversions ----------------------------------------------------------------------------------------
def experts(count: int, *shape: int) -> dict[str, Tensor]:
    return {f"x.experts.{i}.{n}.weight": torch.randn(*shape) for i in range(count) for n in ("a", "b")}


DOWN = "model.layers.0.mlp.experts.down_proj"  # [4, 128, 64] in this config
PATTERNS = ["experts.*.a.weight", "experts.*.b.weight"]
CONVERSIONS: list[tuple[str, dict[str, Tensor], WeightConverter, bool]] = [
    (
        "x.experts.ab",
        experts(5, 6, 4),
        WeightConverter(PATTERNS, "experts.ab", [MergeModulelist(0), Concatenate(1)]),
        True,
    ),
    (
        "x.qkv",
        {"x.q": torch.randn(4, 3), "x.k": torch.randn(2, 3)},
        WeightConverter([r"\.q", r"\.k"], ".qkv", [Concatenate(0)]),
        True,
    ),
    (
        "x.q",
        {"x.qkv": torch.randn(8, 3)},
        WeightConverter(r"\.qkv", [".q", ".k", ".v"], [Chunk(0)]),
        True,
    ),
    ("x.w", {"x.t": torch.randn(5, 3)}, WeightConverter(r"\.t", ".w", [Transpose(0, 1)]), True),
    (
        DOWN,
        {DOWN: torch.randn(4, 64, 128)},
        WeightConverter("experts.down_proj", "experts.down_proj", [Transpose(1, 2, check_dims=True)]),
        True,
    ),
    (
        DOWN,
        {DOWN: torch.randn(4, 128, 64)},
        WeightConverter("experts.down_proj", "experts.down_proj", [Transpose(1, 2, check_dims=True)]),
        True,
    ),
    # What is not followed is made whole.
    ("x.w", {"x.t": torch.randn(6, 3)}, WeightConverter(r"\.t", ".w", [Interleave(0)]), False),
]


def collected(converter: WeightConverter, target: str, tensors: dict[str, Any]) -> WeightConverter:
    mapping = deepcopy(converter)
    for key, value in tensors.items():
        _, pattern = mapping.rename_source_key(key)
        mapping.add_tensor(target, key, str(pattern), value)
    return mapping


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = c.save(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    return build_on_meta(folder, Model(path=str(folder)))[0]


@pytest.mark.parametrize("number", range(len(CONVERSIONS)))
def test_conversions_are_those_of_transformers(
    number: int, moe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MIN_RUN_BYTES", EXACT)
    target, tensors, converter, followed = CONVERSIONS[number]
    save_file(tensors, tmp_path / "a.safetensors")
    reader = Reader(dict.fromkeys(tensors, tmp_path / "a.safetensors"))
    theirs = collected(converter, target, tensors).convert(target, model=moe, config=moe.config)
    ours = convert(moe, reader, target, collected(converter, target, {key: key for key in tensors}))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        same_blocks(ours[name], value, reader if followed else None)
    reader.close()


def test_experts_in_four_bits_are_undone_one_by_one(tmp_path: Path) -> None:
    folder = save_in_four_bits(tmp_path)
    quantized = T.Mxfp4Config(dequantize=True)
    plain = T.GptOssForCausalLM.from_pretrained(folder, quantization_config=quantized, dtype=torch.float32)
    module, _ = build_on_meta(folder, Model(path=str(folder)))
    files = weight_files(folder)
    plan, _ = plan_of(module, files, transforms_of(module), module.state_dict(keep_vars=True))
    reader = Reader(files)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    ((made, source),) = realised(module, reader, name, plan[name])
    assert made == name
    expected = plain.get_parameter(name).detach()
    before = reader.nbytes
    source.fill(target := torch.empty(1, *expected.shape[1:]), (2, 0, 0))
    assert torch.equal(target[0], expected[2])
    assert reader.nbytes - before == expected[2].numel() * 17 // 32  # 4 bits each, and a scale for 32
    same_blocks(source, expected)


# --- ranks ----------------------------------------------------------------------------------------------
def load_on_ranks(rank: int, size: int, folders: dict[str, str]) -> None:
    reading.MIN_RUN_BYTES = EXACT
    for folder in folders.values():
        expected = c.reference(Path(folder)).state_dict()
        for spec in (
            ParallelSpec(c.CPU, torch.float32, dp_shard=size),
            ParallelSpec(c.CPU, torch.float32, dp_shard=size // 2, tp=2),
        ):
            module, _ = build_on_meta(Path(folder), Model(path=folder))
            files, transforms = weight_files(Path(folder)), transforms_of(module)
            shard(module, spec)
            materialise(module, c.CPU)
            targets = module.state_dict(keep_vars=True)
            plan, _ = plan_of(module, files, transforms, targets)
            for first, mapping in plan.items():
                reader = Reader(files)
                with torch.no_grad():
                    for name, source in realised(module, reader, first, mapping):
                        fill(targets[name], source, name)
                value = targets[first]
                local = value.to_local() if isinstance(value, DTensor) else value
                assert reader.nbytes == local.nbytes, f"{first}: {reader.nbytes} read for {local.nbytes}"
                reader.close()
            for name, value in targets.items():
                full = value.full_tensor() if isinstance(value, DTensor) else value
                assert torch.equal(full, expected[name]), name


@pytest.mark.slow
def test_every_rank_reads_the_bytes_of_its_shards(tmp_path: Path) -> None:
    """FSDP x 4, FSDP 2 x TP 2, experts split over one or both: what is read of each tensor is its shard."""
    folders = {name: str(c.save(tmp_path / name, name)) for name in ("mixtral", "phi3")}
    run_ranks(load_on_ranks, 4, tmp_path / "ranks", folders)
