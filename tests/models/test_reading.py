"""Reading safetensors by rows gives what the reference library gives, cast or not, whole or in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpc_rl.models.base import ModelError
from hpc_rl.models.hf import reading
from hpc_rl.models.hf.reading import Reader

pytestmark = pytest.mark.torch


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "f32": torch.randn(7, 5),
        "bf16": torch.randn(9, 4, 3).bfloat16(),
        "scalar": torch.tensor(3.5),
        "int": torch.arange(11),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
    }


@pytest.mark.parametrize("buffer_bytes", [16, 8 << 20])
def test_whole_tensors_and_rows(
    tensors: dict[str, torch.Tensor], buffer_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BUFFER_BYTES", buffer_bytes)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    reader = Reader(dict.fromkeys(tensors, path))
    for name, value in tensors.items():
        assert torch.equal(reader.tensor(name), value)
        assert reader.shape(name) == tuple(value.shape)
    assert torch.equal(reader.rows("bf16", 3, 8), tensors["bf16"][3:8])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rows = torch.zeros(4, 4, 3, dtype=dtype)
        reader.rows_into(rows, "bf16", 2)
        assert torch.equal(rows, tensors["bf16"][2:6].to(dtype))
    strided = torch.zeros(5, 7).T  # memory that is not in rows
    reader.rows_into(strided, "f32", 0)
    assert torch.equal(strided, tensors["f32"])
    reader.close()


def test_a_file_that_ends_early_is_named(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-20])
    reader = Reader(dict.fromkeys(tensors, path))
    with pytest.raises(ModelError, match="ends within"):
        for name in tensors:
            reader.tensor(name)
