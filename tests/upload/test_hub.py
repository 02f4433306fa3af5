"""Uploads to the Hub: whose repository, private, refused in words, and never more than an event."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from hpc_rl.checkpoint.hub import EXIT_AWAY, EXIT_REFUSED, HubRepo
from hpc_rl.checkpoint.s3 import UploadError
from hpc_rl.checkpoint.upload import FINAL, Targets, Uploads
from hpc_rl.run.events import EventLog, read_events
from hpc_rl.run.paths import RunDir
from tests.upload.hub_server import HubServer, Repo

pytestmark = pytest.mark.slow
AWAY = "http://127.0.0.1:9"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer({"hf_writer": ("ada", "write"), "hf_reader": ("ada", "read")})
    yield server
    server.close()


def repo(hub: HubServer, name: str, *, token: str = "hf_writer", private: bool = True) -> HubRepo:
    return HubRepo(name, private, {"HF_TOKEN": token}, hub.url)


def test_a_bare_name_is_the_owners_and_the_repository_is_private(hub: HubServer, run: RunDir) -> None:
    assert repo(hub, "my-model").prove_access() == "ada/my-model"
    assert hub.repos == {}, "a check makes nothing"
    url = repo(hub, "my-model").upload(run.root / FINAL, "a message")
    assert url == f"{hub.url}/ada/my-model"
    assert hub.repos["ada/my-model"].private
    assert sorted(hub.repos["ada/my-model"].files) == ["config.json", "model.safetensors"]
    assert repo(hub, "team/ours").full_name() == "team/ours"


def test_files_of_an_earlier_upload_go(hub: HubServer, run: RunDir) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
        "README.md": b"mine",
    }
    hub.repos["ada/my-model"] = Repo(True, dict(old))
    repo(hub, "my-model").upload(run.root / FINAL, "again")
    assert sorted(hub.repos["ada/my-model"].files) == ["README.md", "config.json", "model.safetensors"]


def test_what_would_be_refused_is_said_before(hub: HubServer, run: RunDir) -> None:
    hub.repos["ada/open"] = Repo(private=False)
    cases = {
        "may only read": repo(hub, "my-model", token="hf_reader"),
        "not a member of others": repo(hub, "others/model"),
        "ada/open exists and is public": repo(hub, "open"),
        "cannot ask whose the token is": repo(hub, "my-model", token="hf_nobody"),
    }
    for words, target in cases.items():
        with pytest.raises(UploadError, match=words) as refused:
            target.prove_access()
        assert refused.value.permanent
        assert "hf_" not in str(refused.value)
    with pytest.raises(UploadError, match="is public"):
        repo(hub, "open").upload(run.root / FINAL, "x")
    assert hub.repos["ada/open"].files == {}
    assert repo(hub, "open", private=False).prove_access() == "ada/open"
    with pytest.raises(UploadError, match="HF_TOKEN not set"):
        HubRepo("m", True, {})


def test_a_hub_that_is_away_is_an_event(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", AWAY)
    uploads = Uploads(run, EventLog(run, 1), ["hf_writer"])
    assert not uploads.run_all(Targets(hub="my-model"), [FINAL], pauses_s=(0.1,))
    (failed,) = [event for event in read_events(run) if event["kind"] == "upload_failed"]
    assert failed["target"] == "hub:my-model"
    assert f"cannot reach {AWAY}" in failed["error"]


@pytest.mark.parametrize(
    ("away", "token", "code"), [(False, "hf_reader", EXIT_REFUSED), (True, "hf_writer", EXIT_AWAY)]
)
def test_the_check_tells_refused_from_away(hub: HubServer, away: bool, token: str, code: int) -> None:
    environ = {"HF_TOKEN": token, "HF_ENDPOINT": AWAY if away else hub.url, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "hpc_rl.checkpoint.hub", "my-model", "private"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert token not in done.stdout
