"""The keys of cosmos-rl's configuration that RL reads, or reads otherwise than SFT; see `keys.py`.

`RL` is the whole table for a file of RL: what both kinds share, and this. Keys that only SFT reads are known
by name (`SFT_ONLY`).
"""

from __future__ import annotations

from hpc_rl.recipe.cosmos.keys import SECTIONS, Key, _drop, _map

_ORDER = "prompts are handed out as far as algorithm.max_staleness lets them; none is discarded as outdated"
_SAMPLING = "sampled log-probs are those of the whole vocabulary, which the trainer computes as well"
_ENGINE = "the engine decides; rollout.engine_options.extra takes vLLM's own options"
_MODELS = "models of diffusers and robots come with a later converter"
_REMOTE = "a remote reward service comes with the recipes of world models"
_TURNS = "conversations with tools are a simulator: name one (docs/rollout.md)"
_DISTILL = "on-policy distillation is a `teacher` section and an algorithm of its own: write them by hand"
_GPUS = "a replica is tp x pp GPUs of one vLLM engine"

_TRAIN = {
    "transfer_dtype": _drop("text", None, "pushes hold the model's dtype (model.dtype)"),
    "logprob_dtype": _drop("text", "float32", "log-probs are always computed in float32", "float32"),
    "sync_weight_interval": _drop("count", 1, "new weights are pushed after every step", 1),
    "coalesce_weight_sync": _drop("flag", False, "a replica always gets the newest weights", True, False),
    "non_text": _drop("flag", False, "data.train.format says what the rows hold", False),
}

_GRPO = {
    "type": _map("text", None, "kind"),
    "trainer_type": _drop("text", "grpo", "kind and algorithm.name say it", "grpo"),
    "variant": _map("text", "grpo", "algorithm.name"),
    "prompt_column_name": _map("text", "", "data.train.prompt"),
    "response_column_name": _map("text", "", "data.train.answer"),
    "dataloader_shuffle": _map("flag", True, "data.train.shuffle"),
    "dataloader_seed": _drop("count", 0, "the order of the rows follows `seed`"),
    "dataloader_num_workers": _drop("count", 0, "the replicas tokenise their prompts themselves"),
    "dataloader_prefetch_factor": _drop("count", None, "the replicas tokenise their prompts themselves"),
    "dataloader_batch_size": _drop("count", 1, "prompts are handed out one by one, to whoever has room"),
    "data_dispatch_as_rank_in_mesh": _drop("flag", False, "samples are packed over all ranks by tokens"),
    "enable_dataset_cache": _drop("flag", False, "rows are encoded when they are handed out"),
    "reward_function": _map("any", ["single_choice"], "reward"),
    "use_remote_reward": _drop("flag", False, _REMOTE),
    "filter_reward_metric": _map("text|texts", [], "algorithm.drop_zero_variance"),
    "bypass_reward": _drop("flag", False, "rewards are always those of the recipe"),
    "group_reward_calculation": _drop("flag", False, "a reward sees one answer at a time"),
    "temperature": _map("number", 1.0, "algorithm.temperature"),
    "epsilon_low": _map("number", 0.2, "algorithm.clip_low"),
    "epsilon_high": _map("number", 0.2, "algorithm.clip_high"),
    "advantage_low": _drop("number", -5.0, "advantages are not cut off", -5.0),
    "advantage_high": _drop("number", 5.0, "advantages are not cut off", 5.0),
    "positive_nll_coef": _map("number", None, "algorithm.positive_nll"),
    "lower_bound_ratio": _map("number", 3.0, "algorithm.dual_clip"),
    "loss_type": _map("text", "token-mean", "algorithm.loss_aggregation"),
    "unbiased_loss_max_tokens": _map("count", None, "algorithm.loss_length", "algorithm.loss_aggregation"),
    "unbiased_advantage": _map("flag", False, "algorithm.normalize_std"),
    "algo": _drop("text", "grpo", "algorithm.name says it", "grpo"),
    "kl_beta": _map("number", 0.0, "algorithm.kl_beta"),
    "unbiased_kl_estimate": _map("flag", False, "algorithm.kl_estimator"),
    "off_policy_masking_delta": _map("number", None, "algorithm.off_policy_mask"),
    "aipo_rho": _map("number", None, "algorithm.name", "algorithm.is_cap"),
    "mu_iterations": _map("count", 1, "policy.updates.epochs"),
    "mini_batch": _map("count", 2, "policy.micro_batch_tokens"),
    "batch_size_per_optimize": _map("count", None, "policy.updates.mini_batches"),
    "max_token_len_per_mini_batch": _map("count", None, "policy.micro_batch_tokens"),
    "entropy_coeff": _map("number", 0.0, "algorithm.entropy_beta"),
    "allowed_outdated_steps": _map("count", 4, "algorithm.max_staleness"),
    "on_policy": _map("flag", False, "algorithm.max_staleness"),
    "no_outdated_rollout": _drop("flag", False, _ORDER),
    "uncentralized_training": _drop("flag", False, "one controller forms every batch"),
    "outdated_rollout_fetch_batch_size": _drop("count", 0, _ORDER, 0),
    "max_inflight_steps": _drop("count", None, _ORDER),
    "min_filter_prefix_tokens": _drop("count", None, "filtered groups are counted and replaced as a whole"),
    "max_retry_for_on_policy": _map("count", -1, "algorithm.max_refill"),
    "reference_reset_interval": _map("count", None, "policy.reference.reset_every"),
    "reset_optimizer_with_reference": _drop(
        "flag", True, "the optimizer keeps its state when the reference is reset", False
    ),
    "balance_dp_token": _drop("flag", False, "the loss is a mean over the tokens of all ranks", True),
    "use_decoupled_loss": _map("flag", False, "algorithm.proximal", "algorithm.correction.kind"),
    "behav_imp_weight_cap": _map("number", None, "algorithm.correction.high"),
    "rollout_as_token_ids": _drop("flag", False, "what was sampled is never tokenised again", True),
    "collect_rollout_logprobs": _drop("flag", False, "the sampler's log-probs always travel along", True),
    "use_rollout_logprobs_for_loss": _map("flag", False, "algorithm.proximal"),
    "overlong_reward.enable_overlong_penalty": _map("flag", False, "reward"),
    "overlong_reward.buffer_length": _map("count", 4096, "reward"),
    "overlong_reward.penalty_factor": _map("number", 1.0, "reward"),
    "remote_reward": _drop("map", None, _REMOTE),
}

_ROLLOUT = {
    "backend": _map("text", "vllm", "rollout.engine"),
    "mode": _drop("text", "sync", "replicas always take further prompts while others are under way", "async"),
    "enforce_eager": _map("flag", True, "rollout.engine_options.enforce_eager"),
    "include_stop_str_in_output": _drop("flag", False, "stop strings stay among the answer's tokens", True),
    "gpu_memory_utilization": _map("number", 0.8, "rollout.engine_options.gpu_memory_utilization"),
    "enable_chunked_prefill": _drop("flag", False, _ENGINE),
    "max_response_length": _map("count", 2048, "rollout.max_tokens"),
    "n_generation": _map("count", 16, "algorithm.group_size"),
    "n_generation_to_batch": _drop("flag", False, "the answers of a prompt are always one batch", True),
    "n_generation_mini_batch": _drop("count", None, "the answers of a prompt are always one batch"),
    "batch_size": _drop("count", 1, "a replica has as many prompts as its engine takes"),
    "quantization": _drop("text", "none", "replicas compute in model.dtype", "none"),
    "seed": _drop("count", None, "each prompt has a seed of its own, which follows `seed`"),
    "vllm_use_flashinfer": _drop("flag", False, _ENGINE),
    "async_r2r_sync": _drop(
        "text", "disabled", "weights change in flight, at a token boundary", "generation"
    ),
    "prefetch_rollout": _drop("flag", False, "prompts are handed out ahead", True),
    "prefetch_queue_maxsize": _drop("count", 2, "prompts are handed out ahead"),
    "broadcast_all_params": _drop(
        "flag", False, "every push is whole, and checked by name and checksum", True
    ),
    "sampling_config.temperature": _map("number", 1.0, "algorithm.temperature"),
    "sampling_config.top_p": _drop("number", 1.0, _SAMPLING, 1),
    "sampling_config.top_k": _drop("count", -1, _SAMPLING, -1, 0),
    "sampling_config.repetition_penalty": _drop("number", 1.0, _SAMPLING, 1),
    "sampling_config.use_flashinfer": _drop("flag", False, _ENGINE),
    "async_config.max_concurrent_requests": _map("count", 10, "rollout.max_in_flight"),
    "multi_turn_config.enable": _drop("flag", False, _TURNS),
    "multi_turn_config.enable_tools": _drop("flag", False, _TURNS),
    "multi_turn_config.enable_thinking": _drop("flag", False, "the model's chat template decides"),
    "multi_turn_config.custom_chat_template_path": _drop("text", None, "model.tokenizer brings its template"),
    "multi_turn_config.max_assistant_turns": _drop("count", 5, _TURNS),
    "multi_turn_config.add_generation_prompt": _drop("flag", True, "a prompt always ends with it", True),
    "multi_turn_config.continue_final_message": _drop("flag", False, _TURNS),
    "parallelism.n_init_replicas": _map("count", 1, "rollout.replicas"),
    "parallelism.tp_size": _map("count", 2, "rollout.parallel.tp"),
    "parallelism.pp_size": _map("count", 1, "rollout.parallel.pp"),
    "parallelism.cp_size": _drop("count", 1, _GPUS, 1),
    "parallelism.ep_size": _drop("count", 1, _GPUS, 1),
    "parallelism.dp_shard_size": _drop("count", 1, _GPUS, 1, -1),
    "parallelism.dp_replicate_size": _drop("count", 1, _GPUS, 1),
    "parallelism.pp_dynamic_shape": _drop("flag", False, _GPUS),
    "parallelism.pp_micro_batch_size": _drop("count", 1, _GPUS, 1),
    "parallelism.pp_schedule": _drop("text", "Interleaved1F1B", _GPUS),
    "parallelism.pp_layers_per_stage": _drop("count", 2, _GPUS),
}

_VALIDATION = {
    **SECTIONS["validation"],
    "enable": _map("flag", False, "data.eval.path"),
    "batch_size": _drop("count", None, "a replica has as many prompts as its engine takes"),
    "temperature": _map("number", 0.0, "eval.temperature"),
    "top_p": _map("number", None, "eval.top_p"),
    "top_k": _drop("count", 1, "eval.temperature 0 is greedy; sampling is from the whole vocabulary", 1, -1),
    "repetition_penalty": _drop("number", 1.0, "answers are sampled as the model gives them", 1),
    "n_generation": _map("count", 1, "eval.samples"),
    "max_response_length": _map("count", None, "eval.max_tokens"),
    "reward_function": _drop("any", [], "evaluations have the rewards of the training", []),
    "use_remote_reward": _drop("flag", None, _REMOTE),
    "remote_reward": _drop("map", None, _REMOTE),
}

_CUSTOM = {
    name: _drop(key.kind, key.default, "read by a script of your own; what it does belongs in data.train")
    for name, key in SECTIONS["custom"].items()
}

_POLICY = {
    **SECTIONS["policy"],
    "model_max_length": _map("count", 4096, "rollout.max_model_len"),
    "aux_loss_coeff": _drop("number", 0.0, "the loss has no router term", 0),
}

RL_SECTIONS: dict[str, dict[str, Key]] = {
    **SECTIONS,
    "train": {**SECTIONS["train"], **_TRAIN},
    "train.train_policy": _GRPO,
    "train.train_policy.dataset": {
        **SECTIONS["train.train_policy.dataset"],
        "test_size": _drop(
            "number", None, "RL evaluates rows of their own: name them as data.eval, with a split or a limit"
        ),
    },
    "policy": _POLICY,
    "policy.lora": {
        **SECTIONS["policy.lora"],
        "lora_dropout": _drop("number", 0.0, "the sampler has no dropout, so that ratios would be wrong", 0),
    },
    "rollout": _ROLLOUT,
    "validation": _VALIDATION,
    "custom": _CUSTOM,
}

RL: dict[str, Key] = {
    f"{section}.{name}".lstrip("."): key
    for section, keys in RL_SECTIONS.items()
    for name, key in keys.items()
}

SFT_ONLY = frozenset(f"train.train_policy.{name}" for name in SECTIONS["train.train_policy"]) - set(RL)


def foreign(key: str) -> str | None:
    """Why a key that RL does not read is dropped, or None if it is not known at all."""
    if key in SFT_ONLY:
        return "type grpo did not read it"
    if key == "distillation" or key.startswith("distillation."):
        return _DISTILL
    if key.partition(".")[0] == "vla" or key == "policy.diffusers" or key.startswith("policy.diffusers."):
        return _MODELS
    return None
