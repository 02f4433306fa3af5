"""The job file that submitit unpickles, local processes, and the draft of a site profile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hpc_rl.cluster.local.start import cancel_local, local_state, read_local, start_supervisor
from hpc_rl.cluster.slurm.batch import check_job_file
from hpc_rl.cluster.slurm.site_init import draft, read_kinds, write_yaml
from hpc_rl.cluster.slurm.task import SupervisorTask
from hpc_rl.plan.site import Site
from hpc_rl.run.paths import RunDir, RunError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "submitit"
    folder.mkdir(mode=0o700)
    file = folder / "7_submitted.pkl"
    file.touch()
    file.chmod(0o600)
    return folder


def test_a_private_job_file_is_accepted(folder: Path) -> None:
    assert check_job_file(folder, "7").name == "7_submitted.pkl"


def test_a_job_file_that_others_can_write_or_read_is_not_read(folder: Path) -> None:
    (folder / "7_submitted.pkl").chmod(0o644)
    with pytest.raises(PermissionError, match="must have mode 0600"):
        check_job_file(folder, "7")


def test_a_folder_that_others_can_write_is_refused(folder: Path) -> None:
    folder.chmod(0o770)
    with pytest.raises(PermissionError, match="writable by you alone"):
        check_job_file(folder, "7")


def test_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "7_submitted.pkl").rename(tmp_path / "real.pkl")
    (folder / "7_submitted.pkl").symlink_to(tmp_path / "real.pkl")
    with pytest.raises(PermissionError, match="a link"):
        check_job_file(folder, "7")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to somebody else")
def test_somebody_elses_file_is_refused(folder: Path) -> None:
    os.chown(folder / "7_submitted.pkl", 65534, 65534)
    with pytest.raises(PermissionError, match="owner 65534"):
        check_job_file(folder, "7")


def test_a_job_file_that_never_comes_is_named(folder: Path) -> None:
    with pytest.raises(TimeoutError, match=r"8_submitted\.pkl"):
        check_job_file(folder, "8", wait_s=0.1)


def test_the_task_ends_the_process_with_the_runs_code() -> None:
    assert SupervisorTask("0", "builtins:int")() == 0
    with pytest.raises(SystemExit) as ended:
        SupervisorTask("75", "builtins:int")()
    assert ended.value.code == 75


def test_a_local_supervisor_is_detached_found_again_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path, "demo")
    (tmp_path / "sleeper.py").write_text("import sys, time\nprint(sys.argv[1], flush=True)\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pid = start_supervisor(run, module="sleeper")
    assert os.getsid(pid) == pid
    assert local_state(run) == "RUNNING"
    with pytest.raises(RunError, match="runs already"):
        start_supervisor(run, module="sleeper")
    _until(lambda: str(run.root) in (run.logs / "job.log").read_text())
    assert (run.logs / "job.log").stat().st_mode & 0o777 == 0o600
    assert cancel_local(run)
    assert local_state(run) == "ENDED"
    assert cancel_local(run)


def test_a_supervisor_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path, "demo")
    (tmp_path / "stubborn.py").write_text(
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start_supervisor(run, module="stubborn")
    _until(lambda: (run.logs / "job.log").read_text().strip().isdigit())
    child = int((run.logs / "job.log").read_text())
    assert cancel_local(run, grace_s=0.3)
    _until(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())


def test_a_reused_pid_is_not_the_supervisor(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "demo")
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        (run.root / "local.json").write_text(
            f'{{"host": "{os.uname().nodename}", "pid": {stranger.pid}, "ticks": 1, "started": 0.0}}'
        )
        assert read_local(run) is not None
        assert local_state(run) == "ENDED"
        assert cancel_local(run)
        assert stranger.poll() is None
    finally:
        stranger.send_signal(signal.SIGKILL)
        stranger.wait()


SINFO = """\
gpu|up|2-00:00:00|8|64|512000|gpu:a100:8(S:0-1)|a100,ib
gpu|up|2-00:00:00|2|64+|512000|gpu:h100:4|h100
cpu|up|infinite|20|128|256000|(null)|(null)
old|down|1:00:00|40|16|64000|gpu:k80:2|(null)
"""


def test_a_drafted_profile_is_valid_and_says_what_was_seen() -> None:
    kinds = read_kinds(SINFO)
    data, notes = draft(kinds, "my cluster", "center")
    text = write_yaml(data, kinds, notes)
    site = Site.model_validate(yaml.safe_load(text))
    assert site.name == "my-cluster"
    assert site.partitions == {"policy": "gpu", "rollout": "gpu", "controller": "cpu"}
    assert (site.gpus.style, site.gpus.per_node, site.gpus.type) == ("gres", 8, "a100")
    assert (site.cpus.per_node, site.cpus.per_gpu) == (64, 8)
    assert site.mem.per_node == "512000M"
    assert site.time_max == "2-00:00:00"
    assert site.detect.cluster_name == "center"
    assert "#   gpu: 8 nodes, 64 CPUs, 512000 MB, 8 x a100, features a100,ib" in text
    assert "types a100, h100" in text


def test_a_cluster_without_gpus_drafts_too() -> None:
    data, _ = draft(read_kinds("cpu|up|infinite|1|8|16000|(null)|(null)\n"), "small", "small")
    site = Site.model_validate(data)
    assert (site.gpus.style, site.placement, site.time_max) == ("none", "shared", None)


def _until(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
