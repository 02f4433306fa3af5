"""The plan: recipe + site worked out into groups of nodes and tasks. Pure data, `plan.json` on disk."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Role = Literal["controller", "policy", "rollout", "reward", "teacher", "simulator"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Group(_Data):
    """The nodes and tasks of one role: one component of the heterogeneous job.

    Under `shared`, `first_node` is the index of the group's first node in the one allocation.
    `tasks` is the number of role processes over all `nodes` (policy: ranks; rollout: replicas).
    `gpus_per_task` GPUs belong to each; 0 on a CPU site. `component` is the `--het-group` number,
    None under `local`; under `shared` all groups are component 0. Null `mem`, `partition` and so on:
    neither recipe nor site says anything.
    """

    role: Role
    component: int | None
    job_name: str
    nodes: int
    tasks: int
    tasks_per_node: int
    first_node: int = 0
    cpus_per_task: int
    gpus_per_task: int
    gpus_per_node: int
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    image: str | None = None
    variables: dict[str, str] = {}
    sbatch: list[str] = []


class Mesh(_Data):
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp * self.pp * self.cp


class MemoryEstimate(_Data):
    """GiB per rank. `trained` are the parameters that have gradients; `on_host`: the sharded state lies in
    the node's memory (`policy.cpu_offload`), not on the GPU."""

    parameters: int
    trained: int | None = None
    weights_gb: float
    gradients_gb: float
    optimizer_gb: float
    ema_gb: float = 0.0
    reference_gb: float = 0.0
    on_host: bool = False
    gpu_gb: float | None = None

    @property
    def total_gb(self) -> float:
        return self.weights_gb + self.gradients_gb + self.optimizer_gb + self.ema_gb + self.reference_gb


class Plan(_Data):
    name: str
    kind: str
    placement: Literal["het", "shared", "split", "local"]
    site: str
    time_minutes: int
    groups: list[Group]
    mesh: Mesh
    prompts_per_step: int = 0
    total_steps: int | None = None  # None: known only after the data is counted (epochs)
    memory: MemoryEstimate | None = None
    pair_cost: float = 0.0  # of attention (catalog.flops); 0: the model's sizes are not known
    lora_sync: Literal["merged", "adapter"] | None = None  # None: no adapters, or no rollouts
    notes: list[str] = []
    warnings: list[str] = []
    site_profile: dict[str, Any] = {}

    def group(self, role: str) -> Group:
        """The group of `role`. Raises KeyError if the plan has none."""
        for group in self.groups:
            if group.role == role:
                return group
        raise KeyError(f"the plan has no {role} group")
