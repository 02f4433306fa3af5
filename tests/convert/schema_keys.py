"""The sections of cosmos-rl's last schema that SFT reads, transcribed key by key, and a value for each.

Kept apart from the converter's own table on purpose: this one is the schema, that one what becomes of it.
A row is (key, a value that is not cosmos-rl's default, what must be set for it to mean anything).
"""

from __future__ import annotations

from typing import Any

Row = tuple[str, Any, dict[str, Any]]

LOADER = {"train.train_policy.enable_dp_load_balancing": True, "train.max_num_steps": 50}
VALID = {"validation.enable": True}
VALID_SET = {**VALID, "validation.dataset.name": "org/held-out"}
SAVED = {"train.ckpt.enable_checkpoint": True}
HUB = {**SAVED, "train.ckpt.upload_hf": True}
S3 = {**SAVED, "train.ckpt.upload_s3": "final", "train.ckpt.s3_bucket": "a-bucket"}
PROFILE = {"profiler.enable_profiler": True, "profiler.sub_profiler_config.do_profile": True}
DECAY = {"train.optm_decay_type": "linear"}
LLAVA = {"custom.dataset.annotation_path": "rows.json"}
WANDB = {"logging.logger": ["console", "wandb"]}

TOP: list[Row] = [("redis", "12800", {}), ("eth_ips", "10.0.0.1", {}), ("mode", "colocated", {})]

TRAIN: list[Row] = [
    ("train.optm_name", "Adam", {}),
    ("train.optm_lr", 3e-5, {}),
    ("train.optm_impl", "foreach", {}),
    ("train.optm_weight_decay", 0.1, {}),
    ("train.optm_betas", [0.9, 0.95], {}),
    ("train.epsilon", 1e-7, {}),
    ("train.optm_warmup_steps", 7, {}),
    ("train.optm_warmup_start_factor", 0.1, {}),
    ("train.optm_decay_ratio", 0.4, {**DECAY, "train.max_num_steps": 100}),
    ("train.optm_decay_type", "cosine", {}),
    ("train.optm_min_lr_factor", 0.1, DECAY),
    ("train.optm_grad_norm_clip", 0.5, {}),
    ("train.ema_enable", True, {}),
    ("train.ema_decay", 0.99, {"train.ema_enable": True}),
    ("train.ema_update_step_interval", 4, {}),
    ("train.master_dtype", "bfloat16", {}),
    ("train.param_dtype", "float32", {}),
    ("train.transfer_dtype", "bfloat16", {}),
    ("train.logprob_dtype", "bfloat16", {}),
    ("train.fsdp_reduce_dtype", "bfloat16", {}),
    ("train.fsdp_offload", True, {}),
    ("train.fsdp_reshard_after_forward", "never", {}),
    ("train.train_batch_per_replica", 16, {}),
    ("train.resume", True, {}),
    ("train.epoch", 3, {}),
    ("train.max_num_steps", 40, {}),
    ("train.output_dir", "./outputs/mine", {}),
    ("train.timestamp", "20260101", {}),
    ("train.async_tp_enabled", True, {}),
    ("train.compile", True, {}),
    ("train.sync_weight_interval", 2, {}),
    ("train.coalesce_weight_sync", True, {}),
    ("train.deterministic", True, {}),
    ("train.seed", 17, {}),
    ("train.activation_offload", True, {}),
    ("train.fa_version", 3, {}),
    ("train.local_dataset", False, {}),
    ("train.force_use_hf", True, {}),
    ("train.non_text", True, {}),
    ("train.sequence_packing", True, {}),
    ("train.save_ckpt_at_exit", False, {}),
    ("train.signal_to_handle", ["SIGUSR2"], {}),
    ("train.fp8.enable_fp8", True, {}),
    ("train.fp8.fp8_recipe", "delayed_scaling", {}),
    ("train.fp8.quant_recipe", "tensorwise", {}),
    ("train.fp4.enable_fp4", True, {}),
    ("train.fp4.fp4_recipe", "delayed_scaling", {}),
    ("train.fp4.quant_recipe", "tensorwise", {}),
]

CHECKPOINT: list[Row] = [
    ("train.ckpt.enable_checkpoint", True, {}),
    ("train.ckpt.save_freq", 33, SAVED),
    ("train.ckpt.save_freq_in_epoch", 2, SAVED),
    ("train.ckpt.save_mode", "sync", SAVED),
    ("train.ckpt.max_keep", -1, SAVED),
    ("train.ckpt.export_safetensors", False, SAVED),
    ("train.ckpt.upload_hf", True, SAVED),
    ("train.ckpt.hf_repo_name", "mine", HUB),
    ("train.ckpt.upload_s3", "all", S3),
    ("train.ckpt.s3_bucket", "b-bucket", S3),
    ("train.ckpt.s3_prefix", "elsewhere", S3),
]

SFT: list[Row] = [
    ("train.train_policy.type", "sft", {}),
    ("train.train_policy.trainer_type", "sft", {}),
    ("train.train_policy.mini_batch", 4, {}),
    ("train.train_policy.dataloader_shuffle", False, {}),
    ("train.train_policy.dataloader_seed", 5, {}),
    ("train.train_policy.dataloader_batch_size", 2, {}),
    ("train.train_policy.dataloader_num_workers", 8, {}),
    ("train.train_policy.dataloader_prefetch_factor", 4, {}),
    ("train.train_policy.dataloader_drop_last", True, {}),
    ("train.train_policy.dataloader_broadcast", True, {}),
    ("train.train_policy.data_dispatch_as_rank_in_mesh", True, {}),
    ("train.train_policy.enable_dataset_cache", True, {}),
    ("train.train_policy.conversation_column_name", "turns", {}),
    ("train.train_policy.system_prompt", "Be brief.", {}),
    ("train.train_policy.balance_dp_token", False, {}),
    ("train.train_policy.enable_dp_load_balancing", True, {"train.max_num_steps": 50}),
    ("train.train_policy.load_balanced_pool_size", 64, LOADER),
    ("train.train_policy.load_balanced_max_tokens_for_batch", 9000, LOADER),
    ("train.train_policy.load_balanced_batching_strategy", "prefer_first", LOADER),
    ("train.train_policy.load_balanced_batches_per_optimizer_step", 3, LOADER),
    ("train.train_policy.dataset.name", "org/other", {}),
    ("train.train_policy.dataset.subset", "robovqa", {}),
    ("train.train_policy.dataset.revision", "abc123", {}),
    ("train.train_policy.dataset.split", ["a", "b"], {}),
    ("train.train_policy.dataset.test_size", 50, VALID),
    ("train.train_policy.dataset.local_dir", "./rows", {}),
]

POLICY: list[Row] = [
    ("policy.model_name_or_path", "org/model", {}),
    ("policy.model_safetensor_path", "/weights", {}),
    ("policy.model_revision", "main", {}),
    ("policy.model_max_length", 2048, {}),
    ("policy.model_gradient_checkpointing", False, {}),
    ("policy.trainable_map", {"model.visual": False}, {}),
    ("policy.freeze_pattern", ["^visual\\."], {}),
    ("policy.trainable_pattern", ["layers\\.3\\."], {}),
    ("policy.enable_liger_kernel", True, {}),
    ("policy.enable_liger_cross_entropy", True, {}),
    ("policy.enable_liger_fused_cross_entropy", True, {}),
    ("policy.aux_loss_coeff", 0.1, {}),
    ("policy.is_diffusers", False, {}),
    ("policy.lora.r", 4, {}),
    ("policy.lora.lora_names", ["a", "b"], {}),
    ("policy.lora.lora_path", "/adapter", {}),
    ("policy.lora.lora_alpha", 24.0, {}),
    ("policy.lora.lora_dropout", 0.1, {}),
    ("policy.lora.target_modules", ["q_proj", "v_proj"], {}),
    ("policy.lora.primary_adapter", "a", {}),
    ("policy.lora.use_rslora", True, {}),
    ("policy.lora.modules_to_save", ["lm_head"], {}),
    ("policy.lora.alpha_pattern", {"q_proj": 4.0}, {}),
    ("policy.lora.r_pattern", {"q_proj": 2}, {}),
    ("policy.lora.init_lora_weights", "pissa", {}),
    ("policy.parallelism.n_init_replicas", 2, {}),
    ("policy.parallelism.tp_size", 4, {}),
    ("policy.parallelism.cp_size", 2, {}),
    ("policy.parallelism.ep_size", 2, {"policy.parallelism.dp_shard_size": 4}),
    ("policy.parallelism.dp_shard_size", 2, {}),
    ("policy.parallelism.pp_size", 2, {}),
    ("policy.parallelism.dp_replicate_size", 2, {}),
    ("policy.parallelism.pp_dynamic_shape", True, {}),
    ("policy.parallelism.pp_micro_batch_size", 2, {}),
    ("policy.parallelism.pp_schedule", "GPipe", {}),
    ("policy.parallelism.pp_layers_per_stage", 4, {}),
]

REST: list[Row] = [
    ("logging.logger", ["wandb"], {}),
    ("logging.log_interval", 10, {}),
    ("logging.multi_modal_log_interval", 10, {}),
    ("logging.project_name", "mine", WANDB),
    ("logging.group_name", "mine", WANDB),
    ("logging.experiment_name", "first-try", {}),
    ("logging.report_mfu", True, {}),
    ("profiler.enable_profiler", True, {"profiler.sub_profiler_config.do_profile": True}),
    ("profiler.enable_nsys", True, {}),
    ("profiler.sub_profiler_config.do_profile", True, {"profiler.enable_profiler": True}),
    ("profiler.sub_profiler_config.active_steps", 5, PROFILE),
    ("profiler.sub_profiler_config.warmup_steps", 6, PROFILE),
    ("profiler.sub_profiler_config.wait_steps", 7, PROFILE),
    ("profiler.sub_profiler_config.rank_filter", [0, 3], PROFILE),
    ("profiler.sub_profiler_config.record_shape", True, PROFILE),
    ("profiler.sub_profiler_config.profile_memory", True, PROFILE),
    ("profiler.sub_profiler_config.with_stack", True, PROFILE),
    ("profiler.sub_profiler_config.with_modules", True, PROFILE),
    ("validation.enable", True, {}),
    ("validation.val_before_train", False, VALID),
    ("validation.freq", 11, VALID),
    ("validation.batch_size", 2, VALID),
    ("validation.temperature", 0.5, VALID),
    ("validation.top_p", 0.9, VALID),
    ("validation.top_k", 5, VALID),
    ("validation.repetition_penalty", 1.1, VALID),
    ("validation.n_generation", 2, VALID),
    ("validation.max_response_length", 64, VALID),
    ("validation.reward_function", ["format"], VALID),
    ("validation.use_remote_reward", True, VALID),
    ("validation.remote_reward", {"scale": 2.0}, VALID),
    ("validation.dataset.name", "org/held-out", VALID),
    ("validation.dataset.subset", "small", VALID_SET),
    ("validation.dataset.revision", "abc123", VALID_SET),
    ("validation.dataset.split", "test", VALID_SET),
    ("validation.dataset.test_size", 9, VALID_SET),
    ("validation.dataset.local_dir", "./held-out", VALID),
]

# What the published LLaVA and Hugging Face scripts read from the free-form section.
CUSTOM: list[Row] = [
    ("custom.dataset.annotation_path", "rows.json", {}),
    ("custom.dataset.path", "./saved", {}),
    ("custom.dataset.media_path", "/media", LLAVA),
    ("custom.dataset.system_prompt", "Look closely.", LLAVA),
    ("custom.vision.fps", 4, LLAVA),
    ("custom.vision.max_frames", 16, LLAVA),
    ("custom.vision.nframes", 8, LLAVA),
    ("custom.vision.min_pixels", 3136, LLAVA),
    ("custom.vision.max_pixels", 81920, LLAVA),
    ("custom.vision.min_frames", 4, LLAVA),
    ("custom.vision.total_pixels", 100000, LLAVA),
    ("custom.vision.resized_height", 224, LLAVA),
    ("custom.vision.resized_width", 224, LLAVA),
    ("custom.vision.video_start", 0.5, LLAVA),
    ("custom.vision.video_end", 2.5, LLAVA),
]

ROWS: list[Row] = [*TOP, *TRAIN, *CHECKPOINT, *SFT, *POLICY, *REST, *CUSTOM]
