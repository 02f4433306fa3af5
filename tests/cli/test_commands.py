"""The commands that need no server: dry run, render, status, list, logs, cancel; and start-up time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.cli.main import COMMANDS
from hpc_rl.run.attempts import close_attempt, open_attempt, record_job
from hpc_rl.run.paths import RunDir
from tests.cli.helpers import ROOT, environment, hpc_rl, hpc_rl_forked, make_recipe


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(tmp_path: Path, command: str) -> None:
    pages = [[command]]
    if command in ("site", "devcluster"):
        listing = hpc_rl_forked(command, "--help", cwd=tmp_path)
        assert listing.returncode == 0
        names = {"site": ["init", "list"], "devcluster": ["up", "down", "status"]}[command]
        pages = [[command, name] for name in names]
    for page in pages:
        done = hpc_rl_forked(*page, "--help", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"hpc-rl {' '.join(page)}" in done.stdout
        assert "Example" in done.stdout


def test_the_list_of_commands(tmp_path: Path) -> None:
    done = hpc_rl_forked("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command, (_, line) in COMMANDS.items():
        assert command in done.stdout
        assert line.split(",")[0] in done.stdout


def test_a_dry_run_prints_everything_and_writes_nothing(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = hpc_rl_forked(
        "submit", recipe, "policy.steps=3", "--dry-run", "--site", "generic-gpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "steps: 3" in done.stdout
    assert "#SBATCH --job-name=tiny:policy" in done.stdout
    answer = json.loads(hpc_rl_forked("submit", recipe, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert answer["recipe"]["policy"]["steps"] == 2
    assert answer["script"] is None  # placement local
    assert answer["plan"]["placement"] == "local"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_what_submit_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("")
    recipe = make_recipe(tmp_path)
    words = [f"output_root={tmp_path}/blocked", "model.path=./gone", "data.train.path=./gone.jsonl"]
    before = sorted(tmp_path.rglob("*"))
    done = hpc_rl_forked("submit", recipe, *words, "--dry-run", "--site", "generic-gpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "#SBATCH --job-name=tiny:policy" in done.stdout  # the whole answer is there all the same
    for key in ("output_root", "model.path", "data.train"):
        assert f": {key}: " in done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error"] * 3
    done = hpc_rl_forked("submit", recipe, *words, "--dry-run", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"]) == (2, False)
    assert [finding["level"] for finding in answer["findings"]].count("error") == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_looks_for_data_of_the_hub_in_the_cache(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_DATASETS_CACHE": str(tmp_path / "prepared")}
    words = ("submit", recipe, "data.train.path=org/rows", "--dry-run")
    done = hpc_rl_forked(*words, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert "data.train: org/rows is neither a path nor in the Hub cache" in done.stderr
    (tmp_path / "prepared" / "org___rows").mkdir(parents=True)
    assert hpc_rl_forked(*words, cwd=tmp_path, env=env).returncode == 0


def test_render_prints_a_script_that_bash_accepts(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    done = hpc_rl_forked("render", recipe, "--site", "generic-gpu", "--run-dir", "/scratch/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "/scratch/run" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True, timeout=10)
    local = hpc_rl_forked("render", recipe, cwd=tmp_path)
    assert local.returncode == 2
    assert "no job script" in local.stderr


def test_check_says_what_was_looked_at(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    done = hpc_rl_forked("check", recipe, "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"]) == (0, True), done.stdout
    assert any("train.jsonl" in finding["message"] for finding in answer["findings"])
    (tmp_path / "model" / "model.safetensors").unlink()
    done = hpc_rl_forked("check", recipe, "--json", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (2, False)


def test_errors_of_check_are_on_stderr_and_its_json_is_complete(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    done = hpc_rl_forked("check", recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "no weights" not in done.stdout
    assert "not ready" in done.stdout
    assert done.stderr.startswith("error: recipe.yaml:4: model.path: ")
    assert "has no weights" in done.stderr
    as_json = hpc_rl_forked("check", recipe, "--json", cwd=tmp_path)
    found = [f for f in json.loads(as_json.stdout)["findings"] if f["level"] == "error"]
    assert ["has no weights" in finding["message"] for finding in found] == [True]
    assert as_json.stderr == done.stderr
    refused = hpc_rl_forked("check", recipe, "policy.stepz=1", "policy.batch_size=x", "--json", cwd=tmp_path)
    answer = json.loads(refused.stdout)
    assert (refused.returncode, answer["ok"], answer["plan"]) == (2, False, None)
    assert len(answer["findings"]) == 2 == len(refused.stderr.splitlines())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that failed after one attempt."""
    made = RunDir.create(tmp_path / "runs", "tiny")
    made.resolved.write_text("name: tiny\n")
    made.plan.write_text(json.dumps({"total_steps": 10}))
    record_job(made, None, "local", pid=os.getpid())
    attempt = open_attempt(made)
    made.open_logs(1)
    (made.attempt_logs(1) / "policy_0.log").write_text("".join(f"policy {n}\n" for n in range(50)))
    (made.attempt_logs(1) / "controller.log").write_text("controller says\n")
    close_attempt(made, attempt, exit_code=1, reason="failed", cause="policy 0: boom")
    return made


def test_status_list_and_logs(tmp_path: Path, run: RunDir) -> None:
    answer = json.loads(hpc_rl_forked("status", "tiny", "--json", cwd=tmp_path).stdout)
    assert (answer["state"], answer["first_cause"]) == ("FAILED", "policy 0: boom")
    text = hpc_rl_forked("status", run.root, cwd=tmp_path).stdout
    assert "policy 0: boom" in text
    listed = json.loads(hpc_rl_forked("list", "--json", cwd=tmp_path).stdout)
    assert [entry["run_dir"] for entry in listed] == [str(run.root)]
    assert str(run.root) in hpc_rl_forked("list", cwd=tmp_path).stdout
    logs = hpc_rl_forked("logs", "tiny", "--role", "policy", "-n", "2", cwd=tmp_path).stdout
    assert logs == "policy 48\npolicy 49\n"
    followed = hpc_rl_forked("logs", "tiny", "-f", "-n", "1", cwd=tmp_path)  # ends, since the run has
    assert "controller says" in followed.stdout
    absent = hpc_rl_forked("logs", "tiny", "--attempt", "7", cwd=tmp_path)
    assert absent.returncode == 2
    assert "attempts: 1" in absent.stderr


def test_a_copy_of_a_run_keeps_its_name(tmp_path: Path, run: RunDir) -> None:
    run.plan.write_text(json.dumps({"name": "tiny", "total_steps": 10}))
    copy = shutil.copytree(run.root, tmp_path / "kept" / "copy")
    answer = json.loads(hpc_rl_forked("status", copy, "--json", cwd=tmp_path).stdout)
    assert (answer["run"], answer["run_dir"]) == ("tiny", str(copy))


def test_a_plugin_that_prints_leaves_json_whole(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "talks.py").write_text("print('hello')\n")
    done = hpc_rl_forked("check", recipe, "plugins=[talks.py]", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["ok"] is True
    assert done.stderr == "hello\n"


def test_cancelling_an_ended_run_says_so(tmp_path: Path, run: RunDir) -> None:
    done = hpc_rl_forked("cancel", "tiny", cwd=tmp_path)
    assert done.returncode == 0
    assert "ended already: FAILED" in done.stderr


def test_export_without_a_checkpoint(tmp_path: Path, run: RunDir) -> None:
    done = hpc_rl_forked("export", "tiny", cwd=tmp_path)
    assert done.returncode == 2
    assert "no complete checkpoint" in done.stderr


def test_start_up_imports_nothing_heavy(tmp_path: Path) -> None:
    """A dry run to its end imports no torch; up to its first line nothing but the parser of its arguments."""
    recipe = make_recipe(tmp_path)
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['hpc-rl', 'submit', {str(recipe)!r}, '--dry-run', '--site', 'generic-gpu']\n"
        "first = []\n"
        "write = sys.stdout.write\n"
        "def watch(text):\n"
        "    first.append(set(sys.modules)) if not first else None\n"
        "    return write(text)\n"
        "sys.stdout.write = watch\n"
        "try:\n"
        "    runpy.run_module('hpc_rl.cli.main', run_name='__main__')\n"
        "except SystemExit as leave:\n"
        "    assert not leave.code, leave.code\n"
        "early = {'submitit', 'jinja2', 'rich', 'numpy', 'redis', 'yaml'} & first[0]\n"
        "assert not early, early\n"
        "late = {'torch', 'transformers', 'vllm', 'datasets', 'wandb'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_first_output_of_a_dry_run_comes_at_once(tmp_path: Path) -> None:
    """Under 0.4 s of CPU to the first line (the wall time of an idle machine; tests share theirs)."""
    recipe = make_recipe(tmp_path)
    command = [sys.executable, "-m", "hpc_rl.cli.main", "submit", str(recipe), "--dry-run"]
    hpc_rl("submit", recipe, "--dry-run", cwd=tmp_path)  # byte-compile, warm the page cache
    seconds = []
    for _ in range(3):
        with subprocess.Popen(
            command, env=environment(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"# dry run of")
            times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            seconds.append(sum(map(int, times)) / os.sysconf("SC_CLK_TCK"))
            process.stdout.read()
        assert process.returncode == 0
    assert min(seconds) < 0.4, seconds
