"""The strict schema of a recipe (design: "Recipe"). Unknown keys are errors; all defaults are here.

No torch, no file access: loading, `extends` and messages are in `recipe/load.py` and neighbours.
Sections that an extension defines (`algorithm`, each `reward`, `rollout.engine_options`) are kept as
mappings here and validated against the extension's own pydantic `Config` by `recipe/extensions.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_MAX_COUNT = 2**31 - 1  # Slurm, NCCL and vLLM count in 32 bits
Positive = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
NonNegative = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
Steps = Annotated[int, Field(ge=1, le=99_999_999)]  # names of checkpoints sort by their eight digits
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what numpy, which vLLM seeds, takes
Beta = Annotated[float, Field(ge=0, lt=1)]


def _memory(text: str) -> str:
    if re.fullmatch(r"[0-9]{1,12}([KMGT]B?)?", text, re.IGNORECASE) is None:
        raise ValueError("must be a size as sbatch takes it, such as 500G (0: all of a node)")
    return text


MemorySize = Annotated[str, AfterValidator(_memory)]


def _kind(value: object) -> object:
    """The design has a third kind, and no algorithm of this version is of it."""
    if value == "preference":
        raise ValueError("preference is not in this version; allowed: sft, rl")
    return value


Kind = Annotated[Literal["sft", "rl"], BeforeValidator(_kind)]


class Section(BaseModel):
    """A strict mapping: unknown keys are refused, values are not coerced between kinds."""

    model_config = ConfigDict(
        extra="forbid", strict=False, validate_default=True, defer_build=True, allow_inf_nan=False
    )


class Model(Section):
    path: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    lora: dict[str, Any] | None = None


class DatasetSpec(Section):
    """Where rows come from and which columns mean what.

    `template` is a `str.format` string over the row's columns and makes the prompt text;
    without it the `prompt` column is used. `chat` applies the tokenizer's chat template
    (null: if it has one).
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal["prompt_answer", "prompt_completion", "chat", "text"] = "prompt_answer"
    prompt: str = "prompt"
    answer: str = "answer"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    template: str | None = None
    system: str | None = None
    chat: bool | None = None
    limit: Positive | None = None
    shuffle: bool = True


class Data(Section):
    train: DatasetSpec
    eval: DatasetSpec | None = None


class PolicyParallel(Section):
    dp_replicate: Positive = 1
    dp_shard: Positive = 1
    tp: Positive = 1
    pp: Positive = 1
    cp: Positive = 1
    ep: Positive = 1


class Optimizer(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-6, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, ge=0)
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0


class Policy(Section):
    trainer: str = "fsdp2"
    parallel: PolicyParallel = PolicyParallel()
    batch_size: Positive = 256
    micro_batch_tokens: Positive | None = 16384
    micro_batch_size: Positive | None = None
    max_length: Positive | None = None
    steps: Steps | None = None
    epochs: Positive | None = None
    optimizer: Optimizer = Optimizer()
    activation_checkpointing: bool = False
    trainer_options: dict[str, Any] = {}


class RolloutParallel(Section):
    tp: Positive = 1
    pp: Positive = 1


class WeightSync(Section):
    transport: str = "auto"  # auto | nccl | gloo | a plugin's
    bucket_mb: Positive = 256
    timeout_s: float = Field(default=300.0, gt=0)


class Rollout(Section):
    engine: str = "vllm"
    replicas: Positive = 1
    parallel: RolloutParallel = RolloutParallel()
    max_tokens: Positive = 1024
    max_model_len: Positive | None = None
    max_in_flight: Positive = 64  # prompt groups per replica
    stop: list[str] = []
    weights: WeightSync = WeightSync()
    engine_options: dict[str, Any] = {}


class Checkpoint(Section):
    enabled: bool = True
    save_every: Positive = 50
    max_keep: int = Field(default=2, ge=-1)
    mode: Literal["async", "sync"] = "async"
    export: Literal["off", "final", "all"] = "final"
    upload_hub: str | None = None
    upload_s3: str | None = None


class Eval(Section):
    every: NonNegative = 25  # 0: only at the ends
    before: bool = True
    max_tokens: Positive | None = None


class Wandb(Section):
    mode: Literal["online", "offline", "off"] = "offline"
    project: str = "hpc-rl"
    entity: str | None = None


class Logging(Section):
    wandb: Wandb = Wandb()


class ControllerOptions(Section):
    separate: bool = False
    redis_server: str | None = None
    partition: str | None = None
    cpus: Positive = 2
    mem: MemorySize | None = None
    sbatch: list[str] = []


class GroupOptions(Section):
    """Slurm options of one component. Null means: the site's value for this role."""

    nodes: Positive = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: Positive | None = None
    mem: MemorySize | None = None
    gpus_per_node: NonNegative | None = None
    image: str | None = None
    variables: dict[str, str] = {}
    sbatch: list[str] = []


class Cluster(Section):
    site: str = "auto"
    placement: Literal["het", "shared", "split", "local"] | None = None  # null: the site's default
    time: str = "08:00:00"
    variables: dict[str, str] = {}
    secrets: list[str] = []
    controller: ControllerOptions = ControllerOptions()
    policy: GroupOptions = GroupOptions()
    rollout: GroupOptions = GroupOptions()
    reward: GroupOptions | None = None
    template: str | None = None
    signal_seconds: Positive = 300
    shared_run: bool = False


class Recipe(Section):
    """A whole recipe. `algorithm` and `reward` are validated further by their extensions."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    kind: Kind
    extends: str | None = None
    seed: Seed = 0
    output_root: str = "runs"
    plugins: list[str] = []
    model: Model
    data: Data
    algorithm: dict[str, Any] = {}
    reward: list[dict[str, Any]] = []
    simulator: dict[str, Any] | None = None
    policy: Policy = Policy()
    rollout: Rollout | None = None
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()
