"""A small valid recipe on disk, and fixtures that write and judge recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.recipe import RecipeError, load_recipe

SMALL = """\
name: small
kind: rl
model: {path: org/model}
data: {train: {path: rows.jsonl}}
algorithm: {name: grpo, group_size: 4}
reward: [{name: exact}]
policy:
  batch_size: 8
  steps: 5
rollout: {engine: hf}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """write(text, name="r.yaml") puts a file into the working folder; the small recipe is there too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)

    def put(text: str, name: str = "r.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return Path(name)

    return put


@pytest.fixture
def wrong() -> Callable[..., str]:
    """wrong(path, *overrides) is the message of the RecipeError that loading raises."""

    def message(path: Path | str, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        return str(caught.value)

    return message
