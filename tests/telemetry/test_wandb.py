"""The W&B writer against the real wandb package, without a network: offline, no route, broken."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from hpc_rl.telemetry.wandb import WandbWriter, read_link, route_problem, run_id

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_attempts_share_one_offline_run(tmp_path: Path) -> None:
    for attempt in (1, 2):
        writer = WandbWriter("offline", folder=tmp_path, project="p", name="n", config={"seed": 0})
        writer.log({"step": attempt, "time": 1.0, "attempt": attempt, "train/loss": 0.5})
        assert writer.finish(60)
        assert writer.error is None
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    link = read_link(tmp_path) or ""
    assert link.startswith("offline: wandb sync ")
    pattern = Path(link.split()[-1])
    assert sorted(pattern.parent.glob(pattern.name)) == folders, "all attempts, not the last one only"
    assert run_id(tmp_path) in pattern.name


def test_online_without_a_route_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{_closed_port()}")
    with caplog.at_level(logging.INFO):
        writer = WandbWriter("online", folder=tmp_path, project="p", name="n")
        writer.log({"step": 1, "train/loss": 0.5})
        assert writer.finish(60)
    assert writer.mode == "offline"
    assert "goes offline by itself: no route to 127.0.0.1" in caplog.text
    assert "W&B: offline: wandb sync" in caplog.text


def test_a_failure_is_logged_once_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "wandb"
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        writer = WandbWriter("offline", folder=folder, project="p", name="n")
        assert writer.finish(60) is False
        writer.log({"step": 1, "train/loss": 0.5})
    assert writer.error is not None
    assert "FileExistsError" in writer.error
    assert caplog.text.count("W&B is off for this attempt") == 1


def test_off_does_nothing(tmp_path: Path) -> None:
    writer = WandbWriter("off", folder=tmp_path / "wandb", project="p", name="n")
    writer.log({"step": 1})
    assert writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_route_problem_names_the_host_and_honours_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert route_problem(f"http://127.0.0.1:{port}", 2) is None
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert route_problem("http://unreachable.invalid", 2) is None
    assert "127.0.0.1" in (route_problem("http://unreachable.invalid", 2) or "")
