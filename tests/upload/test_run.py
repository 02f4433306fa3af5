"""Whole runs that upload: beside the training, at the end, by hand, and back on another machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import boto3
import pytest

from tests.e2e import tiny
from tests.e2e.harness import Run, hpc_rl
from tests.upload.conftest import BUCKET

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]
SECRETS = ["AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "model").mkdir()
    tiny.make_model(folder / "model")
    tiny.make_data(folder / "train.jsonl", rows=24, seed=0)
    return folder


def keys(environ: dict[str, str]) -> list[str]:
    bucket = boto3.resource("s3", endpoint_url=environ["AWS_ENDPOINT_URL"]).Bucket(BUCKET)
    return [item.key for item in bucket.objects.all()]


def recipe(workspace: Path, what: str) -> Path:
    upload = {"bucket": BUCKET, "prefix": "mine", "what": what}
    return tiny.sft_recipe(
        workspace, checkpoint={"upload_s3": upload}, cluster={"secrets": SECRETS, "placement": "local"}
    )


def test_a_run_is_stored_and_goes_on_from_s3_elsewhere(
    workspace: Path, s3_environ: dict[str, str], tmp_path: Path
) -> None:
    run = Run.submit(recipe(workspace, "final"))
    status = run.complete()
    stored = {line["item"]: line["error"] for line in status["uploads"]}
    assert stored == {"checkpoints/step_00000010": "", "safetensors/final": ""}, run.tail()
    prefix = f"mine/tiny-sft/{run.root.name}"
    assert f"{prefix}/safetensors/final/model.safetensors" in keys(s3_environ)
    secret = s3_environ["AWS_SECRET_ACCESS_KEY"]
    logs = [path.read_text(errors="replace") for path in run.root.rglob("*.log")]
    assert not any(secret in text for text in logs)

    shutil.rmtree(run.root.parent)  # the first machine is gone
    there = tmp_path / "there"
    hpc_rl("resume", f"s3://{BUCKET}/mine/tiny-sft", f"output_root={there}", "policy.steps=13")
    again = Run(there / "tiny-sft" / run.root.name, {}, awaited=3)
    status = again.complete()
    assert (status["step"], status["attempt"]) == (13, 2)
    assert [row["step"] for row in again.metrics()] == list(range(1, 14))
    assert f"{prefix}/uploads/checkpoints/step_00000013.json" in keys(s3_environ)


def test_a_store_that_is_away_costs_the_run_nothing_and_is_made_up_for_by_hand(
    workspace: Path, s3_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # check warns, nobody listens
    path = recipe(workspace, "final")
    run = Run.submit(path)
    status = run.complete(timeout_s=300)
    assert status["step"] == 10
    errors = {line["item"]: line["error"] for line in status["uploads"]}
    assert "cannot reach" in errors["safetensors/final"], errors
    text = hpc_rl("status", run.root)
    assert f"hpc-rl upload {run.root}" in text
    assert keys(s3_environ) == []

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environ["AWS_ENDPOINT_URL"])
    planned = hpc_rl("upload", run.root, "--dry-run")
    assert "would upload safetensors/final" in planned
    assert keys(s3_environ) == []
    hpc_rl("upload", run.root)
    assert any(key.endswith("uploads/safetensors/final.json") for key in keys(s3_environ))
    assert not any(line["error"] for line in run.status()["uploads"])


def test_check_proves_that_it_may_write(
    workspace: Path, s3_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(workspace, "final")
    assert "s3://runs/mine is writable" in hpc_rl("check", path)
    assert keys(s3_environ) == []
    with pytest.raises(AssertionError, match="there is no bucket elsewhere"):
        hpc_rl("check", path, "checkpoint.upload_s3.bucket=elsewhere")
    with pytest.raises(AssertionError, match=r"AWS_ACCESS_KEY_ID not among cluster.secrets"):
        hpc_rl("check", path, "cluster.secrets=[AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION]")
