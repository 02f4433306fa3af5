"""The job script and the step commands: exact golden files, and what no script may lose or hold."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from slurm_cases import CASES, FOLDER, GOLDEN, HET, RUN_DIR, build, script_of, script_text, step_lines

from hpc_rl.cluster.slurm.components import megabytes
from hpc_rl.cluster.slurm.steps import step_argv

ALWAYS = (
    *("partition", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "mem", "time", "job-name"),
    *("output", "open-mode", "requeue", "signal", "export", "chdir", "comment"),
)
UPDATE = "run `python tests/slurm/slurm_cases.py --update-golden` if the change is meant"


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one(name: str) -> None:
    assert script_text(name) == (GOLDEN / f"{name}.sbatch").read_text(encoding="utf-8"), UPDATE


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_the_golden_ones(name: str) -> None:
    assert step_lines(name) == (GOLDEN / f"{name}.steps").read_text(encoding="utf-8"), UPDATE


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_bash_reads_the_script(name: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=script_text(name), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", HET)
def test_every_component_says_every_option(name: str) -> None:
    """What Slurm hands on and what it does not differs by option and version, so nothing may be missing."""
    text = script_text(name)
    blocks = text.split("#SBATCH hetjob\n")
    options = [
        {line.split("=")[0] for line in block.splitlines() if line.startswith("#SBATCH")} for block in blocks
    ]
    for found in options:
        assert {f"#SBATCH --{option}" for option in ALWAYS} <= found
    propagated = {"#SBATCH --account", "#SBATCH --qos", "#SBATCH --exclude"}
    for earlier, later in pairwise(options):
        assert earlier & propagated <= later
    assert {line for line in text.splitlines() if "--time" in line} == {"#SBATCH --time=480"}


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_short_and_only_execs(name: str) -> None:
    commands = [line for line in script_text(name).splitlines() if line and not line.startswith("#")]
    assert commands[-1].startswith("exec ")
    assert not any(
        word in line for line in commands for word in ("srun", "if ", "for ", "while ", "container")
    )


def test_only_role_steps_enter_the_image() -> None:
    for name, mark in (("pyxis", "--container-image"), ("apptainer", "apptainer")):
        assert mark not in script_text(name)
        assert step_lines(name).count(mark) >= 2


def test_values_of_variables_are_not_on_the_step_command_line() -> None:
    assert "NCCL_DEBUG" in step_lines("pyxis")
    assert "WARN" not in step_lines("pyxis")


def test_a_secret_value_in_the_script_is_refused() -> None:
    recipe_changes, site_changes = CASES["modules"]
    script = script_of("modules")
    leaking = replace(script, site=script.site.model_copy(update={"setup": ["export X=wandb-0123456789"]}))
    assert recipe_changes == {}
    assert site_changes["setup"]
    with pytest.raises(ValueError, match="value of WANDB_API_KEY"):
        leaking.render(FOLDER, environ={"WANDB_API_KEY": "wandb-0123456789"})
    assert "wandb" not in script.render(FOLDER, environ={"WANDB_API_KEY": "wandb-0123456789"})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{% block exec %}echo hello{% endblock %}", "block exec"),
        ("{% block header %}{% endblock %}", "components"),
        ("{% block before %}{{ nothing }}{% endblock %}", "'nothing' is undefined"),
        ("{% block before %}\n#SBATCH --exclusive\n{% endblock %}", "component_extra"),
        ("{% block before %}{% if %}{% endblock %}", "line 2"),
    ],
)
def test_a_template_that_breaks_the_job_is_refused(tmp_path: Path, body: str, words: str) -> None:
    template = tmp_path / "mine.sbatch.j2"
    template.write_text(f'{{% extends "job.sbatch.j2" %}}\n{body}\n')
    script = replace(script_of("het_1x1"), templates={"recipe": template})
    with pytest.raises(ValueError, match=words):
        script.render(FOLDER)


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    script = replace(script_of("het_1x1"), templates={"site": tmp_path / "gone.j2"})
    with pytest.raises(ValueError, match=r"gone\.j2 cannot be read"):
        script.render(FOLDER)


@pytest.mark.parametrize(
    ("recipe", "site", "words"),
    [
        (
            {"cluster": {"policy": {"sbatch": ["--reservation=r1"]}}},
            {},
            "hand --reservation of policy on to rollout",
        ),
        ({"cluster": {"policy": {"qos": "high"}}}, {}, "hand --qos of policy on to rollout"),
        ({}, {"sbatch": {"policy": ["--container-image=x"]}}, "only role steps enter the image"),
        ({}, {"sbatch": {"policy": ["-p gpu"]}}, "not a long sbatch option"),
        ({}, {"sbatch": {"policy": ["--signal=USR1@9"]}}, "worked out by hpc-rl"),
    ],
)
def test_options_that_slurm_would_misapply_are_refused(recipe: dict, site: dict, words: str) -> None:
    made = build(recipe, site)
    from hpc_rl.cluster.slurm.script import JobScript

    with pytest.raises(ValueError, match=words):
        JobScript.of(*made, run_dir=RUN_DIR, log=RUN_DIR / "log")


def test_an_option_of_one_component_can_be_given_to_the_other_too() -> None:
    from hpc_rl.cluster.slurm.script import JobScript

    options = {"policy": {"sbatch": ["--reservation=r1"]}, "rollout": {"sbatch": ["--reservation r2"]}}
    text = JobScript.of(*build({"cluster": options}, {}), run_dir=RUN_DIR, log=RUN_DIR / "log").render(FOLDER)
    assert "#SBATCH --reservation=r1" in text
    assert "#SBATCH --reservation=r2" in text


def test_a_step_that_the_plan_does_not_have_is_refused() -> None:
    _, plan, site = build({}, {})
    with pytest.raises(ValueError, match="4 of them"):
        step_argv(plan, site, "rollout", 4, ["true"], RUN_DIR / "log", run_dir=RUN_DIR)
    with pytest.raises(KeyError, match="no reward group"):
        step_argv(plan, site, "reward", 0, ["true"], RUN_DIR / "log", run_dir=RUN_DIR)


def test_a_percent_sign_in_a_folder_is_not_a_pattern_of_srun() -> None:
    _, plan, site = build({}, {})
    argv = step_argv(plan, site, "policy", 0, ["true"], Path("/a/50%t/policy_%t.log"), run_dir=RUN_DIR)
    assert "--output=/a/50%%t/policy_%t.log" in argv


@pytest.mark.parametrize(
    ("text", "expected"), [("0", 0), ("500G", 512_000), ("2T", 2_097_152), ("900", 900), ("64GB", 65_536)]
)
def test_sizes_as_sbatch_reads_them(text: str, expected: int) -> None:
    assert megabytes(text) == expected


def test_a_size_that_is_none() -> None:
    with pytest.raises(ValueError, match="such as 500G"):
        megabytes("half")
