"""One tiny model and one data set for all end-to-end tests of a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e import tiny


@pytest.fixture(autouse=True)
def _own_state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of runs that `hpc-rl list` keeps per user is not for test runs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def tiny_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "model").mkdir()
    tiny.make_model(folder / "model")
    tiny.make_data(folder / "train.jsonl", rows=24, seed=0)
    tiny.make_data(folder / "eval.jsonl", rows=8, seed=1)
    return folder


@pytest.fixture
def workspace(tiny_assets: Path, tmp_path: Path) -> Path:
    """A folder with `model/`, `train.jsonl` and `eval.jsonl`, for this test alone."""
    shutil.copytree(tiny_assets, tmp_path / "w")
    return tmp_path / "w"
