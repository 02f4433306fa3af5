"""A real S3 server (moto's, over HTTP, in a process of its own) and a run directory to upload."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from hpc_rl.checkpoint.manifest import write_complete
from hpc_rl.checkpoint.s3 import Location, S3Store
from hpc_rl.run.events import EventLog
from hpc_rl.run.paths import RunDir

BUCKET = "runs"
RECIPE = """\
name: tiny
kind: sft
output_root: {root}
model: {{path: {root}/model}}
data: {{train: {{path: {root}/rows.jsonl, format: prompt_completion}}}}
policy: {{steps: 20, batch_size: 4}}
checkpoint: {{upload_s3: {{bucket: runs, prefix: mine}}, upload_hub: my-model}}
cluster: {{secrets: [AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, HF_TOKEN]}}
"""


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The address of a server that checks no signatures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server ended"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_environ(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The four variables, set; an empty bucket."""
    environ = {
        "AWS_ENDPOINT_URL": s3_url,
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    bucket = boto3.resource("s3").Bucket(BUCKET)
    bucket.create()
    yield environ
    bucket.objects.all().delete()


@pytest.fixture
def store(s3_environ: dict[str, str]) -> S3Store:
    return S3Store(Location(BUCKET, "mine/tiny/run-1"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with two checkpoints and a final export; the files are random bytes."""
    run = RunDir.create(tmp_path / "here", "tiny", run_id="run-1")
    run.resolved.write_text(RECIPE.format(root=tmp_path / "here"))
    run.recipe.write_text("name: tiny\n")
    run.plan.write_text('{"name": "tiny"}')
    (run.code / "plugin.py").write_text("print('hello')\n")
    EventLog(run, 1).append("training", step=0, total_steps=20)
    for step in (10, 20):
        add_checkpoint(run, step)
    final = run.safetensors / "final"
    final.mkdir()
    (final / "model.safetensors").write_bytes(random_bytes(5, 300_000))
    (final / "config.json").write_text("{}")
    return run


def random_bytes(seed: int, count: int) -> bytes:
    import random

    return random.Random(seed).randbytes(count)


def add_checkpoint(run: RunDir, step: int, nbytes: int = 100_000) -> Path:
    folder = run.checkpoint(step)
    (folder / "policy").mkdir(parents=True)
    (folder / "controller").mkdir()
    (folder / "policy" / ".metadata").write_bytes(b"metadata")
    (folder / "policy" / "__0_0.distcp").write_bytes(random_bytes(step, nbytes))
    (folder / "controller" / "state.json").write_text(f'{{"step": {step}}}')
    write_complete(folder, step)
    return folder
