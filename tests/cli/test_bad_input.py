"""Bad input gets clear lines and exit code 2: no traceback, nothing created, nothing queued."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.helpers import hpc_rl, hpc_rl_forked, line_of, make_recipe


def refused(recipe: Path, *overrides: str, words: tuple[str, ...], env: dict[str, str] | None = None) -> str:
    """`submit` refuses the recipe: code 2, `words` on stderr, nothing on disk. Gives stderr."""
    folder = recipe.parent
    before = {str(path) for path in folder.rglob("*")}
    done = hpc_rl_forked("submit", recipe, *overrides, cwd=folder, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, f"{word!r} is not in:\n{done.stderr}"
    after = {str(path) for path in folder.rglob("*")}
    assert after == before, f"created: {after - before}"
    return done.stderr


def test_an_unknown_key_is_named_with_its_line_and_the_nearest(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, policy={"batch_sise": 4, "steps": 2})
    line = line_of(recipe, "batch_sise")
    refused(recipe, words=(f"recipe.yaml:{line}", "policy.batch_sise", "batch_size"))


def test_the_same_from_a_shell(tmp_path: Path) -> None:
    done = hpc_rl("submit", make_recipe(tmp_path), "policy.batch_sise=4", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: override 'policy.batch_sise=4': policy.batch_sise: unknown key")
    assert not (tmp_path / "runs").exists()


def test_a_wrong_type_is_named_with_its_value(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, policy={"batch_size": "many", "steps": 2})
    line = line_of(recipe, "batch_size")
    refused(recipe, words=(f"recipe.yaml:{line}", "policy.batch_size", '"many"', "integer"))


def test_a_bad_override_is_refused_like_a_key_of_the_file(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    refused(recipe, "policy.stepz=5", words=("policy.stepz", "steps"))
    refused(recipe, "policy.steps", words=("policy.steps",))


def test_tp_that_does_not_divide_the_heads(tmp_path: Path) -> None:
    refused(make_recipe(tmp_path), "policy.parallel.tp=3", words=("policy.parallel.tp", "4"))


def test_every_mistake_is_an_error_of_its_own(tmp_path: Path) -> None:
    text = refused(make_recipe(tmp_path), "policy.stepz=1", "policy.batch_size=x", words=())
    assert [line.startswith("error: override ") for line in text.splitlines()] == [True, True]
    gone = ("model.path=./gone", "data.train.path=./gone.jsonl")
    text = refused(tmp_path / "recipe.yaml", *gone, words=("model.path", "data.train"))
    assert [line.startswith("error: override ") for line in text.splitlines()] == [True, True]


def test_a_model_path_that_does_not_exist(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    words = (f"recipe.yaml:{line_of(recipe, 'model')}", "model.path", "/nowhere/model", "does not exist")
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "model"), "/nowhere/model"))
    refused(recipe, words=words[1:])


def test_a_model_that_is_not_in_the_cache(tmp_path: Path) -> None:
    refused(
        make_recipe(tmp_path), "model.path=nobody/nothing", words=("model.path", "nobody/nothing", "fetch")
    )


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # A file in the way: permission bits would not stop root.
    (tmp_path / "blocked").write_text("")
    refused(make_recipe(tmp_path), f"output_root={tmp_path}/blocked", words=("output_root", "blocked"))


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere; the test above covers it")
def test_an_output_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(make_recipe(tmp_path), f"output_root={tmp_path}/closed", words=("output_root", "not writable"))


def test_a_row_without_the_named_column(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "7+1="}) + "\n")
    refused(recipe, words=("data.train", "train.jsonl", "answer"))


def test_redis_is_missing(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    refused(
        recipe,
        "cluster.controller.redis_server=/nowhere/redis-server",
        words=("cluster.controller.redis_server", "/nowhere/redis-server"),
    )
    empty = tmp_path / "bin"
    empty.mkdir()
    refused(recipe, words=("redis-server", "conda-forge"), env={"PATH": str(empty)})


def test_slurm_is_missing(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    empty = tmp_path / "bin"
    empty.mkdir()
    refused(recipe, "cluster.site=generic-gpu", words=("sbatch", "not found"), env={"PATH": str(empty)})


def test_a_site_that_does_not_exist(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    refused(recipe, "--site", "nowhere", words=("override 'cluster.site=nowhere': cluster.site", "local"))
    refused(recipe, "--site", "", words=("--site: is empty; name a site profile",))
    refused(recipe, "--site", ".", words=("cluster.site", "is a folder, not a site profile"))
    recipe.write_text(recipe.read_text().replace("site: local", "site: locl"))
    line = line_of(recipe, "site")
    refused(recipe, words=(f"recipe.yaml:{line}: cluster.site: no site", "Did you mean 'local'?"))


def test_a_broken_site_profile_stops_nothing_else(tmp_path: Path) -> None:
    sites = tmp_path / ".config" / "hpc-rl" / "sites"
    sites.mkdir(parents=True)
    (sites / "broken.yaml").write_text("name: broken\npartitons: {}\n")
    done = hpc_rl_forked("site", "list", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"local", "generic-gpu"} <= {site["name"] for site in json.loads(done.stdout)}
    (line,) = done.stderr.splitlines()  # once, though both the listing and `auto` met it
    assert line.startswith("warning: site profile left out: .config/hpc-rl/sites/broken.yaml:2: partitons: ")
    recipe = make_recipe(tmp_path, cluster={"site": "auto", "placement": "het"})
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("sbatch", "scontrol"):
        (bin_folder / name).write_text("#!/bin/sh\nexit 1\n")
        (bin_folder / name).chmod(0o755)
    env = {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = hpc_rl_forked("render", recipe, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "warning: site profile left out: " in done.stderr
    refused(recipe, "--site", "broken", words=("broken.yaml:2: partitons: unknown key",))


def test_a_recipe_that_does_not_exist_or_is_no_yaml(tmp_path: Path) -> None:
    refused(tmp_path / "absent.yaml", words=("absent.yaml",))
    refused(tmp_path / "gsm8k-grop", words=("Did you mean 'gsm8k-grpo'? Shipped recipes: ", " gsm8k-grpo, "))
    make_recipe(tmp_path)
    refused(tmp_path / "recpie.yaml", words=("Did you mean 'recipe.yaml'?",))
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", words=("folder' is a folder, not a recipe file; there is no .yaml file in",))
    (tmp_path / "folder" / "mine.yaml").write_text("")
    refused(tmp_path / "folder", words=("is a folder, not a recipe file; recipes in it: mine.yaml",))
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [tiny\nkind: sft\n")
    refused(broken, words=("broken.yaml:",))


def test_a_secret_that_is_not_set(tmp_path: Path) -> None:
    refused(make_recipe(tmp_path), "cluster.secrets=[NO_SUCH_TOKEN]", words=("NO_SUCH_TOKEN", "not set"))


def test_here_outside_of_an_allocation(tmp_path: Path) -> None:
    refused(make_recipe(tmp_path), "--here", words=("SLURM_JOB_ID", "salloc"))


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume", "export"])
def test_a_run_that_does_not_exist(tmp_path: Path, command: str) -> None:
    done = hpc_rl_forked(command, "nobody", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: no run is named 'nobody'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("damage", ["", "[]", "\xff", '{"name": 1}'])
def test_a_damaged_plan_still_gives_a_state_and_a_clear_line(tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.yaml").write_text(make_recipe(tmp_path).read_text())
    (run / "plan.json").write_bytes(damage.encode("latin-1"))
    shown = hpc_rl_forked("status", run, "--json", cwd=tmp_path)
    assert (shown.returncode, json.loads(shown.stdout)["total_steps"]) == (0, None), shown.stderr
    done = hpc_rl_forked("resume", run, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {run}/plan.json is missing or damaged")
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_record_of_attempts_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.yaml").write_text(make_recipe(tmp_path).read_text())
    (run / "attempts.jsonl").write_text('{"attempt": "x"}\n')
    done = hpc_rl_forked("status", run, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run}/attempts.jsonl: an entry is not an attempt")


@pytest.mark.parametrize("name", ["attempts.jsonl", "events.jsonl", "jobs.jsonl"])
def test_a_record_that_is_a_folder_is_named_and_hides_no_other_run(tmp_path: Path, name: str) -> None:
    for run in ("bad", "good"):
        (tmp_path / "runs" / "tiny" / run).mkdir(parents=True)
        (tmp_path / "runs" / "tiny" / run / "resolved.yaml").write_text("name: tiny\n")
    bad = tmp_path / "runs" / "tiny" / "bad"
    (bad / name).mkdir()
    done = hpc_rl_forked("status", bad, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {bad}/{name} cannot be read: Is a directory\n")
    listed = hpc_rl_forked("list", "--json", cwd=tmp_path)
    assert listed.returncode == 0
    assert [run["run_dir"] for run in json.loads(listed.stdout)] == [str(tmp_path / "runs" / "tiny" / "good")]
    assert listed.stderr == f"warning: {bad}/{name} cannot be read: Is a directory\n"
    assert hpc_rl_forked("status", "12345", cwd=tmp_path).stderr.startswith("error: no run is named '12345'")


def test_a_record_of_jobs_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("name: tiny\n")
    (tmp_path / "jobs.jsonl").write_text('{"x": 1}\n')
    done = hpc_rl_forked("status", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/jobs.jsonl: the last entry is not a job")


@pytest.mark.parametrize("count", ["-3", "0", "x"])
def test_a_count_of_runs_is_positive(tmp_path: Path, count: str) -> None:
    done = hpc_rl_forked("list", "-n", count, cwd=tmp_path)
    assert done.returncode == 2
    assert "Invalid value for '-n'" in done.stderr


def test_check_and_render_refuse_in_the_same_words(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    for command in ("check", "render"):
        done = hpc_rl_forked(command, recipe, "policy.stepz=5", cwd=tmp_path)
        assert done.returncode == 2
        assert "policy.stepz" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unknown_command_and_option(tmp_path: Path) -> None:
    assert hpc_rl_forked("sbumit", cwd=tmp_path).returncode == 2
    done = hpc_rl("status", "--jsn", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "--json" in done.stderr


@pytest.mark.parametrize("command", ["dry run", "submit"])
def test_here_the_allocation_decides_the_partitions(tmp_path: Path, command: str) -> None:
    """A profile with a partition per role, in an ordinary salloc: partitions are no mistake of the user."""
    (tmp_path / "site.yaml").write_text("name: s\npartitions: {policy: big, rollout: small}\n")
    rl = {
        "kind": "rl",
        "algorithm": {"name": "grpo", "group_size": 4},
        "reward": [{"name": "exact"}],
        "rollout": {"engine": "hf", "max_tokens": 8},
        "cluster": {"site": str(tmp_path / "site.yaml"), "secrets": ["NOT_SET_ANYWHERE"]},
    }
    recipe = make_recipe(tmp_path, **rl)
    words: list[str | Path] = ["submit", recipe, "--here", *(["--dry-run"] if command == "dry run" else [])]
    # no sinfo on this PATH, and a redis that is not there ends the submit before anything starts
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "PATH": "/nowhere"}
    if command == "submit":
        words.append("cluster.controller.redis_server=/nowhere/redis")
    done = hpc_rl_forked(*words, cwd=tmp_path, env=env)
    assert "placement" not in done.stderr, done.stderr
    assert "sinfo" not in done.stderr
    assert done.returncode == (0 if command == "dry run" else 2), done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_that_is_no_run_says_what_it_is(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny" / "one"
    (run / "logs").mkdir(parents=True)
    (run / "resolved.yaml").write_text("name: tiny\n")
    (tmp_path / "empty").mkdir()
    for given, said in (
        ("runs/tiny", "is no run directory, but holds 1; the newest: runs/tiny/one"),
        ("runs", "is no run directory, but holds 1; the newest: runs/tiny/one"),
        ("empty", "is a folder, but no run directory (it has no resolved.yaml)"),
        (run / "logs", f"lies inside the run {run}"),
        (run / "resolved.yaml", "is a file, no run directory"),
    ):
        done = hpc_rl_forked("clean", given, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {given} {said}"), done.stderr
        assert "known names: tiny" in done.stderr


def test_list_of_a_name_that_nobody_has(tmp_path: Path) -> None:
    assert "no runs yet" in hpc_rl_forked("list", "tinny", cwd=tmp_path).stderr
    run = tmp_path / "runs" / "tiny" / "one"
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text("name: tiny\n")
    done = hpc_rl_forked("list", "tinny", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: no run is named 'tinny'; known names: tiny\n")


def test_what_begins_after_the_last_step_of_the_epochs(tmp_path: Path) -> None:
    """8 rows, 4 in a step: an epoch has two steps."""
    recipe = make_recipe(tmp_path)

    def warnings(*overrides: str) -> list[str]:
        done = hpc_rl_forked("check", recipe, "policy.epochs=3", *overrides, "--json", cwd=tmp_path)
        found = json.loads(done.stdout)["findings"]
        assert any("3 epochs of 8 are 6 steps" in finding["message"] for finding in found)
        return [finding["message"] for finding in found if finding["level"] == "warning"]

    wsd = ("policy.optimizer.schedule=wsd", "policy.optimizer.warmup_steps=2")
    assert not warnings("policy.optimizer.warmup_steps=5", "policy.profile.start=6")
    assert not warnings(*wsd, "policy.optimizer.decay_steps=4")
    assert "the rate never gets to lr" in warnings("policy.optimizer.warmup_steps=6")[0]
    assert "is 5 after 2 of warm-up" in warnings(*wsd, "policy.optimizer.decay_steps=5")[0]
    assert "nothing will be profiled" in warnings("policy.profile.start=7")[0]
