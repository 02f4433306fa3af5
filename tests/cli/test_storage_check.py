"""What fits and what does not: sizes from the plan against free space, quotas and inodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_rl.cluster import storage_check
from hpc_rl.cluster.findings import Finding
from hpc_rl.cluster.sites import load_site
from hpc_rl.cluster.storage_check import (
    GIB,
    check_storage,
    filesystem,
    limits,
    needs,
    parse_lfs_quota,
    parse_quota,
)
from hpc_rl.plan import make_plan, resolve_recipe
from hpc_rl.plan.schema import MemoryEstimate, Mesh
from hpc_rl.recipe import load_recipe
from tests.cli.helpers import make_recipe

BILLION = 1_000_000_000
# lfs quota -q -u 1000 /scratch; the second is over its soft limit.
LFS = "     /scratch/me 104857600       0 209715200       -   1200       0   10000       -\n"
LFS_OVER = "  /scratch/me 104857600* 100000000 209715200 6d23h59m51s   1200       0   10000       -\n"
QUOTA = """\
Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
 nfs:/export/home 1048576 2097152 3145728       0     100       0       0       0
"""


def checked(tmp_path: Path, *overrides: str, parameters: int = BILLION, quota: str = "") -> list[Finding]:
    loaded = load_recipe("gsm8k-grpo", [f"output_root={tmp_path}/runs", *overrides])
    site = load_site("local")
    plan = make_plan(loaded, site)
    per_rank = 4 * parameters / 8 / GIB
    memory = MemoryEstimate(
        parameters=parameters, weights_gb=per_rank, gradients_gb=per_rank, optimizer_gb=2 * per_rank
    )
    plan = plan.model_copy(update={"memory": memory, "mesh": Mesh(dp_shard=8), "total_steps": 500})
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/fs {tmp_path} lustre rw 0 0\n")
    return check_storage(
        loaded,
        plan,
        resolve_recipe(loaded, site, plan),
        which=lambda name: "/usr/bin/lfs" if quota and name == "lfs" else None,
        ask=lambda command: quota,
        mounts=mounts,
    )


def test_a_checkpoint_is_counted_once_however_many_ranks_write_it(tmp_path: Path) -> None:
    loaded = load_recipe("gsm8k-grpo", [f"output_root={tmp_path}", "checkpoint.max_keep=3"])
    site = load_site("local")
    plan = make_plan(loaded, site)
    recipe = resolve_recipe(loaded, site, plan)
    sizes = {}
    for replicate, shard in ((1, 8), (2, 4)):
        memory = MemoryEstimate(
            parameters=BILLION,
            weights_gb=4 * BILLION / shard / GIB,
            gradients_gb=1.0,
            optimizer_gb=8 * BILLION / shard / GIB,
        )
        mesh = Mesh(dp_replicate=replicate, dp_shard=shard)
        wanted = needs(recipe, plan.model_copy(update={"memory": memory, "mesh": mesh, "total_steps": 500}))
        assert wanted is not None
        sizes[shard] = wanted.checkpoint
        # three, one in writing, the best; and the final export in bfloat16
        assert wanted.total == pytest.approx(5 * 12 * BILLION + 2 * BILLION, rel=1e-3)
    assert sizes[8] == pytest.approx(sizes[4], rel=1e-6)
    assert sizes[8] == pytest.approx(12 * BILLION, rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "kept", "exports"),
    [
        ({"policy.steps": 500}, 4, "1 export(s)"),  # two, one in writing, the best
        ({"policy.steps": 60}, 2, "1 export(s)"),
        ({"policy.epochs": 2}, 4, "1 export(s)"),  # how many steps these are is not known yet
        ({"policy.epochs": 2, "data.holdout": 0}, 3, "1 export(s)"),
        ({"policy.epochs": 2, "checkpoint.export": "all"}, 4, "(more with every checkpoint)"),
        ({"policy.steps": 500, "checkpoint.export": "all"}, 4, "12 export(s)"),
    ],
)
def test_epochs_are_counted_as_a_long_run(
    tmp_path: Path, keys: dict[str, object], kept: int, exports: str
) -> None:
    keys = {"data.holdout": 0.1, "checkpoint.save_every": 50, "checkpoint.max_keep": 2, **keys}
    loaded = load_recipe(make_recipe(tmp_path), [f"{key}={value}" for key, value in keys.items()])
    site = load_site("local")
    plan = make_plan(loaded, site)
    wanted = needs(resolve_recipe(loaded, site, plan), plan)
    assert wanted is not None and wanted.words.startswith(f"{kept} checkpoint(s)") and exports in wanted.words


def test_room_that_is_enough_and_room_that_is_not(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    (fine,) = checked(tmp_path, parameters=1000)
    assert fine.level == "ok"
    tight = free // 12 * 2 // 3  # one checkpoint takes two thirds of what is free
    (some,) = checked(tmp_path, parameters=tight)
    assert some.level == "warning"
    assert "lower checkpoint.max_keep" in some.fix
    (none,) = checked(tmp_path, parameters=2 * free // 12)
    assert none.level == "error"
    assert "the filesystem leaves" in none.message
    assert checked(tmp_path, "checkpoint.enabled=false", "checkpoint.export=off", parameters=free) == []


def test_a_quota_counts_even_where_the_filesystem_has_room(tmp_path: Path) -> None:
    small = LFS.replace("209715200", "104957600")  # 97 MiB are left
    findings = checked(tmp_path, parameters=BILLION // 10, quota=small)
    assert [f.level for f in findings if "your Lustre quota" in f.message] == ["error"]
    few = LFS.replace("10000", "1250")  # 50 files are left
    (finding,) = [f for f in checked(tmp_path, parameters=1000, quota=few) if "quota" in f.message]
    assert finding.level == "warning"
    assert "leaves 50 files" in finding.message


def test_large_files_on_lustre_get_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fine,) = checked(tmp_path, parameters=1000)
    assert "setstripe" not in fine.message
    monkeypatch.setattr(storage_check, "STRIPE_ABOVE", 1000)
    (hinted,) = checked(tmp_path, parameters=1000)
    assert hinted.level == "ok"
    assert f"lfs setstripe -c 4 {tmp_path}" in hinted.message


def test_what_the_quota_programs_say() -> None:
    blocks, files = parse_lfs_quota(LFS)
    assert (blocks.kind, blocks.left) == ("bytes", (209715200 - 104857600) * 1024)
    assert (files.kind, files.left) == ("files", 8800)
    assert parse_lfs_quota(LFS_OVER)[0].left == (209715200 - 104857600) * 1024  # the hard limit counts
    assert parse_lfs_quota("lfs quota: cannot resolve path") == []
    (home,) = parse_quota(QUOTA, "nfs:/export/home")  # its files are not limited
    assert home.left == 2097152 * 1024
    assert parse_quota(QUOTA, "/dev/sda1") == []


def test_the_limits_of_this_machine(tmp_path: Path) -> None:
    found = limits(tmp_path, filesystem(tmp_path), lambda name: None, lambda command: "")
    assert found[0].left > 0
    assert filesystem(Path("/proc")) == "proc"
