"""Which variables reach sbatch, the job and the roles; no secret among them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from slurm_cases import build

from hpc_rl.cluster.environment import (
    is_secret_name,
    make_cache_folders,
    role_environment,
    step_environment,
    submission_environment,
)

SHELL = {
    "PATH": "/usr/bin",
    "HOME": "/home/me",
    "SLURM_CONF": "/etc/slurm.conf",
    "SLURM_JOB_ID": "7",
    "SBATCH_PARTITION": "cpu",
    "WANDB_API_KEY": "wandb-secret-value",
    "HF_TOKEN": "hf_abcdefghijk",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-value",
    "MY_LOGIN": "named-in-the-recipe",
    "HTTPS_PROXY": "http://me:word@proxy:3128",
    "NCCL_DEBUG": "INFO",
    "NCCL_EXTRA": "x-hf_abcdefghijk-x",
    "EDITOR": "vi",
    "BASH_FUNC_module%%": "() { true; }",
}


def test_sbatch_gets_what_is_allowed_and_no_secret() -> None:
    kept = submission_environment(SHELL, ["MY_LOGIN"])
    assert set(kept) == {"PATH", "HOME", "SLURM_CONF", "NCCL_DEBUG", "BASH_FUNC_module%%"}


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("github_token", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("PATH", False),
        ("AUTHOR", False),
        ("KEYBOARD", False),
    ],
)
def test_what_is_called_like_a_secret(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


def test_a_step_gets_no_srun_defaults_and_no_secret() -> None:
    job = {**SHELL, "SLURM_NTASKS": "4", "SLURM_HET_SIZE": "2", "SRUN_CPUS_PER_TASK": "2", "EDITOR": "vi"}
    env = step_environment(job, {"A": "1"}, secrets=["MY_LOGIN"])
    assert env["SLURM_JOB_ID"] == "7"
    assert env["SLURM_HET_SIZE"] == "2"
    assert env["A"] == "1"
    assert env["EDITOR"] == "vi"
    gone = {"SLURM_NTASKS", "SRUN_CPUS_PER_TASK", "HF_TOKEN", "WANDB_API_KEY", "MY_LOGIN", "SBATCH_PARTITION"}
    assert not gone & set(env)


def test_a_container_gets_its_own_libraries_and_our_variables() -> None:
    env = step_environment({"LD_LIBRARY_PATH": "/host", "PATH": "/bin"}, {"A": "1"}, runtime="apptainer")
    assert env == {"PATH": "/bin", "A": "1", "APPTAINERENV_A": "1"}


def test_role_variables_caches_hub_network_and_precedence() -> None:
    recipe, plan, site = build(
        {"cluster": {"variables": {"X": "recipe", "Y": "recipe"}, "rollout": {"variables": {"Y": "role"}}}},
        {"variables": {"X": "site", "Z": "site"}},
    )
    env = role_environment(plan, site, recipe, "rollout")
    assert (env["X"], env["Y"], env["Z"]) == ("recipe", "role", "site")
    assert env["HF_HOME"] == "/shared/hf"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["NCCL_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] == "ib0"
    assert env["OMP_NUM_THREADS"] == str(plan.group("rollout").cpus_per_task)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"):
        assert env[name].startswith(f"/local/hpc-rl-{os.getuid()}/cache/")
    assert role_environment(plan, site, recipe, "policy")["Y"] == "recipe"


def test_a_secret_among_the_variables_is_refused() -> None:
    recipe, plan, site = build({}, {"variables": {"HF_TOKEN": "x"}})
    with pytest.raises(ValueError, match=r"cluster\.secrets: \[HF_TOKEN\]"):
        role_environment(plan, site, recipe, "policy")


def test_cache_folders_are_private_and_never_somebody_elses(tmp_path: Path) -> None:
    recipe, plan, site = build({}, {"paths": {"local": str(tmp_path)}})
    env = role_environment(plan, site, recipe, "policy")
    make_cache_folders(env)
    make_cache_folders(env)
    folder = Path(env["TRITON_CACHE_DIR"])
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.parent.parent.chmod(0o777)
    with pytest.raises(PermissionError, match=r"paths\.local"):
        make_cache_folders(env)


def test_a_link_in_place_of_the_cache_folder_is_refused(tmp_path: Path) -> None:
    recipe, plan, site = build({}, {"paths": {"local": str(tmp_path)}})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"hpc-rl-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        make_cache_folders(role_environment(plan, site, recipe, "policy"))
