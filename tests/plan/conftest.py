"""Plans from a shipped recipe with overrides, and sites from keywords."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.plan import Plan, Site, make_plan
from hpc_rl.recipe import load_recipe
from hpc_rl.recipe.extensions import register

ANY_MESH = "any-mesh"
GPU_SITE = {
    "name": "gpus",
    "gpus": {"style": "gres", "per_node": 8, "memory_gb": 80},
    "cpus": {"per_node": 64, "per_gpu": 8},
}


@pytest.fixture
def plan() -> Callable[..., Plan]:
    """plan(*overrides, recipe=..., **site keys) works out a plan, for a plugin's trainer that can do all."""
    register("trainers", ANY_MESH, implementation="their_trainer:Trainer")

    def make(*overrides: str, recipe: str = "gsm8k-grpo", trainer: str = ANY_MESH, **keys: Any) -> Plan:
        return make_plan(
            load_recipe(recipe, [f"policy.trainer={trainer}", *overrides]), Site(**{**GPU_SITE, **keys})
        )

    return make


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """model_folder(**config keys) writes a config.json (and one safetensors header per `shapes`)."""

    def make(shapes: dict[str, list[int]] | None = None, **config: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
        if shapes is not None:
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name, shape in shapes.items():
                size = 4
                for length in shape:
                    size *= length
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
                end += size
            text = json.dumps(header).encode()
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
        return folder

    return make
