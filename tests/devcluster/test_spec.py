"""The devcluster without starting anything: layouts, configuration text, packages, process identity."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from hpc_rl.cluster.devcluster import (
    DevCluster,
    DevClusterError,
    MissingPackages,
    PartitionSpec,
    ProfileSpec,
    config,
    default_spec,
    devices,
    missing_packages,
    packages,
    parse_partition,
    ports,
    processes,
    profile,
)
from hpc_rl.cluster.sites import read_site

THIRTEEN = ProfileSpec(
    partitions=(
        PartitionSpec("gpu", nodes=8, gpus=8, features=("a100", "ib"), default=True, node_prefix="g"),
        PartitionSpec("gpu-small", nodes=4, gpus=4, gpu_type="l40", max_minutes=60),
        PartitionSpec("cpu", nodes=1),
        PartitionSpec("all", nodes=0, over=("gpu", "gpu-small"), priority_tier=5, grace_s=7),
    ),
    roles={"policy": "gpu", "rollout": "gpu-small"},
    accounting=True,
    accounts=("lab",),
)


def _layout(spec: ProfileSpec) -> config.Layout:
    nodes = {node: 20_000 + i for i, node in enumerate(n for p in spec.partitions for n in p.own_nodes)}
    return config.Layout(Path("/tmp/x"), "host", "me", 19_000, nodes, 19_001 if spec.accounting else None)


@pytest.mark.parametrize("spec", [default_spec(), default_spec(gpus=0, cpu=0, urgent=True), THIRTEEN])
def test_a_layout_survives_the_state_file(spec: ProfileSpec) -> None:
    assert ProfileSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_roles_get_their_partitions() -> None:
    assert [default_spec().partition_of(role) for role in ("policy", "rollout", "controller")] == [
        "policy",
        "rollout",
        "cpu",
    ]
    assert [THIRTEEN.partition_of(role) for role in ("policy", "rollout", "controller")] == [
        "gpu",
        "gpu-small",
        "cpu",
    ]
    assert THIRTEEN.nodes_of(THIRTEEN.partition("all")) == [f"g{i}" for i in range(1, 9)] + [
        f"gpu-small{i}" for i in range(1, 5)
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "at least one partition"),
        ((PartitionSpec("a"), PartitionSpec("a")), "partition a is named twice"),
        ((PartitionSpec("a"), PartitionSpec("b", node_prefix="a")), "node a1 is named twice"),
        ((PartitionSpec("a", nodes=0),), "has no nodes"),
        ((PartitionSpec("a", over=("b",)),), "unknown partition b"),
        ((PartitionSpec("a b"),), "letters, digits"),
        ((PartitionSpec("a", nodes=65),), "64 at most"),
    ],
)
def test_an_impossible_layout_is_refused(parts: tuple[PartitionSpec, ...], message: str) -> None:
    with pytest.raises(DevClusterError, match=message):
        ProfileSpec(partitions=parts)


def test_the_command_lines_partition_form() -> None:
    assert parse_partition("gpu:8:4") == PartitionSpec("gpu", nodes=8, gpus=4)
    assert parse_partition("cpu:1") == PartitionSpec("cpu", nodes=1)
    with pytest.raises(DevClusterError, match="NAME:NODES"):
        parse_partition("gpu")


def test_slurm_conf_describes_nodes_partitions_and_preemption() -> None:
    text = config.slurm_conf(THIRTEEN, _layout(THIRTEEN))
    assert (
        "NodeName=g8 NodeHostname=host NodeAddr=127.0.0.1 Port=20007 CPUs=16 RealMemory=64000 "
        "State=UNKNOWN Gres=gpu:8 Feature=a100,ib" in text
    )
    assert "NodeName=gpu-small1 " in text
    assert "Gres=gpu:l40:4" in text
    small = next(line for line in text.splitlines() if line.startswith("PartitionName=gpu-small "))
    assert "MaxTime=60" in small
    assert "PreemptMode=OFF" not in small
    over = next(line for line in text.splitlines() if line.startswith("PartitionName=all "))
    assert "PriorityTier=5" in over
    assert "GraceTime=7" in over
    assert "PreemptMode=OFF" in over
    assert "AccountingStorageEnforce=associations,limits,qos" in text
    assert "PreemptType" not in config.slurm_conf(default_spec(), _layout(default_spec()))


def test_no_path_of_an_installed_slurm_is_used() -> None:
    layout = _layout(THIRTEEN)
    for text in (config.slurm_conf(THIRTEEN, layout), config.slurmdbd_conf(layout)):
        assert "/etc/" not in text
        assert "/var/" not in text


def test_ports_are_distinct_and_below_the_ephemeral_range() -> None:
    found = ports.free_ports(30)
    assert len(set(found)) == 30
    assert max(found) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def test_missing_programs_are_named_with_their_debian_packages(tmp_path: Path) -> None:
    with pytest.raises(MissingPackages) as caught:
        packages.find_programs(path=str(tmp_path))
    assert caught.value.packages == ["munge", "slurm-client", "slurmctld", "slurmd"]
    with pytest.raises(MissingPackages, match="slurmdbd") as caught:
        packages.find_programs(accounting=True, path=str(tmp_path))
    assert {"slurmdbd", "mariadb-server"} <= set(caught.value.packages)


def test_fake_gpus_are_distinct_character_devices(tmp_path: Path) -> None:
    found = devices.fake_gpus(tmp_path / "dev", 4)
    assert len(set(found)) == 4
    assert all(Path(path).is_char_device() and not Path(path).is_symlink() for path in found)


def test_a_process_with_a_recycled_pid_is_not_touched() -> None:
    child = subprocess.Popen(["sleep", "30"])
    try:
        ticks = processes.start_ticks(child.pid)
        assert ticks is not None
        real = processes.ProcessRecord("sleep", child.pid, ticks)
        stranger = dataclasses.replace(real, start_ticks=ticks + 1)
        assert real.alive()
        assert not stranger.alive()
        stranger.send(signal.SIGKILL)
        assert processes.stop([stranger], term_s=1) == []
        assert child.poll() is None
        assert processes.stop([real], term_s=1) == []
        assert not real.alive()
    finally:
        child.kill()
        child.wait()


def test_our_own_environment_is_no_mark_of_a_job() -> None:
    """`down` must not end the shell of a user who exported SLURM_CONF."""
    child = subprocess.Popen(["sleep", "30"], env={**os.environ, "SLURM_CONF": "/tmp/x/etc/slurm.conf"})
    try:
        left = processes.left_by("no-such-token", {"SLURM_CONF": "/tmp/x/etc/slurm.conf"}, ["policy1"], [])
        assert child.pid not in [record.pid for record in left]
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("spec", [default_spec(), THIRTEEN, default_spec(gpus=0)])
def test_the_site_profiles_are_valid(spec: ProfileSpec, tmp_path: Path) -> None:
    profile.write(spec, tmp_path)
    site = read_site(DevCluster(tmp_path, spec).site_profile)
    assert site.gpus.style == "none"
    assert site.partitions["rollout"] == spec.partition_of("rollout")
    gpu_file = DevCluster(tmp_path, spec).gpu_site_profile
    if not profile.has_gpus(spec):
        assert gpu_file is None
    else:
        assert gpu_file is not None
        assert read_site(gpu_file).gpus.per_node == 4


@pytest.mark.parametrize("name", ["has space", "x" * 90])
def test_a_folder_that_slurm_or_a_socket_cannot_use_is_refused(name: str, tmp_path: Path) -> None:
    missing = missing_packages()
    if missing:
        pytest.skip(f"needs the Debian packages {' '.join(missing)}")
    with pytest.raises(DevClusterError, match="--dir"):
        DevCluster(tmp_path / name).up()
    assert not (tmp_path / name).exists()
