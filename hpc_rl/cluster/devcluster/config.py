"""The configuration files of the devcluster's daemons, as text. Pure functions; nothing is started here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.cluster.devcluster.spec import PartitionSpec, ProfileSpec

CLUSTER_NAME = "devcluster"


@dataclass(frozen=True)
class Layout:
    """Every path and port of one devcluster below its folder `root`."""

    root: Path
    host: str
    user: str
    ctld_port: int
    node_ports: Mapping[str, int]
    dbd_port: int | None

    @property
    def conf(self) -> Path:
        return self.root / "etc" / "slurm.conf"

    @property
    def dbd_conf(self) -> Path:
        return self.root / "etc" / "slurmdbd.conf"

    @property
    def gres_conf(self) -> Path:
        return self.root / "etc" / "gres.conf"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def munge_socket(self) -> Path:
        return self.root / "munge" / "socket"

    @property
    def munge_key(self) -> Path:
        return self.root / "munge" / "key" / "munge.key"

    @property
    def mysql_socket(self) -> Path:
        return self.root / "mysql" / "socket"

    @property
    def mysql_data(self) -> Path:
        return self.root / "mysql" / "data"

    @property
    def devices(self) -> Path:
        return self.root / "dev"


def slurm_conf(spec: ProfileSpec, layout: Layout) -> str:
    """slurm.conf: quick to schedule, quick to requeue, no cgroups, no memory limit really enforced.

    `cred_expire` decides how long a requeued job must wait (its value + 1 s; Slurm's default is 120 s).
    """
    state = layout.root / "state"
    values = {
        "ClusterName": CLUSTER_NAME,
        "SlurmctldHost": f"{layout.host}(127.0.0.1)",
        "SlurmctldPort": layout.ctld_port,
        "SlurmUser": layout.user,
        "SlurmdUser": layout.user,
        "StateSaveLocation": state / "ctld",
        "SlurmdSpoolDir": state / "%n",
        "SlurmctldPidFile": layout.root / "run" / "slurmctld.pid",
        "SlurmdPidFile": layout.root / "run" / "slurmd-%n.pid",
        "SlurmctldLogFile": layout.logs / "slurmctld.log",
        "SlurmdLogFile": layout.logs / "slurmd-%n.log",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket},cred_expire=5",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "GresTypes": "gpu",
        "SlurmdParameters": "config_overrides",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": (
            "bf_interval=1,sched_interval=1,bf_hetjob_immediate,bf_continue,batch_sched_delay=0,"
            "sched_min_interval=100000"
        ),
        "ReturnToService": 2,
        "JobRequeue": 1,
        "KillWait": spec.kill_wait_s,
        "MinJobAge": 300,
        "InactiveLimit": 0,
        "SlurmctldTimeout": 30,
        "SlurmdTimeout": 30,
        "SlurmctldDebug": "info",
        "SlurmdDebug": "info",
        **_preemption(spec),
        **_accounting(spec, layout),
        **spec.parameters,
    }
    lines = ["# Written by hpc-rl devcluster; removed by `hpc-rl devcluster down`."]
    lines += [f"{key}={value}" for key, value in values.items()]
    lines += [_node_lines(part, layout) for part in spec.partitions if part.nodes]
    lines += [_partition_line(spec, part) for part in spec.partitions]
    return "\n".join(lines) + "\n"


def _preemption(spec: ProfileSpec) -> dict[str, object]:
    if len({part.priority_tier for part in spec.partitions}) < 2:
        return {}
    return {
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
    }


def _accounting(spec: ProfileSpec, layout: Layout) -> dict[str, object]:
    if layout.dbd_port is None:
        return {"AccountingStorageType": "accounting_storage/none"}
    values: dict[str, object] = {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": layout.dbd_port,
        # Without it slurmctld talks to slurmdbd through the installed munge socket and is refused.
        "AccountingStoragePass": layout.munge_socket,
        "AccountingStorageTRES": "gres/gpu",
    }
    if spec.accounts or spec.qos:
        values["AccountingStorageEnforce"] = "associations,limits,qos"
    return values


def _node_lines(part: PartitionSpec, layout: Layout) -> str:
    """One line per node: fake nodes differ in their port alone."""
    gres = ""
    if part.gpus:
        kind = f"{part.gpu_type}:" if part.gpu_type else ""
        gres = f" Gres=gpu:{kind}{part.gpus}"
    features = f" Feature={','.join(part.features)}" if part.features else ""
    return "\n".join(
        f"NodeName={node} NodeHostname={layout.host} NodeAddr=127.0.0.1 Port={layout.node_ports[node]} "
        f"CPUs={part.cpus} RealMemory={part.memory_mb} State=UNKNOWN{gres}{features}"
        for node in part.own_nodes
    )


def _partition_line(spec: ProfileSpec, part: PartitionSpec) -> str:
    default = "YES" if part.default else "NO"
    limit = part.max_minutes if part.max_minutes is not None else "INFINITE"
    # A step that asks for nothing must not take a node's whole memory and block its neighbours.
    line = (
        f"PartitionName={part.name} Nodes={','.join(spec.nodes_of(part))} Default={default} MaxTime={limit} "
        f"PriorityTier={part.priority_tier} DefMemPerCPU={max(1, part.memory_mb // part.cpus)} State=UP"
    )
    if part.grace_s:
        line += f" GraceTime={part.grace_s}"
    tiers = [p.priority_tier for p in spec.partitions]
    if max(tiers) > min(tiers) and part.priority_tier == max(tiers):
        line += " PreemptMode=OFF"
    return line


def gres_conf(spec: ProfileSpec, devices: Sequence[str]) -> str:
    """gres.conf: the first `gpus` of `devices` on every node of a partition (nodes share the devices)."""
    lines = []
    for part in spec.partitions:
        kind = f" Type={part.gpu_type}" if part.gpu_type else ""
        for device in devices[: part.gpus]:
            lines += [f"NodeName={','.join(part.own_nodes)} Name=gpu{kind} File={device}"]
    return "\n".join(["AutoDetect=off", *lines]) + "\n"


def slurmdbd_conf(layout: Layout) -> str:
    """slurmdbd.conf (must be mode 0600). The database is reached through its socket: see MYSQL_UNIX_PORT."""
    return "\n".join(
        [
            f"DbdHost={layout.host}",
            "DbdAddr=127.0.0.1",
            f"DbdPort={layout.dbd_port}",
            f"SlurmUser={layout.user}",
            f"AuthInfo=socket={layout.munge_socket}",
            "AuthType=auth/munge",
            f"LogFile={layout.logs / 'slurmdbd.log'}",
            f"PidFile={layout.root / 'run' / 'slurmdbd.pid'}",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",  # the database's root: no password, reachable through a private socket only
            "StorageLoc=devcluster",
            "DebugLevel=info",
            "",
        ]
    )
