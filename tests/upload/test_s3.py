"""Uploads to a real S3 server and back: what is stored, skipped, cut off, refused, damaged."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
import pytest

from hpc_rl.checkpoint.download import download_run
from hpc_rl.checkpoint.manifest import FileEntry, checksum
from hpc_rl.checkpoint.s3 import PART_BYTES, Location, S3Store, UploadError
from hpc_rl.checkpoint.s3_parts import Part, is_stored, parts_of
from hpc_rl.checkpoint.upload import Targets, Uploads
from hpc_rl.checkpoint.upload_items import files_of, items_of, list_key, upload_item
from hpc_rl.run.events import EventLog, read_events
from hpc_rl.run.paths import RunDir, RunError
from tests.upload.conftest import BUCKET, add_checkpoint, random_bytes

pytestmark = pytest.mark.slow


def same_tree(left: Path, right: Path) -> bool:
    names = sorted(str(p.relative_to(left)) for p in left.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(right)) for p in right.rglob("*") if p.is_file())
    return filecmp.cmpfiles(left, right, names, shallow=False)[1:] == ([], [])


def upload_all(run: RunDir, what: str = "final") -> bool:
    targets = Targets(Location(BUCKET, "mine"))
    return Uploads(run, EventLog(run, 1), ["secret-of-the-test"]).run_all(
        targets, items_of(run, "all" if what == "all" else "final"), pauses_s=()
    )


def test_final_stores_the_newest_checkpoint_and_the_final_export_and_comes_back(
    run: RunDir, store: S3Store, tmp_path: Path
) -> None:
    assert upload_all(run)
    keys = store.list()
    assert not any("step_00000010" in key for key in keys)
    assert {"run/resolved.yaml", "run/code/plugin.py", "run/events.jsonl"} <= set(keys)
    assert not any("secrets" in key or "logs" in key or "jobs" in key for key in keys)
    assert "uploads/checkpoints/step_00000020.json" in keys
    back = download_run(Location(BUCKET, "mine/tiny"), tmp_path / "there")
    assert back.root == tmp_path / "there" / "tiny" / "run-1"
    assert same_tree(run.checkpoint(20), back.checkpoint(20))
    assert (back.root / "code" / "plugin.py").read_text() == "print('hello')\n"
    assert f"output_root: {tmp_path / 'there'}" in back.resolved.read_text()
    assert back.latest_complete() == 20
    with pytest.raises(RunError, match="here already"):
        download_run(Location(BUCKET, "mine/tiny/run-1"), tmp_path / "there")


def test_all_stores_everything_and_a_second_upload_sends_nothing(run: RunDir, store: S3Store) -> None:
    assert upload_all(run, "all")
    sent = [event["sent"] for event in read_events(run) if event["kind"] == "uploaded"]
    assert len(sent) == 3
    assert min(sent) > 0
    before = {item.key: item.last_modified for item in boto3.resource("s3").Bucket(BUCKET).objects.all()}
    time.sleep(1.1)  # the server's times are whole seconds
    assert upload_all(run, "all")
    assert [event["sent"] for event in read_events(run) if event["kind"] == "uploaded"][3:] == [0, 0, 0]
    after = {item.key: item.last_modified for item in boto3.resource("s3").Bucket(BUCKET).objects.all()}
    unchanged = [key for key in before if "/checkpoints/step" in key and "/uploads/" not in key]
    assert unchanged
    assert all(before[key] == after[key] for key in unchanged)


def test_large_files_go_in_parts_and_keep_their_checksum(run: RunDir, store: S3Store, tmp_path: Path) -> None:
    path = run.safetensors / "final" / "big.bin"
    path.write_bytes(random_bytes(1, 1 << 20) * (PART_BYTES // (1 << 20) + 1))
    done = upload_item(store, run, "safetensors/final", print)
    assert done.sent > PART_BYTES
    head = boto3.client("s3").head_object(Bucket=BUCKET, Key="mine/tiny/run-1/safetensors/final/big.bin")
    assert head["ETag"].strip('"').endswith("-2")  # two parts
    entry = files_of(run, "safetensors/final").files["big.bin"]
    store.get_file("safetensors/final/big.bin", tmp_path / "back", entry)
    assert filecmp.cmp(path, tmp_path / "back", shallow=False)


DIES_AT_ITS_THIRD_PART = """
import itertools, os, signal, sys
from pathlib import Path
from hpc_rl.checkpoint.manifest import FileEntry, checksum
from hpc_rl.checkpoint.s3 import Location, S3Store
path = Path(sys.argv[1])
store, count = S3Store(Location("runs", "mine"), part_bytes=5 << 20), itertools.count(1)
die = lambda **_: os.kill(os.getpid(), signal.SIGKILL) if next(count) == 3 else None
store._client.meta.events.register("after-call.s3.UploadPart", die)
store.put_file("big", path, FileEntry(path.stat().st_size, checksum(path)))
"""


def test_a_large_file_whose_upload_was_killed_goes_on_with_its_parts(
    s3_environ: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "big.bin"
    path.write_bytes(random_bytes(2, 1 << 20) * 62)  # thirteen parts
    command = [sys.executable, "-c", DIES_AT_ITS_THIRD_PART, str(path)]
    killed = subprocess.run(command, env={**os.environ, **s3_environ}, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    store = S3Store(Location(BUCKET, "mine"), part_bytes=5 << 20)  # the least that S3 takes
    entry = FileEntry(path.stat().st_size, checksum(path))
    assert store.find("big") is None
    parts: list[int] = []
    sent = store.put_file("big", path, entry, parts.append)
    assert sent == sum(parts)
    assert 0 < sent <= entry.nbytes - 3 * (5 << 20)
    assert store.find("big") == entry
    store.get_file("big", tmp_path / "back", entry)
    assert filecmp.cmp(path, tmp_path / "back", shallow=False)
    assert not boto3.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_parts_of_another_file_of_that_name_are_sent_again(store: S3Store, tmp_path: Path) -> None:
    client, key = boto3.client("s3"), f"{store.location.prefix}/big"
    begun = client.create_multipart_upload(Bucket=BUCKET, Key=key, Metadata={"xxh3": "of another"})
    stale = {"Bucket": BUCKET, "Key": key, "UploadId": begun["UploadId"], "PartNumber": 1}
    client.upload_part(**stale, Body=b"a" * PART_BYTES)
    path = tmp_path / "big.bin"
    path.write_bytes(b"b" * (PART_BYTES + 1))
    entry = FileEntry(path.stat().st_size, checksum(path))
    with pytest.raises(UploadError, match="after the upload, not"):  # the old upload's metadata
        store.put_file("big", path, entry)
    assert store.put_file("big", path, entry) == entry.nbytes  # what the next of the three tries does
    assert store.find("big") == entry


def test_a_part_is_known_by_its_checksum_where_the_store_gives_one(tmp_path: Path) -> None:
    """Amazon's does (the test server does not): an encrypting store's ETag is no MD5."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 100)
    stored = {
        "Size": 400,
        "ETag": '"0-of-an-encrypted-part"',
        "ChecksumCRC32": "eqDstA==",
    }  # of ten digits x 40
    assert is_stored(path, Part(2, 600, 400), stored)
    assert not is_stored(path, Part(2, 601, 400), stored)
    assert not is_stored(path, Part(2, 600, 399), stored)
    assert not is_stored(path, Part(2, 600, 400), {name: stored[name] for name in ("Size", "ETag")})


def test_parts_keep_to_the_limits_of_s3() -> None:
    parts = parts_of(5 * 10**12, PART_BYTES)
    assert len(parts) <= 10_000
    assert sum(part.nbytes for part in parts) == 5 * 10**12
    assert all(a.start + a.nbytes == b.start for a, b in itertools.pairwise(parts))
    assert [part.nbytes for part in parts_of(PART_BYTES + 1, PART_BYTES)] == [PART_BYTES, 1]


def test_an_upload_that_was_killed_goes_on_where_it_stopped(
    run: RunDir, store: S3Store, s3_environ: dict[str, str]
) -> None:
    folder = run.safetensors / "final"
    for number in range(60):
        (folder / f"part-{number:02d}").write_bytes(random_bytes(number, 2_000_000))
    run.open_logs(1)
    command = [sys.executable, "-m", "hpc_rl.checkpoint.upload", str(run.root), "safetensors/final"]
    process = subprocess.Popen([*command, "--attempt", "1"], env={**os.environ, **s3_environ})
    deadline = time.monotonic() + 60
    while len([key for key in store.list() if "part-" in key]) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = set(store.list())
    assert list_key("safetensors/final") not in there, "what is not whole is not listed"
    done = upload_item(store, run, "safetensors/final", print)
    assert 0 < done.sent < done.nbytes - 8_000_000
    listed = files_of(run, "safetensors/final").files
    assert all(store.find(f"safetensors/final/{name}") == entry for name, entry in listed.items())


def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_is_taken(
    run: RunDir, store: S3Store, tmp_path: Path
) -> None:
    assert upload_all(run, "all")
    key = "mine/tiny/run-1/checkpoints/step_00000020/policy/__0_0.distcp"
    bucket = boto3.resource("s3").Bucket(BUCKET)
    metadata = bucket.Object(key).metadata
    bucket.put_object(Key=key, Body=random_bytes(99, 100_000), Metadata=metadata)  # same size, other bytes
    said: list[str] = []
    back = download_run(Location(BUCKET, "mine"), tmp_path / "there", said.append)
    assert back.latest_complete() == 10
    assert any("step_00000020/policy/__0_0.distcp is damaged" in line for line in said)
    bucket.Object("mine/tiny/run-1/uploads/checkpoints/step_00000010.json").delete()
    with pytest.raises(UploadError, match="is damaged"):
        download_run(Location(BUCKET, "mine"), tmp_path / "elsewhere", said.append)
    assert not (tmp_path / "elsewhere" / "tiny" / "run-1").exists()


def test_what_is_refused_says_what_to_change(
    run: RunDir, s3_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UploadError, match=r"there is no bucket nowhere.*create it") as missing:
        S3Store(Location("nowhere", "x")).prove_access("probe")
    assert missing.value.permanent
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UploadError, match="AWS_SECRET_ACCESS_KEY not set"):
        S3Store(Location(BUCKET, "x"))
    with pytest.raises(UploadError, match="is not s3://bucket/prefix"):
        Location.parse("bucket/prefix")


def test_wrong_credentials_are_an_error_with_the_variables_to_check(s3_environ: dict[str, str]) -> None:
    """moto checks credentials when it is told to: those of nobody are refused."""

    def unchecked(requests: str) -> None:
        url = f"{s3_environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), headers, method="POST")).read()

    unchecked("0")
    try:
        with pytest.raises(UploadError, match=r"denied.*AWS_ACCESS_KEY_ID") as refused:
            S3Store(Location(BUCKET, "x")).prove_access("probe")
    finally:
        unchecked("inf")
    assert refused.value.permanent
    assert "secret-of-the-test" not in str(refused.value)


def test_a_failed_upload_is_an_event_and_nothing_more(
    run: RunDir, s3_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    assert not upload_all(run)
    failed = [event for event in read_events(run) if event["kind"] == "upload_failed"]
    assert {event["item"] for event in failed} == {"checkpoints/step_00000020", "safetensors/final"}
    assert all("cannot reach s3://runs/mine/tiny/run-1" in event["error"] for event in failed)


def test_a_checkpoint_that_is_not_whole_or_gone_is_not_uploaded(run: RunDir, store: S3Store) -> None:
    folder = add_checkpoint(run, 30)
    (folder / "policy" / "__0_0.distcp").write_bytes(b"cut")
    with pytest.raises(UploadError, match="3 bytes, 100000 were written"):
        upload_item(store, run, "checkpoints/step_00000030", print)
    with pytest.raises(UploadError, match="COMPLETE is gone"):
        upload_item(store, run, "checkpoints/step_00000040", print)
    assert not store.list("checkpoints")


def test_the_process_reads_its_secrets_from_the_run(run: RunDir, store: S3Store) -> None:
    """Nothing in its arguments or environment: the 0600 file alone."""
    from hpc_rl.run.secrets import store_secrets

    names = ["AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"]
    text = (
        run.resolved.read_text().replace("HF_TOKEN", "AWS_ENDPOINT_URL").replace(", upload_hub: my-model", "")
    )
    run.resolved.write_text(text)
    store_secrets(run, names)
    environ = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "hpc_rl.checkpoint.upload", str(run.root), "--attempt", "1"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(store.get(list_key("safetensors/final")))["item"] == "safetensors/final"
    assert "secret-of-the-test" not in done.stdout + done.stderr + run.events.read_text()
