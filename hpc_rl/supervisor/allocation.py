"""What the supervisor was given to run on: a Slurm job's nodes, or this machine."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hpc_rl.bus.network import LOOPBACK, NoAddress, host_address, interface_address, route_address
from hpc_rl.cluster.slurm.commands import SlurmError, check_slurm
from hpc_rl.plan.schema import Plan

# Slurm's default KillWait, where it cannot be asked.
_KILL_WAIT_S = 30.0


class NoAllocation(ValueError):
    """The plan is for Slurm, but this process is not in a Slurm job."""


@dataclass(frozen=True)
class Allocation:
    """`nodes` are the node lists of the components, as Slurm writes them.

    `term_grace_s`: how long everything may take after SIGTERM before Slurm's SIGKILL.
    """

    job_id: str | None
    restart_count: int
    nodes: list[str]
    term_grace_s: float
    node_name: str


def current_allocation(plan: Plan, environ: Mapping[str, str] | None = None) -> Allocation:
    """The allocation of this process. Raises NoAllocation outside a job, unless the plan is local."""
    environ = os.environ if environ is None else environ
    if plan.placement == "local":
        return Allocation(None, 0, [socket.gethostname()], 5.0, socket.gethostname())
    job_id = environ.get("SLURM_JOB_ID")
    if job_id is None:
        raise NoAllocation(
            f"placement {plan.placement} needs a Slurm allocation, and SLURM_JOB_ID is not set: "
            "use `hpc-rl submit`, or `cluster.placement=local`"
        )
    names = [environ[name] for name in _nodelist_names(environ)]
    grace = min(5.0, max(1.0, _kill_wait_s() - 2.0))
    restart = int(environ.get("SLURM_RESTART_COUNT", "0"))
    return Allocation(job_id, restart, names, grace, environ.get("SLURMD_NODENAME", socket.gethostname()))


def _nodelist_names(environ: Mapping[str, str]) -> list[str]:
    groups = [name for name in environ if re.fullmatch(r"SLURM_JOB_NODELIST_HET_GROUP_\d+", name)]
    if groups:
        return sorted(groups, key=lambda name: int(name.rpartition("_")[2]))
    return ["SLURM_JOB_NODELIST"] if "SLURM_JOB_NODELIST" in environ else []


def _kill_wait_s() -> float:
    try:
        text = check_slurm(["scontrol", "show", "config"])
    except SlurmError:
        return _KILL_WAIT_S
    found = re.search(r"^KillWait\s*=\s*(\d+)", text, re.MULTILINE)
    return float(found.group(1)) if found else _KILL_WAIT_S


def bus_hosts(plan: Plan, allocation: Allocation) -> list[str]:
    """The addresses Redis listens on: the one other nodes reach first, then loopback.

    One node needs loopback only. Otherwise it is the site's interface, or the address on the route to
    another node of the job. Raises NoAddress.
    """
    if allocation.job_id is None:
        return [LOOPBACK]
    interface = (plan.site_profile.get("network") or {}).get("interface")
    if interface:
        return [interface_address(interface), LOOPBACK]
    others = [name for name in _expand(allocation.nodes) if name != allocation.node_name]
    if not others:
        return [LOOPBACK]
    return [route_address(_address_of(others[-1])), LOOPBACK]


def _expand(nodes: list[str]) -> list[str]:
    return check_slurm(["scontrol", "show", "hostnames", ",".join(nodes)]).split()


def _address_of(node: str) -> str:
    """The address of a Slurm node: node names need not be host names."""
    try:
        return host_address(node)
    except NoAddress:
        text = check_slurm(["scontrol", "-o", "show", "node", node])
        found = re.search(r"\bNodeAddr=(\S+)", text)
        if found is None:
            raise
        return host_address(found.group(1))
