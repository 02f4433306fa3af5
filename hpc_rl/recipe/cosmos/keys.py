"""Every key of cosmos-rl's configuration (the schema of its last version), and what becomes of it.

One table, so that a test can hold it against the schema: a key is *mapped* to keys of a recipe (the
translators in this package do it), or *dropped* with the reason that the user reads. Keys of sections that
only RL reads are listed by name (`RL_KEYS`). What is in neither table cosmos-rl ignored without a word.

Kinds: flag, count (an integer), number, text, texts (a list), map (of anything), any; `a|b` takes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """`default` is cosmos-rl's own. `to` are the recipe keys that it can become; without them `why` it is
    dropped, but for the values in `same`: those ask for what happens here anyway."""

    kind: str
    default: Any
    to: tuple[str, ...] = ()
    why: str = ""
    same: tuple[Any, ...] = ()


def _map(kind: str, default: Any, *to: str) -> Key:
    return Key(kind, default, to)


def _drop(kind: str, default: Any, why: str, *same: Any) -> Key:
    """A flag that is off asks for nothing, unless `same` says otherwise."""
    return Key(kind, default, (), why, same or ((False,) if kind == "flag" else ()))


_ONLY_RL = "only RL uses it"
_PIPELINE = "the built-in trainer has no pipeline parallelism"
_FUSED = "Liger's kernels are not used"
_LOW_BITS = "the trainer computes in bfloat16, float16 or float32"
_SFT_EVAL = "the validation of SFT is a loss; nothing is generated"
_TRACE = "policy.profile has no such choice"

_TRAIN = {
    "optm_name": _map("text", "AdamW", "policy.optimizer.name"),
    "optm_lr": _map("number|numbers|map", 1e-6, "policy.optimizer.lr", "policy.optimizer.groups"),
    "optm_impl": _drop("text|texts", "fused", "AdamW is fused wherever torch can", "fused"),
    "optm_weight_decay": _map("number", 0.01, "policy.optimizer.weight_decay"),
    "optm_betas": _map("numbers", [0.9, 0.999], "policy.optimizer.betas"),
    "epsilon": _map("number", 1e-6, "policy.optimizer.eps"),
    "optm_warmup_steps": _map("number", 20, "policy.optimizer.warmup_steps", "policy.optimizer.warmup_ratio"),
    "optm_warmup_start_factor": _drop("number", 0.0, "the warm-up begins at (almost) 0", 0),
    "optm_decay_ratio": _map("number", None, "policy.optimizer.schedule", "policy.optimizer.decay_steps"),
    "optm_decay_type": _map("text", None, "policy.optimizer.schedule"),
    "optm_min_lr_factor": _map("number", 0.0, "policy.optimizer.min_lr"),
    "optm_grad_norm_clip": _map("number", 1.0, "policy.optimizer.clip_norm"),
    "ema_enable": _map("flag", False, "policy.ema.decay"),
    "ema_decay": _map("number", 0.9999, "policy.ema.decay"),
    "ema_update_step_interval": _drop("count", 0, "the average moves with every step", 0, 1),
    "master_dtype": _drop("text", "float32", "weights and optimizer state are kept in float32", "float32"),
    "param_dtype": _map("text", "bfloat16", "model.dtype"),
    "transfer_dtype": _drop("text", None, _ONLY_RL),
    "logprob_dtype": _drop("text", "float32", _ONLY_RL),
    "fsdp_reduce_dtype": _drop("text", "float32", "gradients are reduced in float32", "float32"),
    "fsdp_offload": _map("flag", False, "policy.cpu_offload"),
    "fsdp_reshard_after_forward": _drop(
        "text", "default", "layers are always resharded after the forward", "always", "default"
    ),
    "train_batch_per_replica": _map("count", 8, "policy.batch_size"),
    "resume": _drop("flag|text", False, "a run is continued with: hpc-rl resume RUN"),
    "epoch": _map("count", 1, "policy.epochs"),
    "max_num_steps": _map("count", None, "policy.steps"),
    "output_dir": _map("text", "./outputs", "output_root", "name"),
    "timestamp": _drop("text", "", "every run has a directory and an id of its own"),
    "async_tp_enabled": _drop("flag", False, "asynchronous tensor parallelism needs torch.compile"),
    "compile": _drop("flag", True, "the trainer does not compile the model"),
    "sync_weight_interval": _drop("count", 1, _ONLY_RL),
    "coalesce_weight_sync": _drop("flag", False, _ONLY_RL),
    "deterministic": _drop("flag", False, "`seed` fixes rows and numbers; kernels are torch's"),
    "seed": _map("count", None, "seed"),
    "activation_offload": _drop("flag", False, "use policy.activation_checkpointing or policy.cpu_offload"),
    "fa_version": _map("count", None, "model.attn_implementation"),
    "local_dataset": _drop("flag", True, "every process reads the rows itself", True),
    "force_use_hf": _drop("flag", False, "the model is always Transformers' own", True, False),
    "non_text": _drop("flag", False, "data.train.format says what the rows hold"),
    "sequence_packing": _drop("flag", False, "rows are always packed", True),
    "save_ckpt_at_exit": _drop(
        "flag", True, "a run always saves before its time is over, and is requeued", True
    ),
    "signal_to_handle": _drop("texts", ["SIGUSR1"], "Slurm's signal is set by cluster.signal_seconds"),
    "fp8.enable_fp8": _drop("flag", False, _LOW_BITS),
    "fp8.fp8_recipe": _drop("text", "dynamic_scaling", _LOW_BITS),
    "fp8.quant_recipe": _drop("text", "rowwise", _LOW_BITS),
    "fp4.enable_fp4": _drop("flag", False, _LOW_BITS),
    "fp4.fp4_recipe": _drop("text", "dynamic_scaling", _LOW_BITS),
    "fp4.quant_recipe": _drop("text", "rowwise", _LOW_BITS),
}

_CHECKPOINT = {
    "enable_checkpoint": _map("flag", False, "checkpoint.enabled", "checkpoint.export"),
    "save_freq": _map("count", 20, "checkpoint.save_every"),
    "save_freq_in_epoch": _drop(
        "count", 0, "checkpoints are counted in steps: rows / policy.batch_size is an epoch", 0
    ),
    "save_mode": _map("text", "async", "checkpoint.mode"),
    "max_keep": _map("count", 5, "checkpoint.max_keep"),
    "export_safetensors": _map("flag", True, "checkpoint.export"),
    "upload_hf": _map("flag", False, "checkpoint.upload_hub"),
    "hf_repo_name": _map("text", "Comos-Reason1", "checkpoint.upload_hub"),
    "upload_s3": _map("flag|text", False, "checkpoint.upload_s3", "checkpoint.upload_s3.what"),
    "s3_bucket": _map("text", None, "checkpoint.upload_s3.bucket"),
    "s3_prefix": _map("text", "outputs", "checkpoint.upload_s3.prefix"),
}

_SFT = {
    "type": _map("text", None, "kind"),
    "trainer_type": _drop("text", "sft", "kind says it", "sft"),
    "mini_batch": _map("count", 2, "policy.micro_batch_tokens"),
    "dataloader_shuffle": _map("flag", True, "data.train.shuffle"),
    "dataloader_seed": _drop("count", 0, "the order of the rows follows `seed`"),
    "dataloader_batch_size": _drop("count", 1, "SFT did not use it"),
    "dataloader_num_workers": _map("count", 0, "data.workers"),
    "dataloader_prefetch_factor": _drop("count", None, "one batch is encoded ahead"),
    "dataloader_drop_last": _drop(
        "flag", True, "batches run on over an epoch's end; no row is left out", False
    ),
    "dataloader_broadcast": _drop("flag", False, "the ranks of a mesh read the same rows by themselves"),
    "data_dispatch_as_rank_in_mesh": _drop("flag", False, "rows are dealt out by data-parallel rank"),
    "enable_dataset_cache": _drop("flag", False, "rows are encoded while the step runs"),
    "conversation_column_name": _map("text", "conversations", "data.train.messages"),
    "system_prompt": _map("text", "", "data.train.system"),
    "balance_dp_token": _drop("flag", True, "the loss is always a mean over the tokens of all ranks", True),
    "enable_dp_load_balancing": _map("flag", False, "policy.batch_tokens"),
    "load_balanced_pool_size": _drop("count", 32, "the packer looks as far ahead as it needs"),
    "load_balanced_max_tokens_for_batch": _map(
        "count", None, "policy.micro_batch_tokens", "policy.batch_tokens"
    ),
    "load_balanced_batching_strategy": _drop("text", "prefer_closest", "rows are packed best-fit decreasing"),
    "load_balanced_batches_per_optimizer_step": _map("count", 1, "policy.batch_tokens"),
}


def _dataset(place: str) -> dict[str, Key]:
    return {
        "name": _map("text", "", f"{place}.path"),
        "subset": _map("text", "", f"{place}.subset"),
        "revision": _map("text", "", f"{place}.revision"),
        "split": _map("text|texts", "", f"{place}.split"),
        "local_dir": _map("text", "", f"{place}.path"),
    }


_POLICY = {
    "model_name_or_path": _map("text", "Qwen/Qwen2.5-VL-7B-Instruct", "model.path"),
    "model_safetensor_path": _drop("text", None, "model.path is one folder with config and weights"),
    "model_revision": _map("text", None, "model.revision"),
    "model_max_length": _map("count", 4096, "policy.max_length"),
    "model_gradient_checkpointing": _map("flag", True, "policy.activation_checkpointing"),
    "trainable_map": _map("map", None, "model.freeze"),
    "freeze_pattern": _map("texts", None, "model.freeze"),
    "trainable_pattern": _map("texts", None, "model.train"),
    "enable_liger_kernel": _drop("flag", False, _FUSED),
    "enable_liger_cross_entropy": _drop("flag", False, _FUSED),
    "enable_liger_fused_cross_entropy": _drop("flag", False, _FUSED),
    "aux_loss_coeff": _drop("number", 0.0, "the loss of SFT has no router term", 0),
    "is_diffusers": _drop("flag", False, "models of diffusers come with a later converter", False),
}

_LORA = {
    "r": _map("count", 8, "model.lora.r"),
    "lora_names": _drop("texts", ["default"], "a run trains one adapter", ["default"]),
    "lora_path": _map("text", None, "model.lora.adapter"),
    "lora_alpha": _map("number", 8.0, "model.lora.alpha"),
    "lora_dropout": _map("number", 0.0, "model.lora.dropout"),
    "target_modules": _map("text|texts", None, "model.lora.target_modules"),
    "primary_adapter": _drop("text", None, "a run trains one adapter"),
    "use_rslora": _map("flag", False, "model.lora.use_rslora"),
    "modules_to_save": _map("texts", None, "model.lora.modules_to_save"),
    "alpha_pattern": _map("map", None, "model.lora.alpha_pattern"),
    "r_pattern": _map("map", None, "model.lora.r_pattern"),
    "init_lora_weights": _drop(
        "flag|text", True, "adapters begin as PEFT's default has it: as no change", True
    ),
}

_PARALLEL = {
    "n_init_replicas": _map("count", 1, "policy.parallel.dp_replicate"),
    "tp_size": _map("count", 2, "policy.parallel.tp"),
    "cp_size": _map("count", 1, "policy.parallel.cp"),
    "ep_size": _map("count", 1, "policy.parallel.ep"),
    "dp_shard_size": _map("count", 1, "policy.parallel.dp_shard"),
    "pp_size": _map("count", 1, "policy.parallel.pp"),
    "dp_replicate_size": _map("count", 1, "policy.parallel.dp_replicate"),
    "pp_dynamic_shape": _drop("flag", False, _PIPELINE),
    "pp_micro_batch_size": _drop("count", 1, _PIPELINE),
    "pp_schedule": _drop("text", "Interleaved1F1B", _PIPELINE),
    "pp_layers_per_stage": _drop("count", 2, _PIPELINE),
}

_LOGGING = {
    "logger": _map("texts", [], "logging.wandb.mode"),
    "log_interval": _drop("count", 100, "every step is logged", 1),
    "multi_modal_log_interval": _drop("count", None, "images and videos are not sent to W&B"),
    "project_name": _map("text", "cosmos_rl", "logging.wandb.project"),
    "group_name": _drop("text", None, "W&B groups the runs of a recipe by its name"),
    "experiment_name": _map("text", None, "name"),
    "report_mfu": _drop("flag", False, "throughput is always among the metrics", True, False),
}

_PROFILER = {
    "enable_profiler": _map("flag", False, "policy.profile.steps"),
    "enable_nsys": _drop("flag", False, "nsys wraps a process: use a site's setup, or policy.profile"),
    "sub_profiler_config.do_profile": _map("flag", False, "policy.profile.steps"),
    "sub_profiler_config.active_steps": _map("count", 1, "policy.profile.steps"),
    "sub_profiler_config.warmup_steps": _map("count", 1, "policy.profile.start"),
    "sub_profiler_config.wait_steps": _map("count", 1, "policy.profile.start"),
    "sub_profiler_config.rank_filter": _map("counts", [], "policy.profile.ranks"),
    "sub_profiler_config.record_shape": _drop("flag", False, _TRACE),
    "sub_profiler_config.profile_memory": _map("flag", False, "policy.profile.memory"),
    "sub_profiler_config.with_stack": _drop("flag", False, _TRACE),
    "sub_profiler_config.with_modules": _drop("flag", False, _TRACE),
}

_VALIDATION = {
    "enable": _map("flag", False, "data.holdout", "data.eval"),
    "val_before_train": _map("flag", False, "eval.before"),
    "freq": _map("count", 20, "eval.every"),
    "batch_size": _drop("count", None, "validation rows are packed like the training's"),
    "temperature": _drop("number", 0.0, _SFT_EVAL),
    "top_p": _drop("number", None, _SFT_EVAL),
    "top_k": _drop("count", 1, _SFT_EVAL),
    "repetition_penalty": _drop("number", 1.0, _SFT_EVAL),
    "n_generation": _drop("count", 1, _SFT_EVAL),
    "max_response_length": _drop("count", None, _SFT_EVAL),
    "reward_function": _drop("any", [], _SFT_EVAL),
    "use_remote_reward": _drop("flag", None, _SFT_EVAL),
    "remote_reward": _drop("map", None, _SFT_EVAL),
}

# What the published scripts read from the free-form section (llava_sft.py, hf_sft.py of cosmos-reason2).
_CUSTOM = {
    "dataset.annotation_path": _map("text", None, "data.train.path"),
    "dataset.path": _map("text", None, "data.train.path"),
    "dataset.media_path": _map("text", "", "data.train.media_path"),
    "dataset.system_prompt": _map("text", "", "data.train.system"),
    "vision.fps": _map("number", None, "data.train.fps"),
    "vision.max_frames": _map("count", None, "data.train.max_frames"),
    "vision.nframes": _map("count", None, "data.train.max_frames"),
    "vision.min_pixels": _map("count", None, "data.train.min_pixels"),
    "vision.max_pixels": _map("count", None, "data.train.max_pixels"),
    "vision.min_frames": _drop("count", None, "a clip gives as many frames as fps and max_frames say"),
    "vision.total_pixels": _drop("count", None, "the script overwrote it; max_pixels bounds a frame"),
    "vision.resized_height": _drop("count", None, "sizes are bounded by min_pixels and max_pixels"),
    "vision.resized_width": _drop("count", None, "sizes are bounded by min_pixels and max_pixels"),
    "vision.video_start": _drop("number", None, "whole clips are read"),
    "vision.video_end": _drop("number", None, "whole clips are read"),
}

_TOP = {
    "redis": _drop("text|count", "", "each run starts a Redis of its own, with a password"),
    "eth_ips": _drop("text", "", "the site profile names the network (network.interface)"),
    "mode": _drop("text", "disaggregated", "cluster.placement says where the roles run"),
}

SECTIONS: dict[str, dict[str, Key]] = {
    "": _TOP,
    "train": _TRAIN,
    "train.ckpt": _CHECKPOINT,
    "train.train_policy": _SFT,
    "train.train_policy.dataset": {
        **_dataset("data.train"),
        "test_size": _map("number", None, "data.holdout"),
    },
    "policy": _POLICY,
    "policy.lora": _LORA,
    "policy.parallelism": _PARALLEL,
    "logging": _LOGGING,
    "profiler": _PROFILER,
    "validation": _VALIDATION,
    "validation.dataset": {
        **_dataset("data.eval"),
        "test_size": _drop("number", None, "the split of a validation set is used whole (data.eval.limit)"),
    },
    "custom": _CUSTOM,
}

KEYS: dict[str, Key] = {
    f"{section}.{name}".lstrip("."): key for section, keys in SECTIONS.items() for name, key in keys.items()
}

# Names of older versions, still in many files; the last version ignored them without a word.
OLD: dict[str, str] = {
    "train.enable_validation": "validation.enable",
    "train.validation_step": "validation.freq",
    "train.validation_freq": "validation.freq",
    "train.validation_batch_per_replica": "validation.batch_size",
}
GONE: dict[str, str] = {
    "policy.parallelism.cp_rotate_method": "cosmos-rl has not read it for long; nothing follows from it",
}

_GRPO = """
    variant prompt_column_name response_column_name reward_function use_remote_reward filter_reward_metric
    bypass_reward group_reward_calculation temperature epsilon_low epsilon_high advantage_low advantage_high
    positive_nll_coef lower_bound_ratio loss_type unbiased_loss_max_tokens unbiased_advantage algo kl_beta
    unbiased_kl_estimate off_policy_masking_delta aipo_rho mu_iterations batch_size_per_optimize
    max_token_len_per_mini_batch entropy_coeff allowed_outdated_steps on_policy no_outdated_rollout
    uncentralized_training outdated_rollout_fetch_batch_size max_inflight_steps min_filter_prefix_tokens
    max_retry_for_on_policy reference_reset_interval reset_optimizer_with_reference use_decoupled_loss
    behav_imp_weight_cap rollout_as_token_ids collect_rollout_logprobs use_rollout_logprobs_for_loss
    remote_reward overlong_reward
"""

# section or key -> why; everything below it is known too
RL_KEYS: dict[str, str] = {
    **{f"train.train_policy.{name}": "type sft did not read it" for name in _GRPO.split()},
    "rollout": "SFT has no rollouts",
    "distillation": "SFT has no teacher",
    "vla": "models of diffusers and robots come with a later converter",
    "policy.diffusers": "models of diffusers and robots come with a later converter",
}


def in_rl(key: str) -> str | None:
    """Why a key of RL's sections is dropped, or None if it is not one of them."""
    for place, why in RL_KEYS.items():
        if key == place or key.startswith(f"{place}."):
            return why
    return None
