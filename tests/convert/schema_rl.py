"""The sections of cosmos-rl's last schema as its GRPO trainer reads them, transcribed key by key.

With each a value that is not the default, and what must be set for it to mean anything (`schema_keys`).
"""

from __future__ import annotations

from typing import Any

from tests.convert.schema_keys import ROWS, Row

# The least that a GRPO configuration says; four GPUs and one replica.
RL_BASE: dict[str, Any] = {
    "train.train_policy.type": "grpo",
    "train.train_policy.dataset.name": "org/rows",
    "train.train_policy.prompt_column_name": "question",
    "train.train_policy.response_column_name": "answer",
    "train.train_batch_per_replica": 32,
    "policy.model_name_or_path": "org/base",
    "policy.parallelism.tp_size": 1,
    "policy.parallelism.dp_shard_size": 4,
    "rollout.parallelism.tp_size": 1,
}
DAPO = {"train.train_policy.variant": "dapo"}
KL = {"train.train_policy.kl_beta": 0.01}
MEAN = {"train.train_policy.loss_type": "seq-mean-token-mean"}
DECOUPLED = {"train.train_policy.use_decoupled_loss": True}
LONG = {"train.train_policy.overlong_reward.enable_overlong_penalty": True}
LONG |= {"train.train_policy.overlong_reward.buffer_length": 512}
ROOM = {"rollout.max_response_length": 8192, "policy.model_max_length": 16384}
VALID = {"validation.enable": True, "validation.dataset.name": "org/held-out"}
SAMPLED = {**VALID, "validation.temperature": 0.7}

_GRPO: list[Row] = [
    ("type", "grpo", {}),
    ("trainer_type", "grpo", {}),
    ("variant", "gspo", {}),
    ("prompt_column_name", "problem", {}),
    ("response_column_name", "solution", {}),
    ("dataloader_shuffle", False, {}),
    ("dataloader_seed", 3, {}),
    ("dataloader_num_workers", 4, {}),
    ("dataloader_prefetch_factor", 4, {}),
    ("dataloader_batch_size", 2, {}),
    ("data_dispatch_as_rank_in_mesh", True, {}),
    ("enable_dataset_cache", True, {}),
    ("reward_function", {"gsm8k": 1.0, "format": 0.5}, {}),
    ("use_remote_reward", True, {}),
    ("filter_reward_metric", ["reward"], {}),
    ("bypass_reward", True, {}),
    ("group_reward_calculation", True, {}),
    ("temperature", 0.9, {"rollout.sampling_config.temperature": 0.9}),
    ("epsilon_low", 0.1, {}),
    ("epsilon_high", 0.3, {}),
    ("advantage_low", -1.0, {}),
    ("advantage_high", 1.0, {}),
    ("positive_nll_coef", 0.1, {}),
    ("lower_bound_ratio", 10.0, {}),
    ("loss_type", "seq-mean-token-sum", {}),
    ("unbiased_loss_max_tokens", 1024, MEAN),
    ("unbiased_advantage", True, {}),
    ("algo", "grpo", {}),
    ("kl_beta", 0.005, {}),
    ("unbiased_kl_estimate", True, KL),
    ("off_policy_masking_delta", 0.5, {}),
    ("aipo_rho", 3.0, {}),
    ("mu_iterations", 2, {}),
    ("mini_batch", 4, {}),
    ("batch_size_per_optimize", 16, {}),
    ("max_token_len_per_mini_batch", 9000, {}),
    ("entropy_coeff", 0.01, {}),
    ("allowed_outdated_steps", 1, {}),
    ("on_policy", True, {}),
    ("no_outdated_rollout", True, {}),
    ("uncentralized_training", True, {}),
    ("outdated_rollout_fetch_batch_size", 128, {}),
    ("max_inflight_steps", 6, {}),
    ("min_filter_prefix_tokens", 8, {}),
    ("max_retry_for_on_policy", 5, DAPO),
    ("reference_reset_interval", 50, KL),
    ("reset_optimizer_with_reference", False, {**KL, "train.train_policy.reference_reset_interval": 50}),
    ("balance_dp_token", True, {}),
    ("use_decoupled_loss", True, {}),
    ("behav_imp_weight_cap", 4.0, DECOUPLED),
    ("rollout_as_token_ids", True, {}),
    ("collect_rollout_logprobs", True, {}),
    ("use_rollout_logprobs_for_loss", True, {}),
    ("overlong_reward.enable_overlong_penalty", True, ROOM),
    ("overlong_reward.buffer_length", 256, LONG),
    ("overlong_reward.penalty_factor", 0.5, LONG),
    ("remote_reward", {"scale": 2}, {}),
]

_ROLLOUT: list[Row] = [
    ("backend", "example_hf", {}),
    ("mode", "async", {}),
    ("enforce_eager", False, {}),
    ("include_stop_str_in_output", True, {}),
    ("gpu_memory_utilization", 0.6, {}),
    ("enable_chunked_prefill", True, {}),
    ("max_response_length", 1024, {}),
    ("n_generation", 8, {}),
    ("n_generation_to_batch", True, {}),
    ("n_generation_mini_batch", 4, {}),
    ("batch_size", 4, {}),
    ("quantization", "fp8", {}),
    ("seed", 3, {}),
    ("vllm_use_flashinfer", True, {}),
    ("async_r2r_sync", "inference", {}),
    ("prefetch_rollout", True, {}),
    ("prefetch_queue_maxsize", 4, {}),
    ("broadcast_all_params", True, {}),
    ("sampling_config.temperature", 0.9, {}),
    ("sampling_config.top_p", 0.95, {}),
    ("sampling_config.top_k", 50, {}),
    ("sampling_config.repetition_penalty", 1.1, {}),
    ("sampling_config.use_flashinfer", True, {}),
    ("async_config.max_concurrent_requests", 32, {}),
    ("multi_turn_config.enable", True, {}),
    ("multi_turn_config.enable_tools", True, {}),
    ("multi_turn_config.enable_thinking", True, {}),
    ("multi_turn_config.custom_chat_template_path", "chat.jinja", {}),
    ("multi_turn_config.max_assistant_turns", 3, {}),
    ("multi_turn_config.add_generation_prompt", False, {}),
    ("multi_turn_config.continue_final_message", True, {}),
    ("parallelism.n_init_replicas", 3, {}),
    ("parallelism.tp_size", 2, {}),
    ("parallelism.pp_size", 2, {}),
    ("parallelism.cp_size", 2, {}),
    ("parallelism.ep_size", 2, {}),
    ("parallelism.dp_shard_size", 2, {}),
    ("parallelism.dp_replicate_size", 2, {}),
    ("parallelism.pp_dynamic_shape", True, {}),
    ("parallelism.pp_micro_batch_size", 2, {}),
    ("parallelism.pp_schedule", "1F1B", {}),
    ("parallelism.pp_layers_per_stage", 4, {}),
]

_VALIDATION: list[Row] = [
    ("enable", True, {"validation.dataset.name": "org/held-out"}),
    ("val_before_train", True, VALID),
    ("freq", 7, VALID),
    ("batch_size", 2, VALID),
    ("temperature", 0.7, VALID),
    ("top_p", 0.9, SAMPLED),
    ("top_k", 10, VALID),
    ("repetition_penalty", 1.1, VALID),
    ("n_generation", 4, SAMPLED),
    ("max_response_length", 512, VALID),
    ("reward_function", {"gsm8k": 1.0}, VALID),
    ("use_remote_reward", True, VALID),
    ("remote_reward", {"scale": 2}, VALID),
    ("dataset.name", "org/others", {"validation.enable": True}),
    ("dataset.subset", "main", VALID),
    ("dataset.revision", "abc", VALID),
    ("dataset.split", "test", VALID),
    ("dataset.local_dir", "/data/held", VALID),
    ("dataset.test_size", 0.1, VALID),
]

_OWN = ("train.train_policy.", "validation.")
_DATASET = [row for row in ROWS if row[0].startswith("train.train_policy.dataset.")]
_OF_RL: dict[str, Row] = {
    "train.train_batch_per_replica": ("train.train_batch_per_replica", 64, {}),
    "policy.model_max_length": ("policy.model_max_length", 8192, {}),
}

RL_ROWS: list[Row] = [
    *(_OF_RL.get(row[0], row) for row in ROWS if not row[0].startswith(_OWN)),
    *((f"train.train_policy.{name}", value, needs) for name, value, needs in _GRPO),
    *_DATASET,
    *((f"rollout.{name}", value, needs) for name, value, needs in _ROLLOUT),
    *((f"validation.{name}", value, needs) for name, value, needs in _VALIDATION),
]
