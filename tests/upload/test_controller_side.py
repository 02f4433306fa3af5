"""The controller's side of uploads: one process at a time, what is kept for it, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.checkpoint.s3 import S3Store
from hpc_rl.controller.uploads import Uploads
from hpc_rl.run.events import EventLog, read_events
from hpc_rl.run.paths import RunDir
from hpc_rl.run.secrets import store_secrets
from hpc_rl.run.settings import load_run
from tests.upload.conftest import add_checkpoint

pytestmark = pytest.mark.slow
NAMES = ["AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"]


@pytest.fixture
def uploads(run: RunDir, s3_environ: dict[str, str]) -> Callable[[str], Uploads]:
    """Makes the controller's part for a recipe that uploads `what`."""

    def make(what: str) -> Uploads:
        text = run.resolved.read_text().replace("HF_TOKEN", "AWS_ENDPOINT_URL")
        text = text.replace(", upload_hub: my-model", "").replace(
            "prefix: mine", f"prefix: mine, what: {what}"
        )
        run.resolved.write_text(text)
        store_secrets(run, NAMES)
        run.open_logs(1)
        return Uploads(run, load_run(run).checkpoint, 1, EventLog(run, 1).append)

    return make


def wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stored(store: S3Store) -> set[str]:
    return {Path(key).stem for key in store.list("uploads/")}


def failed(run: RunDir) -> dict[str, str]:
    return {e["item"]: e["error"] for e in read_events(run) if e["kind"] == "upload_failed"}


def test_all_goes_up_as_it_is_written_and_only_the_newest_waits(
    run: RunDir, store: S3Store, uploads: Callable[[str], Uploads]
) -> None:
    side = uploads("all")
    for step in (30, 40):
        add_checkpoint(run, step)
    for step in (10, 20, 30, 40):  # faster than one can be uploaded
        side.written(f"checkpoints/step_{step:08d}")
    assert side.steps == {10, 40}, "kept from retention: the one in upload, and the next"
    assert set(failed(run)) == {"checkpoints/step_00000020", "checkpoints/step_00000030"}
    wait(lambda: (side.poll(), not side.steps)[1])
    assert stored(store) == {"step_00000010", "step_00000040"}
    side.finish()  # the end takes what was passed over, and the export
    assert not side.settled()
    wait(side.settled)
    assert stored(store) == {"step_00000010", "step_00000020", "step_00000030", "step_00000040", "final"}


def test_final_waits_for_the_end(run: RunDir, store: S3Store, uploads: Callable[[str], Uploads]) -> None:
    side = uploads("final")
    side.written("checkpoints/step_00000010")
    assert side.steps == set()
    assert side.settled()
    side.finish()
    wait(side.settled)
    assert stored(store) == {"step_00000020", "final"}
    assert failed(run) == {}


def test_the_walltime_ends_the_waiting_and_says_what_is_left(
    run: RunDir, store: S3Store, uploads: Callable[[str], Uploads], caplog: pytest.LogCaptureFixture
) -> None:
    (run.safetensors / "final" / "big").write_bytes(bytes(200_000_000))
    side = uploads("final")
    side.finish()
    side.give_up("walltime")
    assert side.settled()
    assert failed(run) == {"checkpoints/step_00000020": "walltime", "safetensors/final": "walltime"}
    assert f"By hand: hpc-rl upload {run.root}" in caplog.text
    assert "final" not in stored(store)


def test_a_process_that_dies_is_said_and_the_next_one_starts(
    run: RunDir, store: S3Store, uploads: Callable[[str], Uploads]
) -> None:
    side = uploads("all")
    side.written("checkpoints/step_00000010")
    assert side._process is not None
    side._process.kill()
    wait(lambda: (side.poll(), not side.steps)[1])
    assert "signal 9" in failed(run)["checkpoints/step_00000010"]
    side.written("checkpoints/step_00000020")
    wait(lambda: (side.poll(), not side.steps)[1])
    assert "step_00000020" in stored(store)
