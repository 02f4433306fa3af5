"""Checks over several keys of one recipe; what needs the site as well is in the plan."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from hpc_rl.catalog.limits import ATTENTION, MAX_TEMPERATURE
from hpc_rl.recipe.episode_checks import check_episodes
from hpc_rl.recipe.eval_checks import check_evaluation
from hpc_rl.recipe.learner_checks import check_learner
from hpc_rl.recipe.messages import is_secret, nearest
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.scoring_checks import check_scoring
from hpc_rl.recipe.yaml_source import KeyPath, Problem, Source, Where, dotted

SECRET_NAME = re.compile(r"[A-Z_][A-Z0-9_]*\Z")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_N = r"\d{1,9}"
_TIME = re.compile(
    rf"(?:(?P<d>{_N})-(?P<dh>{_N})(?::(?P<dm>{_N}))?(?::(?P<ds>{_N}))?|(?P<t>{_N}(?::{_N}){{0,2}}))\Z"
)
_YEAR = 365 * 24 * 60  # minutes; Slurm takes a longer limit for no limit
# sbatch options that the plan writes itself, and the recipe key that sets them
_OWNED = {
    "time": "cluster.time",
    "t": "cluster.time",
    "nodes": "cluster.<role>.nodes",
    "N": "cluster.<role>.nodes",
    "partition": "cluster.<role>.partition",
    "p": "cluster.<role>.partition",
    "account": "cluster.<role>.account",
    "A": "cluster.<role>.account",
    "qos": "cluster.<role>.qos",
    "q": "cluster.<role>.qos",
    "constraint": "cluster.<role>.constraint",
    "C": "cluster.<role>.constraint",
    "mem": "cluster.<role>.mem",
    "cpus-per-task": "cluster.<role>.cpus_per_task",
    "c": "cluster.<role>.cpus_per_task",
    "gres": "cluster.<role>.gpus_per_node and the site's gpus",
    "gpus": "cluster.<role>.gpus_per_node and the site's gpus",
    "gpus-per-node": "cluster.<role>.gpus_per_node",
    "gpus-per-task": "the site's gpus.style",
    "G": "cluster.<role>.gpus_per_node",
    "ntasks": "policy.parallel and rollout.replicas",
    "n": "policy.parallel and rollout.replicas",
    "ntasks-per-node": "policy.parallel and rollout.replicas",
    "job-name": "name",
    "J": "name",
    "signal": "cluster.signal_seconds",
    "export": "cluster.variables and cluster.secrets",
}
_FORBIDDEN = (
    *("output", "o", "error", "e", "requeue", "no-requeue", "array", "a", "open-mode", "wrap", "parsable"),
    *("chdir", "D"),
)

# kinds without rollouts -> their algorithm (preference: or a plugin's)
SUPERVISED = {"sft": "sft", "preference": "dpo"}

# key that a message is about -> keys that it must agree with
AGREE: dict[KeyPath, tuple[KeyPath, ...]] = {
    ("policy", "batch_size"): (("policy", "parallel"), ("algorithm", "group_size")),
    ("policy", "batch_tokens"): (("policy", "micro_batch_tokens"),),
    ("policy", "parallel"): (("cluster", "policy"),),
    ("policy", "optimizer", "decay_steps"): (("policy", "steps"), ("policy", "optimizer")),
    ("policy", "optimizer", "min_lr"): (("policy", "optimizer"),),
    ("policy", "parallel", "tp"): (("model", "path"),),
    ("rollout", "parallel"): (("cluster", "rollout"),),
    ("rollout", "parallel", "tp"): (("model", "path"),),
    ("rollout", "replicas"): (("rollout", "parallel"), ("cluster", "rollout")),
    ("rollout", "max_model_len"): (("rollout", "max_tokens"), ("model", "path")),
    ("rollout", "max_tokens"): (("model", "path"),),
    ("algorithm", "temperature"): (("rollout", "engine"),),
    ("eval", "temperature"): (("rollout", "engine"),),
    ("eval", "samples"): (("eval", "temperature"),),
    ("eval", "best"): (("eval", "samples"), ("reward",), ("data", "eval")),
    ("algorithm", "overlong_buffer"): (("rollout", "max_tokens"),),
    ("cluster", "signal_seconds"): (("cluster", "time"),),
    ("cluster", "time"): (("cluster", "site"),),
    # rows are judged by all keys of their section
    ("data", "train"): (("data", "train"),),
    ("data", "eval"): (("data", "eval"),),
}


def blamed(source: Source, path: KeyPath) -> Where | None:
    """The place to name for a mistake at `path`: where it was written, but an override of a key that it
    must agree with, if there is one. What was written last is what broke the agreement."""
    place = source.where(path)
    if place is not None and place.override:
        return place
    for other in AGREE.get(path, ()):
        for written, there in source.places.items():
            if written[: len(other)] == other and there.override:
                return there
    return place


def parse_time(text: str) -> int:
    """Minutes (rounded up) of a Slurm time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ValueError."""
    match = _TIME.match(text)
    if match is None:
        raise ValueError("must be a Slurm time such as 90 (minutes), 08:00:00 or 1-12:00:00")
    if match["t"]:
        parts = [int(part) for part in match["t"].split(":")]
        # one number is minutes, two are minutes:seconds, three are hours:minutes:seconds
        hours, minutes, seconds = [(0, *parts, 0), (0, *parts), tuple(parts)][len(parts) - 1]
        carried = [minutes] if len(parts) == 3 else []  # minutes come after hours
    else:
        hours = int(match["d"]) * 24 + int(match["dh"])
        minutes, seconds = int(match["dm"] or 0), int(match["ds"] or 0)
        carried = [minutes]
    if any(number > 59 for number in (*carried, seconds)):
        raise ValueError("must have minutes and seconds below 60, as in 08:00:00")
    total = hours * 3600 + minutes * 60 + seconds
    if total < 60:
        raise ValueError("must be at least one minute")
    if total > _YEAR * 60:
        raise ValueError("must be at most 365 days, the longest time that Slurm counts")
    return -(-total // 60)


def cross_checks(recipe: Recipe, source: Source) -> list[Problem]:
    """Everything that can be said without the site."""
    problems: list[Problem] = []

    def bad(message: str, *path: str | int) -> None:
        place = blamed(source, path)
        problems.append(Problem(str(place) if place else "", dotted(path), message))

    for checker in (
        _kind,
        check_episodes,
        _model,
        _data,
        _length,
        _batch,
        _optimizer,
        _guard,
        _rollout,
        _cluster,
        check_evaluation,
        check_learner,
        check_scoring,
    ):
        for path, message in checker(recipe):
            bad(message, *path)
    if "micro_batch_size" in recipe.policy.model_fields_set and recipe.policy.micro_batch_size is not None:
        if "micro_batch_tokens" not in recipe.policy.model_fields_set:
            recipe.policy.micro_batch_tokens = None
        elif recipe.policy.micro_batch_tokens is not None:
            bad(
                "micro_batch_size and micro_batch_tokens are both set; keep one", "policy", "micro_batch_size"
            )
    elif recipe.policy.micro_batch_tokens is None:
        text = "set micro_batch_tokens, or micro_batch_size where nothing is packed"
        bad(text, "policy", "micro_batch_tokens")
    return problems


Found = Iterator[tuple[KeyPath, str]]


def _kind(recipe: Recipe) -> Found:
    if recipe.kind == "rl":
        if recipe.rollout is None:
            yield ("rollout",), "kind rl needs a rollout section (engine, replicas, max_tokens)"
        name = recipe.algorithm.get("name")
        if not recipe.reward and recipe.simulator is None and name != "distill":
            yield ("reward",), "kind rl needs at least one reward, for example [{name: gsm8k, weight: 1.0}]"
        if name in SUPERVISED.values():
            kind = next(kind for kind, own in SUPERVISED.items() if own == name)
            yield ("algorithm", "name"), f"is {name!r}, which belongs to kind {kind}; for kind rl use grpo"
        return
    for name, present in (
        ("rollout", recipe.rollout is not None),
        ("reward", bool(recipe.reward)),
        ("simulator", recipe.simulator is not None),
    ):
        if present:
            empty = "[]" if name == "reward" else "null"
            yield (name,), f"kind {recipe.kind} has no {name}; remove it, or write {empty} if it is inherited"
    wanted, found = SUPERVISED[recipe.kind], recipe.algorithm.get("name")
    if found not in (None, wanted) and (recipe.kind == "sft" or not recipe.plugins):
        yield ("algorithm", "name"), f"is {found!r}; kind {recipe.kind} has algorithm {wanted} (or none)"


def _model(recipe: Recipe) -> Found:
    if recipe.model.dtype == "float16" and recipe.policy.trainer == "fsdp2":
        text = "is 'float16'; gradients underflow in it without loss scaling: use bfloat16 or float32"
        yield ("model", "dtype"), text
    name = recipe.model.attn_implementation
    if name is not None and name not in ATTENTION and "/" not in name and not recipe.plugins:
        guess = nearest(name, list(ATTENTION))
        hint = f". Did you mean {guess!r}?" if guess else ""
        yield ("model", "attn_implementation"), f"is {name!r}; allowed: {', '.join(ATTENTION)}{hint}"
    lora = recipe.model.lora
    if lora is None:
        return
    for key in ("train", "freeze"):
        if getattr(recipe.model, key):
            text = "with model.lora only the adapters are trained; use lora.modules_to_save for whole modules"
            yield ("model", key), text
    if recipe.kind == "rl" and lora.dropout > 0:
        text = f"is {lora.dropout:g}; the sampler has no dropout, so the ratio would be wrong: set it to 0"
        yield ("model", "lora", "dropout"), text
    elif recipe.policy.parallel.tp > 1 and lora.dropout > 0 and recipe.policy.trainer == "fsdp2":
        text = f"is {lora.dropout:g}; with policy.parallel.tp each rank would draw another mask: set it to 0"
        yield ("model", "lora", "dropout"), text
    elif lora.target_parameters and lora.dropout > 0:
        text = f"is {lora.dropout:g}; PEFT has no dropout for target_parameters: set it to 0"
        yield ("model", "lora", "dropout"), text
    if lora.target_parameters and recipe.policy.parallel.tp > 1 and recipe.policy.trainer == "fsdp2":
        text = (
            f"is {recipe.policy.parallel.tp}; adapters of model.lora.target_parameters are not split, keep 1"
        )
        yield ("policy", "parallel", "tp"), text


def _data(recipe: Recipe) -> Found:
    pairs = recipe.kind == "preference"
    for which, spec in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if spec is None:
            continue
        if pairs != (spec.format == "preference"):
            kind, own = f"is {spec.format!r}; kind {recipe.kind}", "preference"
            text = f"{kind} has format {own}" if pairs else f"{kind} has no pairs; they belong to kind {own}"
            yield ("data", which, "format"), text
        if spec.template is None:
            continue
        path: KeyPath = ("data", which, "template")
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(spec.template) if name is not None]
        except ValueError as error:
            yield path, f"is {spec.template!r}; {error} (a brace that is text is written twice: {{{{ or }}}})"
            continue
        if not any(name and not name.isdigit() for name in fields):
            text = "names no column (as {question} would), so every row would make the same prompt"
            yield path, f"is {spec.template!r}; it {text}"


def _length(recipe: Recipe) -> Found:
    policy = recipe.policy
    if policy.steps is None and policy.epochs is None:
        yield ("policy",), "set policy.steps or policy.epochs"
    if policy.steps is not None and policy.epochs is not None:
        yield ("policy", "epochs"), "policy.steps and policy.epochs are both set; keep one"


def _batch(recipe: Recipe) -> Found:
    policy, parallel = recipe.policy, recipe.policy.parallel
    data_parallel = parallel.dp_replicate * parallel.dp_shard
    if policy.batch_size % data_parallel:
        yield (
            ("policy", "batch_size"),
            f"is {policy.batch_size}; must be divisible by the {data_parallel} data-parallel ranks "
            f"(dp_replicate {parallel.dp_replicate} x dp_shard {parallel.dp_shard})",
        )
    group_size = recipe.algorithm.get("group_size")
    if recipe.kind == "rl" and isinstance(group_size, int) and policy.batch_size % group_size:
        lower = policy.batch_size // group_size * group_size
        yield (
            ("policy", "batch_size"),
            f"is {policy.batch_size}; must be divisible by algorithm.group_size {group_size} "
            f"(nearest: {lower or group_size} or {lower + group_size})",
        )
    row = policy.micro_batch_tokens if policy.micro_batch_size is None else None
    if policy.batch_tokens is not None and row is not None and policy.batch_tokens > row:
        lower = policy.batch_tokens // row * row
        if lower != policy.batch_tokens:
            yield (
                ("policy", "batch_tokens"),
                f"is {policy.batch_tokens}; must be a multiple of micro_batch_tokens {row}, a row's size "
                f"(nearest: {lower} or {lower + row})",
            )
    if parallel.dp_shard * parallel.cp % parallel.ep:
        yield (
            ("policy", "parallel", "ep"),
            f"is {parallel.ep}; must divide dp_shard x cp = {parallel.dp_shard * parallel.cp}",
        )


def _optimizer(recipe: Recipe) -> Found:
    options, steps = recipe.policy.optimizer, recipe.policy.steps
    path: KeyPath = ("policy", "optimizer")
    if options.warmup_ratio is not None and options.warmup_steps:
        yield (*path, "warmup_ratio"), "warmup_steps and warmup_ratio are both set; keep one"
    if options.min_lr > options.lr:
        yield (*path, "min_lr"), f"is {options.min_lr:g}; must be at most lr, which is {options.lr:g}"
    decay = options.decay_steps
    if decay is not None and options.schedule != "wsd":
        yield (*path, "decay_steps"), f"belongs to schedule wsd; the schedule is {options.schedule}"
    elif decay is not None and steps is not None:
        warmup = round(options.warmup_ratio * steps) if options.warmup_ratio else options.warmup_steps
        if decay > steps:
            yield (*path, "decay_steps"), f"is {decay}; must be at most policy.steps, which is {steps}"
        elif warmup + decay > steps:
            text = f"is {decay}; with {warmup} steps of warm-up that is more than policy.steps {steps}"
            yield (*path, "decay_steps"), text
    for index, group in enumerate(options.groups):
        where: KeyPath = (*path, "groups", index, "match")
        try:
            re.compile(group.match)
        except re.error as error:
            yield where, f"is {group.match!r}; no regular expression: {error}"
        if group.lr is None and group.weight_decay is None:
            yield where, f"is {group.match!r}; give this group an lr or a weight_decay of its own"


def _guard(recipe: Recipe) -> Found:
    if recipe.kind == "rl" and recipe.policy.guard.spike is not None:
        text = "belongs to kind sft: the loss of a policy gradient is near 0 and says nothing of its health"
        yield ("policy", "guard", "spike"), text


def _rollout(recipe: Recipe) -> Found:
    rollout = recipe.rollout
    if rollout is None:
        return
    if rollout.max_model_len is not None and rollout.max_model_len <= rollout.max_tokens:
        yield (
            ("rollout", "max_model_len"),
            f"is {rollout.max_model_len}; must hold prompt and answer, so be larger than "
            f"rollout.max_tokens {rollout.max_tokens}",
        )
    if rollout.oversample > 0 and rollout.order == "strict":
        text = "is not for rollout.order strict, which waits for every prompt in turn: use deadline, or 0"
        yield ("rollout", "oversample"), f"is {rollout.oversample:g}; it {text}"
    if rollout.weights.lora == "adapter" and recipe.model.lora is None:
        yield ("rollout", "weights", "lora"), "is 'adapter'; there is none without model.lora"
    yield from _weight_sync(recipe)
    buffer = recipe.algorithm.get("overlong_buffer", 0)
    if isinstance(buffer, int) and buffer > rollout.max_tokens:
        yield (
            ("algorithm", "overlong_buffer"),
            f"is {buffer}; must be at most rollout.max_tokens, which is {rollout.max_tokens}",
        )
    if buffer != 0 and any(item.get("name") == "overlong" for item in recipe.reward):
        text = "shapes the rewards of long answers, as the reward overlong does: use only one of them"
        yield ("algorithm", "overlong_buffer"), text
    hottest, temperature = MAX_TEMPERATURE.get(rollout.engine), recipe.algorithm.get("temperature")
    if hottest is not None and isinstance(temperature, int | float) and temperature > hottest:
        yield (
            ("algorithm", "temperature"),
            f"is {temperature:g}; rollout.engine {rollout.engine} takes at most {hottest:g}",
        )


def _weight_sync(recipe: Recipe) -> Found:
    assert recipe.rollout is not None
    sync = recipe.rollout.weights
    delta, mode = sync.mode == "delta", ("rollout", "weights", "mode")
    if delta and recipe.model.dtype == "float32":
        yield mode, "is 'delta', which is for 16-bit weights; model.dtype is float32: use full"
    if delta and sync.lora == "adapter":
        yield mode, "is 'delta'; an adapter alone travels whole: use full, or rollout.weights.lora merged"
    if delta and sync.overlap is False:
        text = "is false; with mode delta both sides keep copies and pushes overlap: leave it out"
        yield ("rollout", "weights", "overlap"), text
    if sync.transport not in ("auto", "gloo") and (delta or sync.overlap):
        what = "mode delta needs" if delta else "overlap needs"
        yield ("rollout", "weights", "transport"), f"is {sync.transport!r}; {what} gloo"


def _cluster(recipe: Recipe) -> Found:
    cluster = recipe.cluster
    try:
        minutes = parse_time(cluster.time)
        if cluster.signal_seconds >= minutes * 60:
            yield (
                ("cluster", "signal_seconds"),
                f"is {cluster.signal_seconds}; must be shorter than cluster.time ({minutes} minutes)",
            )
    except ValueError as error:
        yield ("cluster", "time"), f"is {cluster.time!r}; {error}"
    for index, name in enumerate(cluster.secrets):
        if not SECRET_NAME.match(name) or len(name) > 64:
            # the text may be the secret itself, so it is not repeated
            yield (
                ("cluster", "secrets", index),
                "must be the NAME of an environment variable ([A-Z_][A-Z0-9_]*), such as HF_TOKEN; "
                "never write the value: it is read from your environment (text not shown)",
            )
    groups = {
        "policy": cluster.policy,
        "rollout": cluster.rollout,
        "reward": cluster.reward,
        "teacher": cluster.teacher,
    }
    yield from _variables(cluster.variables, ("cluster", "variables"))
    for role, group in groups.items():
        if group is not None:
            yield from _variables(group.variables, ("cluster", role, "variables"))
            yield from _sbatch(group.sbatch, ("cluster", role, "sbatch"))
    yield from _sbatch(cluster.controller.sbatch, ("cluster", "controller", "sbatch"))


def _variables(variables: dict[str, str], path: KeyPath) -> Found:
    for name, value in variables.items():
        if not _VARIABLE.match(name):
            yield (*path, name), "is not a name of an environment variable"
        elif is_secret((name.lower(),)):
            text = "looks like a secret; export it in your shell and list its name under cluster.secrets"
            yield (*path, name), text
        elif "\n" in value or "\0" in value:
            yield (*path, name), "must be one line"


def _sbatch(options: list[str], path: KeyPath) -> Found:
    for index, option in enumerate(options):
        name = re.split(r"[=\s]", option.strip(), maxsplit=1)[0].lstrip("-")
        if not option.strip().startswith("-") or not name or "\n" in option:
            yield (*path, index), f"is {option!r}; must be one sbatch option such as --reservation=NAME"
        elif name in _OWNED:
            yield (*path, index), f"is {option!r}; this option is set by {_OWNED[name]}"
        elif name in _FORBIDDEN:
            yield (*path, index), f"is {option!r}; hpc-rl sets --{name} itself and depends on it"
