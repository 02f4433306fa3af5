"""Names of cosmos-rl and RLinf configurations, and what they are called here.

They are errors in a recipe (`hpc-rl convert` translates whole files); the message names the new key.
"""

from __future__ import annotations

RENAMED: dict[str, str] = {
    # parallelism
    "dp_shard_size": "policy.parallel.dp_shard",
    "fsdp_shard_size": "policy.parallel.dp_shard",
    "dp_replicate_size": "policy.parallel.dp_replicate",
    "tp_size": "policy.parallel.tp (or rollout.parallel.tp)",
    "pp_size": "policy.parallel.pp (or rollout.parallel.pp)",
    "cp_size": "policy.parallel.cp",
    "ep_size": "policy.parallel.ep",
    "tensor_model_parallel_size": "policy.parallel.tp",
    "pipeline_model_parallel_size": "policy.parallel.pp",
    "tensor_parallel_size": "rollout.parallel.tp",
    "pipeline_parallel_size": "rollout.parallel.pp",
    "n_init_replicas": "rollout.replicas (policy ranks: policy.parallel.dp_replicate)",
    "parallelism": "policy.parallel (or rollout.parallel)",
    # batches and length of training
    "train_batch_per_replica": "policy.batch_size (over all ranks)",
    "global_batch_size": "policy.batch_size",
    "mini_batch": "policy.micro_batch_size (or policy.micro_batch_tokens)",
    "mini_batch_size": "policy.micro_batch_size (or policy.micro_batch_tokens)",
    "max_token_len_per_mini_batch": "policy.micro_batch_tokens",
    "epoch": "policy.epochs",
    "max_epochs": "policy.epochs",
    "max_num_steps": "policy.steps",
    "max_steps": "policy.steps",
    "model_max_length": "policy.max_length",
    # optimizer
    "optm_name": "policy.optimizer.name",
    "optm_lr": "policy.optimizer.lr",
    "learning_rate": "policy.optimizer.lr",
    "optm_weight_decay": "policy.optimizer.weight_decay",
    "optm_betas": "policy.optimizer.betas",
    "epsilon": "policy.optimizer.eps",
    "optm_warmup_steps": "policy.optimizer.warmup_steps",
    "optm_decay_type": "policy.optimizer.schedule",
    "optm_decay_ratio": "policy.optimizer.decay_steps",
    "optm_min_lr_factor": "policy.optimizer.min_lr (a rate, not a factor)",
    "optm_grad_norm_clip": "policy.optimizer.clip_norm",
    "clip_grad": "policy.optimizer.clip_norm",
    "model_gradient_checkpointing": "policy.activation_checkpointing",
    "gradient_checkpointing": "policy.activation_checkpointing",
    "fsdp_offload": "policy.cpu_offload",
    "ema_enable": "policy.ema (a mapping, or null)",
    "ema_decay": "policy.ema.decay",
    "load_balanced_max_tokens_for_batch": "policy.batch_tokens (over all ranks)",
    # model
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "model_revision": "model.revision",
    "tokenizer_model": "model.tokenizer",
    "precision": "model.dtype",
    "param_dtype": "model.dtype",
    "is_lora": "model.lora (a mapping, or null)",
    "lora_path": "model.lora.adapter",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "freeze_pattern": "model.freeze",
    "trainable_pattern": "model.train",
    "trainable_map": "model.train and model.freeze (lists of patterns)",
    "fa_version": "model.attn_implementation",
    "action_token_len": "model.action_dim (vision-language-action models)",
    "action_chunks_len": "model.num_action_chunks (vision-language-action models)",
    # algorithm
    "train_policy": "algorithm",
    "trainer_type": "algorithm.name",
    "adv_type": "algorithm.name",
    "n_generation": "algorithm.group_size",
    "num_group_envs": "algorithm.group_size",
    "group_size": "algorithm.group_size",
    "epsilon_low": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "clip_ratio_low": "algorithm.clip_low",
    "clip_ratio_high": "algorithm.clip_high",
    "kl_beta": "algorithm.kl_beta",
    "temperature": "algorithm.temperature",
    "top_p": "algorithm.top_p",
    "allowed_outdated_steps": "algorithm.max_staleness",
    "max_staleness": "algorithm.max_staleness",
    "behav_imp_weight_cap": "algorithm.correction.cap",
    "reward_function": "reward (a list of {name, weight})",
    # rollout
    "backend": "rollout.engine",
    "rollout_backend": "rollout.engine",
    "max_response_length": "rollout.max_tokens",
    "max_new_tokens": "rollout.max_tokens",
    "gpu_memory_utilization": "rollout.engine_options.gpu_memory_utilization",
    "enforce_eager": "rollout.engine_options.enforce_eager",
    # data
    "prompt_column_name": "data.train.prompt",
    "response_column_name": "data.train.answer",
    "conversation_column_name": "data.train.messages",
    "system_prompt": "data.train.system",
    "annotation_path": "data.train.path",
    "local_dir": "data.train.path",
    "test_size": "data.holdout",
    "nframes": "data.train.max_frames",
    "dataloader_num_workers": "data.workers",
    "dataloader_shuffle": "data.train.shuffle",
    "dataset": "data.train",
    "validation": "eval and data.eval",
    # checkpoints, evaluation, logging
    "ckpt": "checkpoint",
    "enable_checkpoint": "checkpoint.enabled",
    "save_freq": "checkpoint.save_every",
    "save_interval": "checkpoint.save_every",
    "save_freq_in_epoch": "checkpoint.save_every (in steps)",
    "save_mode": "checkpoint.mode",
    "max_keep": "checkpoint.max_keep",
    "export_safetensors": "checkpoint.export (off, final or all)",
    "upload_hf": "checkpoint.upload_hub",
    "hf_repo_name": "checkpoint.upload_hub",
    "s3_bucket": "checkpoint.upload_s3",
    "s3_prefix": "checkpoint.upload_s3",
    "resume": "the command 'hpc-rl resume RUN'",
    "output_dir": "output_root",
    "val_before_train": "eval.before",
    "freq": "eval.every",
    "val_check_interval": "eval.every",
    "project_name": "logging.wandb.project",
    "experiment_name": "name",
    "group_name": "name",
    "logger": "logging.wandb.mode",
    "logger_backends": "logging.wandb.mode",
    # Slurm
    "num_nodes": "cluster.policy.nodes and cluster.rollout.nodes",
    "partition": "cluster.policy.partition and cluster.rollout.partition",
    "walltime": "cluster.time",
    "env": "cluster.variables",
    "env_vars": "cluster.variables",
}


def new_name(full_key: str) -> str | None:
    """What the unknown `full_key` is called in a recipe, or None if it is no known old or misplaced name."""
    name = full_key.rsplit(".", 1)[-1]
    target = RENAMED.get(name)
    if target is not None:
        place = target.split(" ")[0]
        if place == full_key:
            return None
        return f"it belongs at {target}" if place.endswith(f".{name}") else f"it is called {target} here"
    places = [place for place in _places().get(name, []) if place != full_key]
    return f"it belongs at {' or '.join(places)}" if places else None


def _places() -> dict[str, list[str]]:
    """Every key of the schema, with the dotted paths at which it is allowed."""
    from pydantic import BaseModel

    from hpc_rl.recipe.schema import Recipe

    found: dict[str, list[str]] = {}

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            found.setdefault(name, []).append(prefix + name)
            for inner in (info.annotation, *getattr(info.annotation, "__args__", ())):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    walk(inner, f"{prefix}{name}.")

    walk(Recipe, "")
    return {name: places for name, places in found.items() if len(places) <= 2}
