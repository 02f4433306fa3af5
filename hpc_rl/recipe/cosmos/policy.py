"""Model, parallelism, batches and length of training: cosmos-rl's `policy` and `train` sections."""

from __future__ import annotations

import re

from hpc_rl.catalog.trainers import unsupported_dimensions
from hpc_rl.recipe.cosmos.draft import Draft
from hpc_rl.recipe.cosmos.keys import SECTIONS

NODE = 8  # GPUs; what -1 and a mesh of more than one node are reckoned with


def translate_model(draft: Draft) -> None:
    draft.put("model.path", draft.get("policy.model_name_or_path"), "policy.model_name_or_path")
    if revision := draft.get("policy.model_revision"):
        draft.put("model.revision", revision, "policy.model_revision")
    dtype, note = draft.get("train.param_dtype"), ""
    if dtype == "float16":
        dtype, note = "bfloat16", "without loss scaling gradients underflow in float16"
    draft.put("model.dtype", dtype, "train.param_dtype", note=note)
    version = draft.get("train.fa_version")
    if version is not None:
        draft.put("model.attn_implementation", f"flash_attention_{version}", "train.fa_version")
    if draft.get("train.master_dtype") not in ("float32", None):
        draft.drop(
            "train.master_dtype",
            "weights and optimizer state are kept in float32, twice the memory of that: raise "
            "policy.parallel.dp_shard or set policy.cpu_offload if they do not fit",
        )
    if any(draft.written(f"policy.lora.{name}") for name in SECTIONS["policy.lora"]):
        _lora(draft)
    else:
        _trainable(draft)


def _lora(draft: Draft) -> None:
    for name, to in (("r", "r"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        if draft.table[f"policy.lora.{name}"].to:
            draft.put(f"model.lora.{to}", draft.get(f"policy.lora.{name}"), f"policy.lora.{name}")
    for name in ("target_modules", "use_rslora", "modules_to_save", "r_pattern", "alpha_pattern"):
        value = draft.get(f"policy.lora.{name}")
        if value is not None and draft.written(f"policy.lora.{name}"):
            draft.put(f"model.lora.{name}", value, f"policy.lora.{name}")
    if path := draft.get("policy.lora.lora_path"):
        draft.put("model.lora.adapter", path, "policy.lora.lora_path")
    for name in ("freeze_pattern", "trainable_pattern", "trainable_map"):
        why = "with adapters only these are trained; model.lora.exclude_modules leaves layers without one"
        draft.drop(f"policy.{name}", why)
    draft.put("model.lora.export", "adapter")
    draft.notes.append(
        "model.lora.export: adapter, as cosmos-rl exported; `merged` gives a model that loads without PEFT"
    )


_OTHER_NAMES = "names are Transformers' parameter names; cosmos-rl's own classes may call them otherwise"


def _trainable(draft: Draft) -> None:
    for name, to in (("freeze_pattern", "model.freeze"), ("trainable_pattern", "model.train")):
        key = f"policy.{name}"
        patterns = [pattern for pattern in draft.get(key) or [] if pattern]
        for pattern in patterns:
            _check_pattern(draft, key, pattern)
        if patterns:
            draft.put(to, patterns, key, note=_OTHER_NAMES)
    flags = draft.get("policy.trainable_map") or {}
    if any(not isinstance(flag, bool) for flag in flags.values()):
        text = 'must map names to true or false; quote names with dots: "model.visual" = false'
        return draft.bad("policy.trainable_map", text)
    frozen = _frozen(flags)
    if not frozen:
        return draft.same("policy.trainable_map", "everything is trained unless something is frozen")
    already = draft.recipe["model"].get("freeze", [])
    keys = ("policy.trainable_map",)
    draft.put("model.freeze", already + frozen, *keys, note=f"as patterns; {_OTHER_NAMES}")


def _frozen(flags: dict[str, bool]) -> list[str]:
    """Patterns for the names that are false, less what a later true takes back below them."""
    names = list(flags)
    patterns = []
    for index, name in enumerate(names):
        if flags[name]:
            continue
        back = [n[len(name) + 1 :] for n in names[index + 1 :] if flags[n] and n.startswith(f"{name}.")]
        kept = "|".join(rf"{re.escape(rest)}(\.|$)" for rest in back)
        below = rf"\.(?!{kept})" if back else r"(\.|$)"
        patterns.append(rf"(^|\.){re.escape(name)}{below}")
    return patterns


def _check_pattern(draft: Draft, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        draft.bad(key, f"holds {pattern!r}, which is no regular expression: {error}")


def translate_parallel(draft: Draft, gpus: int | None) -> int:
    """The mesh; the number of data-parallel ranks."""
    place = "policy.parallelism"
    sizes = {name: draft.get(f"{place}.{name}_size") for name in ("tp", "pp", "cp", "ep")}
    for name, size in sizes.items():
        warn = "cosmos-rl's default is 2, whatever the model; most files mean 1" if name == "tp" else ""
        note = "" if draft.written(f"{place}.tp_size") else warn
        draft.put(f"policy.parallel.{name}", size, f"{place}.{name}_size", note=note)
    replicate = draft.get(f"{place}.dp_replicate_size") * draft.get(f"{place}.n_init_replicas")
    other = sizes["tp"] * sizes["pp"] * sizes["cp"] * replicate
    shard = _shard(draft, f"{place}.dp_shard_size", other, gpus)
    keys = [f"{place}.dp_replicate_size"]
    note = ""
    if draft.get(f"{place}.n_init_replicas") != 1:
        keys.append(f"{place}.n_init_replicas")
        note = "replicas train as one data-parallel group here: dp_replicate_size x n_init_replicas"
    else:
        draft.same(f"{place}.n_init_replicas")
    draft.put("policy.parallel.dp_replicate", replicate, *keys, note=note)
    _nodes(draft, shard * other)
    parallel = {**sizes, "dp_shard": shard, "dp_replicate": replicate}
    for name in unsupported_dimensions("fsdp2", parallel):
        draft.notes.append(
            f"policy.parallel.{name} is {parallel[name]}: the built-in trainer cannot shard by it; "
            f"`hpc-rl check` refuses it. Use 1 and a larger dp_shard"
        )
    return max(1, shard * replicate)


def _shard(draft: Draft, key: str, other: int, gpus: int | None) -> int:
    size: int = draft.get(key)
    if size != -1:
        draft.put("policy.parallel.dp_shard", size, key)
        return size
    total = NODE if gpus is None else gpus
    if other < 1 or total % other:
        draft.bad(
            key, f"is -1 (all GPUs that are left), and {other} ranks do not divide {total} GPUs; use --gpus"
        )
        return 1
    meant = (
        f"all of {total} GPUs"
        if gpus is not None
        else f"all of one node's {total} GPUs (--gpus N says otherwise)"
    )
    draft.put("policy.parallel.dp_shard", total // other, key, note=f"-1 is {meant}")
    return total // other


def _nodes(draft: Draft, ranks: int) -> None:
    if ranks <= NODE or ranks > 2**31:
        return
    nodes = next(n for n in range(-(-ranks // NODE), ranks + 1) if ranks % n == 0)
    draft.put("cluster.policy.nodes", nodes)
    draft.notes.append(f"cluster.policy.nodes: {nodes}, for {ranks} ranks on nodes of {NODE} GPUs")


def translate_batches(draft: Draft, ranks: int) -> None:
    """cosmos-rl counts `train_batch_per_replica` on each data-parallel rank (its loader's batch size)."""
    per_rank, key = draft.get("train.train_batch_per_replica"), "train.train_batch_per_replica"
    note = (
        f"{per_rank} on each of {ranks} data-parallel ranks there, over all ranks here" if ranks > 1 else ""
    )
    draft.put("policy.batch_size", per_rank * ranks, key, note=note)
    length = draft.get("policy.model_max_length")
    draft.put("policy.max_length", length, "policy.model_max_length")
    place = "train.train_policy"
    if draft.get(f"{place}.enable_dp_load_balancing"):
        _token_batches(draft, ranks, length)
    else:
        rows = max(1, min(draft.get(f"{place}.mini_batch"), per_rank))
        note = f"{rows} rows of up to {length} tokens; short rows are packed into the same room"
        draft.put("policy.micro_batch_tokens", rows * length, f"{place}.mini_batch", note=note)
        draft.same(f"{place}.enable_dp_load_balancing")
    checkpointing = draft.get("policy.model_gradient_checkpointing")
    draft.put("policy.activation_checkpointing", checkpointing, "policy.model_gradient_checkpointing")
    draft.put("policy.cpu_offload", draft.get("train.fsdp_offload"), "train.fsdp_offload")
    workers = f"{place}.dataloader_num_workers"
    if draft.written(workers):
        draft.put("data.workers", draft.get(workers), workers, note="threads, not processes")


def _token_batches(draft: Draft, ranks: int, length: int) -> None:
    place = "train.train_policy"
    tokens = draft.get(f"{place}.load_balanced_max_tokens_for_batch") or length
    batches = draft.get(f"{place}.load_balanced_batches_per_optimizer_step")
    keys = [
        f"{place}.load_balanced_max_tokens_for_batch",
        f"{place}.load_balanced_batches_per_optimizer_step",
    ]
    note = f"{tokens} tokens x {batches} batches x {ranks} ranks"
    draft.put("policy.micro_batch_tokens", tokens, keys[0])
    draft.put(
        "policy.batch_tokens", tokens * batches * ranks, f"{place}.enable_dp_load_balancing", *keys, note=note
    )


def translate_length(draft: Draft) -> None:
    steps, epochs = draft.get("train.max_num_steps"), draft.get("train.epoch")
    if steps is None:
        draft.put("policy.epochs", epochs, "train.epoch")
        return
    draft.put("policy.steps", steps, "train.max_num_steps")
    draft.drop(
        "train.epoch", "train.max_num_steps is set; a recipe has steps or epochs (cosmos-rl: the shorter)"
    )


def translate_extras(draft: Draft) -> None:
    """Moving average, profiler, seed."""
    if draft.get("train.ema_enable"):
        note = "cosmos-rl averages models of diffusers only; exports are of the average here"
        draft.put(
            "policy.ema.decay", draft.get("train.ema_decay"), "train.ema_enable", "train.ema_decay", note=note
        )
    else:
        draft.same("train.ema_enable")
    if (seed := draft.get("train.seed")) is not None:
        note = "negative seeds are 42 in cosmos-rl" if seed < 0 else ""
        draft.put("seed", 42 if seed < 0 else seed, "train.seed", note=note)
    elif draft.get("train.deterministic"):
        draft.put("seed", 42)
        draft.notes.append("seed: 42, cosmos-rl's with train.deterministic")
    _profile(draft)


def _profile(draft: Draft) -> None:
    place = "profiler.sub_profiler_config"
    if not draft.get("profiler.enable_profiler") or not draft.get(f"{place}.do_profile"):
        why = "the profiler does nothing in this file (it needs enable_profiler and do_profile)"
        for name in ("active_steps", "warmup_steps", "wait_steps", "rank_filter", "profile_memory"):
            draft.drop(f"{place}.{name}", why)
        for key in ("profiler.enable_profiler", f"{place}.do_profile"):
            draft.drop(key, why) if draft.get(key) else draft.same(key)
        return
    keys = (f"{place}.active_steps", "profiler.enable_profiler", f"{place}.do_profile")
    draft.put("policy.profile.steps", draft.get(keys[0]), *keys)
    before = draft.get(f"{place}.wait_steps") + draft.get(f"{place}.warmup_steps")
    draft.put("policy.profile.start", before + 1, f"{place}.wait_steps", f"{place}.warmup_steps")
    draft.put("policy.profile.ranks", draft.get(f"{place}.rank_filter") or [0], f"{place}.rank_filter")
    draft.put("policy.profile.memory", draft.get(f"{place}.profile_memory"), f"{place}.profile_memory")
