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


Kind = Literal["sft", "preference", "rl"]


class Section(BaseModel):
    """A strict mapping: unknown keys are refused, values are not coerced between kinds."""

    model_config = ConfigDict(
        extra="forbid", strict=False, validate_default=True, defer_build=True, allow_inf_nan=False
    )


def _local_folder(text: str) -> str:
    if not text.startswith(("/", "~", "$")):
        raise ValueError("must be an absolute path of the nodes, such as /scratch/models or $TMPDIR/models")
    return text


LocalFolder = Annotated[str, AfterValidator(_local_folder)]


class Lora(Section):
    """Low-rank adapters through PEFT; the other weights are frozen (`modules_to_save` excepted).

    `target_modules` are names of layers, whole or the end of one. `target_parameters` are tensors that are no
    linear layer's, such as `experts.gate_up_proj` and `experts.down_proj` of mixtures of experts, each expert
    with an adapter of rank `r`. `adapter` is a saved adapter to go on from:
    rank, scale and targets are its own then, `dropout` is the recipe's.
    """

    r: Positive = 16
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    exclude_modules: list[str] = []
    target_parameters: list[str] = []
    modules_to_save: list[str] = []
    use_rslora: bool = False
    r_pattern: dict[str, Positive] = {}
    alpha_pattern: dict[str, float] = {}
    adapter: str | None = None
    export: Literal["merged", "adapter"] = "merged"


class Model(Section):
    """`train` and `freeze` are regular expressions searched in parameter names (as in memory): with
    `train`, only parameters that match one are trained; those that match one of `freeze` never are.
    `stage` is a folder on each node's own disk; the model is copied there once per node and read from it."""

    path: str
    revision: str | None = None
    stage: LocalFolder | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    train: list[str] = []
    freeze: list[str] = []
    lora: Lora | None = None


class DatasetSpec(Section):
    """Where rows come from and which columns mean what.

    `template` is a `str.format` string over the row's columns and makes the prompt text;
    without it the `prompt` column is used. `chat` applies the tokenizer's chat template
    (null: if it has one). `train_on` says which messages of a chat are learned: all of the assistant's,
    or the last one. Format preference has its answers in `chosen` and `rejected`. `overlong` is what happens
    to rows above `policy.max_length`. Media files are found under `media_path`; without it the rows hold
    whole paths. `fps` and `max_frames` sample videos.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal[
        "prompt_answer", "prompt_completion", "chat", "text", "llava", "cosmos_reason1", "preference"
    ] = "prompt_answer"
    prompt: str = "prompt"
    answer: str = "answer"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    chosen: str = "chosen"
    rejected: str = "rejected"
    template: str | None = None
    system: str | None = None
    chat: bool | None = None
    train_on: Literal["assistant", "last"] = "assistant"
    repair: list[Literal["merge_roles", "move_system", "drop_empty"]] = []
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    media_path: str | None = None
    images: str = "images"
    videos: str = "videos"
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    fps: float = Field(default=2.0, gt=0, le=240)
    max_frames: Positive = 32
    limit: Positive | None = None
    shuffle: bool = True


class Data(Section):
    """`workers` threads read and encode the next batch while a step runs (0: the step waits for it).
    `holdout` takes that many rows of `train` for validation where `eval` is null (below 1: a share)."""

    train: DatasetSpec
    eval: DatasetSpec | None = None
    holdout: float = Field(default=0.0, ge=0)
    workers: NonNegative = 2


class PolicyParallel(Section):
    dp_replicate: Positive = 1
    dp_shard: Positive = 1
    tp: Positive = 1
    pp: Positive = 1
    cp: Positive = 1
    ep: Positive = 1


class ParameterGroup(Section):
    """Parameters whose name matches the regular expression `match` (the first group that does wins)."""

    match: str
    lr: float | None = Field(default=None, ge=0)  # null: the optimizer's
    weight_decay: float | None = Field(default=None, ge=0)  # null: the optimizer's


class Optimizer(Section):
    """`schedule` after a linear warm-up: constant; linear or cosine down to `min_lr`; or wsd, constant and
    then linear to `min_lr` over the last `decay_steps` (null: the last tenth of all steps)."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-6, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, ge=0)
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegative = 0
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)  # of all steps, instead of warmup_steps
    decay_steps: Positive | None = None
    min_lr: float = Field(default=0.0, ge=0)
    groups: list[ParameterGroup] = []


class Ema(Section):
    """An exponential moving average of the trained weights, kept beside them in fp32; exports are of it."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    start_step: NonNegative = 0


class Guard(Section):
    """When to stop a run that goes wrong: a loss or gradient that is not finite always does; with `spike`,
    so do `patience` steps in a row whose loss is above `spike` times the median of the last `window`."""

    spike: float | None = Field(default=None, gt=1)
    window: Annotated[int, Field(ge=2, le=100_000)] = 50
    patience: Positive = 3


class Profile(Section):
    """torch.profiler over `steps` steps from step `start` on `ranks`; traces go to `<run>/profile/`."""

    start: Steps = 10
    steps: Positive = 3
    ranks: list[NonNegative] = [0]
    memory: bool = False


class Reference(Section):
    """The frozen model that a KL penalty or a preference loss holds the policy to, made where one is needed.

    `path` null: the model that the run began with. `full` is a second copy, sharded as the policy is (with
    `cpu_offload` its shards lie on the host); `lora_off` is the policy's own model with its adapters off;
    auto takes that wherever it is the same. `reset_every` makes it the current policy every so many steps.
    """

    path: str | None = None
    revision: str | None = None
    mode: Literal["auto", "full", "lora_off"] = "auto"
    reset_every: Positive | None = None
    cpu_offload: bool = False


class Updates(Section):
    """Optimizer updates of one step on rollouts: its trajectories in `mini_batches` parts, `epochs` times."""

    mini_batches: Positive = 1
    epochs: Positive = 1


class Policy(Section):
    """`batch_size` counts sequences; `batch_tokens` makes batches of about so many tokens instead, packed
    best-fit decreasing into rows of `micro_batch_tokens` as the rows come."""

    trainer: str = "fsdp2"
    parallel: PolicyParallel = PolicyParallel()
    batch_size: Positive = 256
    batch_tokens: Positive | None = None
    micro_batch_tokens: Positive | None = 16384
    micro_batch_size: Positive | None = None
    max_length: Positive | None = None
    steps: Steps | None = None
    epochs: Positive | None = None
    optimizer: Optimizer = Optimizer()
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    ema: Ema | None = None
    reference: Reference = Reference()
    updates: Updates = Updates()
    guard: Guard = Guard()
    profile: Profile | None = None
    trainer_options: dict[str, Any] = {}


class RolloutParallel(Section):
    tp: Positive = 1
    pp: Positive = 1


class WeightSync(Section):
    """`lora` is what a run with `model.lora` sends: whole merged weights, or the adapter alone, which the
    engines keep beside the weights they loaded (auto: the adapter where that is proven to be the same).

    With `overlap` weights leave while the next step runs and arrive while generation goes on (null: yes, but
    with nccl); `mode: delta` sends what changed in bfloat16 weights. Both keep copies on the hosts.
    """

    transport: str = "auto"  # auto | nccl | gloo | a plugin's
    lora: Literal["auto", "merged", "adapter"] = "auto"
    mode: Literal["full", "delta"] = "full"
    overlap: bool | None = None
    bucket_mb: Positive = 64
    timeout_s: float = Field(default=300.0, gt=0)


class Teacher(Section):
    """The model that on-policy distillation learns from, in the processes of the `teacher` group. Its
    tokenizer must have the policy's tokens under the same numbers. `batch_tokens` bounds what goes through it
    at once, padding included; `limit_s` is how long that may take."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    batch_tokens: Positive = 8192
    limit_s: float = Field(default=120.0, gt=0)


class Rollout(Section):
    """`max_in_flight` is prompt groups per replica (auto: as many as its engine takes without a queue),
    `order` which finished prompt groups a step takes: those that would first be older than
    `algorithm.max_staleness` (deadline), or those that come next in the data (strict). `oversample` is the
    share of a step's prompt groups that is started beyond what it needs; the slowest are cancelled."""

    engine: str = "vllm"
    replicas: Positive = 1
    parallel: RolloutParallel = RolloutParallel()
    max_tokens: Positive = 1024
    max_model_len: Positive | None = None
    max_in_flight: Positive | Literal["auto"] = "auto"
    order: Literal["deadline", "strict"] = "deadline"
    oversample: float = Field(default=0.0, ge=0, le=1)
    stop: list[str] = []
    weights: WeightSync = WeightSync()
    engine_options: dict[str, Any] = {}


class HubUpload(Section):
    """The final export goes to the Hub repository `repo`; a bare name is one of the token's owner."""

    repo: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
    private: bool = True


class S3Upload(Section):
    """Checkpoints and exports go to `s3://bucket/prefix/<run>/`: the last ones (`final`) or `all`.

    Credentials are the four AWS_* variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_DEFAULT_REGION, and AWS_ENDPOINT_URL where it is not Amazon), named under `cluster.secrets`.
    """

    bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
    prefix: str = "hpc-rl"
    what: Literal["final", "all"] = "final"


def _hub(value: object) -> object:
    return {"repo": value} if isinstance(value, str) else value


def _s3(value: object) -> object:
    """`s3://bucket/prefix` says the same as a section."""
    if not isinstance(value, str):
        return value
    scheme, _, rest = value.partition("://")
    if scheme != "s3" or not rest:
        raise ValueError("must be s3://bucket/prefix, or a section with bucket, prefix and what")
    bucket, _, prefix = rest.partition("/")
    return {"bucket": bucket} | ({"prefix": prefix.strip("/")} if prefix.strip("/") else {})


class Checkpoint(Section):
    """`keep_best` keeps the checkpoint with the best validation besides the newest `max_keep`
    (-1: all). `stage` is a folder on each node's local disk for what is written before it is moved."""

    enabled: bool = True
    save_every: Positive = 50
    max_keep: int = Field(default=2, ge=-1)
    keep_best: bool = True
    mode: Literal["async", "sync"] = "async"
    export: Literal["off", "final", "all"] = "final"
    stage: str | None = None
    upload_hub: Annotated[HubUpload | None, BeforeValidator(_hub)] = None
    upload_s3: Annotated[S3Upload | None, BeforeValidator(_s3)] = None


class Eval(Section):
    """`samples` answers per prompt of `data.eval`, at `temperature` (0: greedy). An answer counts as a
    success in `eval/pass@k` if the first reward gives it at least `threshold`. `best` is the metric that the
    best checkpoint is chosen by (null: `eval/accuracy`, sft: `eval/loss`); `best_mode`: whether more or less
    of it is better (null: less of a loss or a length, more of anything else). With `only` the run evaluates
    once and trains nothing, and RL needs no policy group; `checkpoint` is a folder of a run's `checkpoints/`
    whose weights it takes instead of the model's (`hpc-rl eval` writes both)."""

    every: NonNegative = 25  # 0: only at the ends
    before: bool = True
    max_tokens: Positive | None = None
    samples: Annotated[int, Field(ge=1, le=4096)] = 1
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    threshold: float = 1.0
    best: str | None = None
    best_mode: Literal["max", "min"] | None = None
    only: bool = False
    checkpoint: str | None = None


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


class ScoringOptions(GroupOptions):
    """Of the groups `reward` and `teacher`: `replicas` processes, each with all models that its group serves
    on `gpus_per_replica` GPUs (with more than one, the layers of a model are spread over them)."""

    replicas: Positive = 1
    gpus_per_replica: Positive = 1


class Cluster(Section):
    site: str = "auto"
    placement: Literal["het", "shared", "split", "local"] | None = None  # null: the site's default
    time: str = "08:00:00"
    variables: dict[str, str] = {}
    secrets: list[str] = []
    controller: ControllerOptions = ControllerOptions()
    policy: GroupOptions = GroupOptions()
    rollout: GroupOptions = GroupOptions()
    reward: ScoringOptions | None = None  # null: the defaults, where a reward is served by a group
    teacher: ScoringOptions | None = None
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
    teacher: Teacher | None = None
    policy: Policy = Policy()
    rollout: Rollout | None = None
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()

    @property
    def supervised(self) -> bool:
        """Whether the policy trains on rows of data alone (sft, preference): a job of one component."""
        return self.kind != "rl"

    @property
    def has_policy(self) -> bool:
        """Whether policy processes run: where there is a loss to compute."""
        return self.supervised or not self.eval.only
