"""The strict schema of a site profile: what one cluster is like. Finding profiles: `cluster/sites.py`.

It lives in this room because the plan is worked out from it; `plan.json` keeps a copy.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpc_rl.recipe.schema import MemorySize, NonNegative, Positive, Section

RoleName = Literal["controller", "policy", "rollout", "reward", "teacher", "simulator"]
PerRole = dict[RoleName, str]


class Detect(Section):
    """How `site: auto` recognises this cluster; either match is enough."""

    cluster_name: str | None = None  # ClusterName of scontrol show config
    hostname: str | None = None  # regular expression, matched from the start of the full host name


class Gpus(Section):
    """GPUs of a node. `per_node` null under `local`: count the devices of this machine."""

    style: Literal["gres", "gpus_per_node", "gpus_per_task", "none"] = "none"
    type: str | None = None  # for gres and gpus: gpu:TYPE:N
    per_node: NonNegative | None = None
    memory_gb: float | None = Field(default=None, gt=0)


class Cpus(Section):
    per_node: Positive | None = None
    per_gpu: Positive | None = None


class Memory(Section):
    per_node: MemorySize | None = None  # as sbatch --mem takes it: 500G, or 0 for all


class Container(Section):
    """Only role steps enter the image; supervisor and controller run on the host."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    images: PerRole = {}
    mounts: list[str] = []
    args: list[str] = []
    python: str = "python3"  # the interpreter inside the images


class Network(Section):
    interface: str | None = None  # for example ib0; null: the route to the other nodes


class Paths(Section):
    output_root: str | None = None  # used where the recipe names none
    hf_home: str | None = None  # shared cache of models and data; null: the user's own
    local: str = "/tmp"  # node-local scratch for compile caches and the bus


class Site(Section):
    """One cluster (or this machine). Everything a recipe leaves null comes from here."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    description: str = ""
    detect: Detect = Detect()
    placement: Literal["het", "shared", "split", "local"] = "het"
    partitions: PerRole = {}
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: Gpus = Gpus()
    cpus: Cpus = Cpus()
    mem: Memory = Memory()
    time_max: str | None = None
    setup: list[str] = []  # shell lines of the job script, such as module loads
    python: str | None = None  # null: the interpreter that submits
    container: Container = Container()
    network: Network = Network()
    paths: Paths = Paths()
    variables: dict[str, str] = {}
    requeue: bool = True
    template: str | None = None
    sbatch: dict[RoleName, list[str]] = {}
