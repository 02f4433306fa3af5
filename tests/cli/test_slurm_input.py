"""Bad input that only Slurm can tell, on a real one: refused before anything is queued."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl.cluster.devcluster import DevCluster
from tests.cli.helpers import hpc_rl, make_recipe

pytestmark = pytest.mark.slurm


def _refused(devcluster: DevCluster, recipe: Path, *overrides: str) -> str:
    """`submit` with code 2; nothing on disk, nothing in the queue. Gives stderr."""
    before = {str(path) for path in recipe.parent.rglob("*")}
    done = hpc_rl("submit", recipe, *overrides, cwd=recipe.parent, env=dict(devcluster.env))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert {str(path) for path in recipe.parent.rglob("*")} == before
    assert "tiny:" not in devcluster.run("squeue", "-h", "-o", "%j").stdout
    return done.stderr


@pytest.fixture
def recipe(devcluster: DevCluster, tmp_path: Path) -> Path:
    return make_recipe(tmp_path, cluster={"site": str(devcluster.site_profile), "placement": "het"})


def test_an_unknown_partition_is_named_with_the_ones_there_are(devcluster: DevCluster, recipe: Path) -> None:
    text = _refused(devcluster, recipe, "cluster.policy.partition=polycy")
    assert "cluster.policy.partition" in text
    assert "polycy" in text
    assert "policy" in text.replace("cluster.policy", "")  # what is allowed


def test_more_than_the_partition_will_ever_give(devcluster: DevCluster, recipe: Path) -> None:
    text = _refused(
        devcluster,
        recipe,
        "cluster.policy.nodes=900",
        "policy.parallel.dp_shard=900",
        "policy.batch_size=900",
    )
    assert "900" in text


def test_a_good_recipe_passes_the_check(devcluster: DevCluster, recipe: Path) -> None:
    done = hpc_rl("check", recipe, cwd=recipe.parent, env=dict(devcluster.env))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sbatch --test-only" in done.stdout
