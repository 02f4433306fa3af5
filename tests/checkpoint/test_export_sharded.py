"""Exports of sharded models: every byte in its place, and none between ranks where none is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as T
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_rl.checkpoint import export as module
from hpc_rl.checkpoint.export import Export, Exporter, ExportError
from hpc_rl.checkpoint.export_parts import lay_out
from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.model import build
from hpc_rl.recipe.schema import Model
from tests.families import FAMILIES
from tests.ranks import run_ranks
from tests.tiny_models import save_model
from tests.tiny_vlms import save_vlm

pytestmark = pytest.mark.torch
TEXT = [name for name, family in FAMILIES.items() if not family.vision]
SPLIT = ["llama", "qwen2", "phi3", "qwen3_moe", "mixtral"]  # columns, rows, ties, packed halves, experts
# Their experts are split on the way to the files.
GATHERED = {"qwen3_moe", "mixtral"}


class Communication(TorchDispatchMode):
    """Counts the calls of collectives and of point-to-point transfers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names that differ in anything."""
    return sorted(found.keys() ^ expected.keys()) + [
        name
        for name, value in expected.items()
        if name in found and (found[name].dtype != value.dtype or not torch.equal(found[name], value))
    ]


def export_families(
    rank: int, world: int, folder: Path, families: list[str], replicate: int, tp: int
) -> None:
    exporter = Exporter(rank, world, "1.1", 60.0)
    for family in families:
        dtype = "bfloat16" if family == "llama" else "float32"
        spec = Model(path=str(folder / family), dtype=dtype)
        shards = ParallelSpec(
            torch.device("cpu"),
            torch.float32,
            dp_replicate=replicate,
            dp_shard=world // replicate // tp,
            tp=tp,
        )
        model = build(spec, shards)
        target = folder / f"{family}-{world}-{tp}"
        with Communication() as seen:
            export = exporter.stage(model, Export(target, model.folder, None, model.file_dtype))
        gathered = family in GATHERED or tp > 1
        assert gathered or not seen.calls, (family, seen.calls)
        assert not gathered or seen.calls or rank > 0, family  # the counter does see transfers
        # What training does meanwhile must not reach the files.
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.zero_()
        export.join(60.0)
    exporter.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        if family.vision:
            save_vlm(folder / name, name)
        else:
            save_model(folder / name, name, num_key_value_heads=2)
    return folder


@pytest.mark.parametrize(
    ("world", "replicate", "tp", "families"),
    [(2, 1, 1, list(FAMILIES)), (3, 1, 1, TEXT), (4, 2, 1, TEXT), (2, 1, 2, SPLIT), (4, 1, 2, SPLIT)],
    ids=["fsdp2", "uneven", "hsdp2x2", "tp2", "fsdp2tp2"],
)
def test_every_family_is_exported_as_save_pretrained_wrote_it(
    world: int, replicate: int, tp: int, families: list[str], models: Path, tmp_path: Path
) -> None:
    run_ranks(export_families, world, tmp_path, models, families, replicate, tp)
    for family in families:
        expected = tensors(models / family)
        if family == "llama":
            expected = {name: value.to(torch.bfloat16) for name, value in expected.items()}
        result = models / f"{family}-{world}-{tp}"
        assert same(tensors(result), expected) == [], family
        assert not list(models.glob(".*"))
        kind = T.AutoModelForImageTextToText if FAMILIES[family].vision else T.AutoModelForCausalLM
        loaded = kind.from_pretrained(result)
        wanted = torch.bfloat16 if family == "llama" else torch.float32
        assert {p.dtype for p in loaded.parameters()} == {wanted}


class Sharded:
    """A source of `DTensor`s of every kind of sharding. `t.` names are transposed in the files."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def units(self) -> list[dict[str, Tensor]]:
        names = list(self.values)
        return [{n: self.values[n] for n in half} for half in (names[::2], names[1::2])]

    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        return unit

    def dtype_in_file(self, name: str, tensor: Tensor) -> torch.dtype:
        return torch.bfloat16 if tensor.is_floating_point() else tensor.dtype

    def to_file(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"x.{n}": v.T.contiguous() if n.startswith("t.") else v for n, v in unit.items()}


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    names = {"rows": (7, 3), "one_row": (1, 5), "columns": (4, 6), "t.rows": (5, 4), "both": (6, 8)}
    names |= {"halves": (12, 3), "t.halves": (8, 2), "half_columns": (2, 12)}
    found = {name: random(*shape) for name, shape in names.items()}
    found |= {"copies": random(3, 3), "two_of_rows": random(9, 2), "t.columns": random(4, 5)}
    return found | {"steps": torch.arange(5), "scalar": random(), "odd": torch.tensor([True, False, True])}


def export_shardings(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    placements: dict[str, list[Any]] = {
        "rows": [Replicate(), Shard(0)],
        "one_row": [Replicate(), Shard(0)],
        "columns": [Shard(1), Replicate()],
        "t.rows": [Shard(0), Shard(0)],
        "both": [Shard(0), Shard(1)],
        "copies": [Replicate(), Replicate()],
        "two_of_rows": [Shard(0), Shard(0)],
        "t.columns": [Replicate(), Shard(1)],
    }
    values = {
        n: distribute_tensor(v, mesh, placements[n]) if n in placements else v for n, v in whole().items()
    }
    # Fused halves that are split each, as tensor parallelism does with packed projections.
    half = mesh.get_coordinate()[1]
    for name, dim in (("halves", 0), ("t.halves", 0), ("half_columns", 1)):
        pieces = values[name].chunk(4, dim)
        local = torch.cat([pieces[half], pieces[2 + half]], dim)
        split = [Replicate(), _StridedShard(dim, split_factor=2)]
        values[name] = DTensor.from_local(
            local, mesh, split, shape=values[name].shape, stride=values[name].stride()
        )
    module.FILE_BYTES = 150
    exporter = Exporter(rank, world, "1.1", 60.0)
    exporter.stage(Sharded(values), Export(folder / "out", folder / "model", None, torch.bfloat16)).join(60.0)
    # Of what is gathered, every rank owns something, and only owners get anything.
    source = Sharded(values)
    layout = lay_out(source, source.units(), rank, world, 1 << 30)
    assert len({unit.owner for unit in layout.units if unit.made}) == 2
    exporter.close()


def test_any_sharding_is_put_together_by_one_owner(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    run_ranks(export_shardings, 4, tmp_path, tmp_path)
    expected = {}
    for name, value in whole().items():
        value = value.to(torch.bfloat16) if value.is_floating_point() else value
        expected[f"x.{name}"] = value.T.contiguous() if name.startswith("t.") else value
    assert same(tensors(tmp_path / "out"), expected) == []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def export_with_failures(rank: int, world: int, folder: Path) -> None:
    weight = DTensor.from_local(torch.ones(4, 4), init_device_mesh("cpu", (world,)), [Shard(0)])
    exporter = Exporter(rank, world, "1.1", 5.0)
    if rank == 1:  # a rank that cannot write: its file is a folder
        (folder / ".out.1.1.1.partial" / "model.safetensors").mkdir(parents=True)
    dist.barrier()
    export = exporter.stage(
        Sharded({"w": weight, "v": weight}), Export(folder / "out", folder, None, torch.float32)
    )
    with pytest.raises(ExportError, match="IsADirectoryError"):
        export.join(30.0)
    exporter.close()


def test_a_rank_that_cannot_write_fails_the_export_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run_ranks(export_with_failures, 2, tmp_path, tmp_path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.1.1.1.partial").exists()
