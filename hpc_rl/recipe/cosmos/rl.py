"""RL: cosmos-rl's GRPO trainer and its rollouts as `algorithm`, `rollout` and what of `policy` they decide.

Their loss, by which the names are matched: clip [1-e_l, 1+e_h] and a dual clip c on token ratios (`grpo`,
`dapo`) or on one ratio of the sequence (`gspo`); AIPO's truncated ratio where `aipo_rho` is set.
"""

from __future__ import annotations

from typing import Any

from hpc_rl.recipe.cosmos.draft import Draft
from hpc_rl.recipe.cosmos.policy import NODE

_PLACE = "train.train_policy"
_ROLLOUT = "rollout"
_BACKENDS = {"vllm": "vllm", "vllm_async": "vllm", "trtllm": "vllm", "example_hf": "hf"}
_LOSSES = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
}


def translate_rl(draft: Draft) -> None:
    name = _name(draft)
    _group(draft)
    _clip(draft, name)
    _aggregation(draft, name)
    _kl(draft)
    _off_policy(draft, name)
    _staleness(draft)
    _filter(draft, name)
    for key, to in (
        ("positive_nll_coef", "positive_nll"),
        ("off_policy_masking_delta", "off_policy_mask"),
        ("entropy_coeff", "entropy_beta"),
    ):
        if value := draft.get(f"{_PLACE}.{key}"):
            draft.put(f"algorithm.{to}", value, f"{_PLACE}.{key}")
        else:
            draft.same(f"{_PLACE}.{key}", "off")
    _batches(draft)
    _replicas(draft)


def _name(draft: Draft) -> str:
    key, rho = f"{_PLACE}.variant", draft.get(f"{_PLACE}.aipo_rho")
    variant = draft.get(key)
    if variant not in ("grpo", "dapo", "gspo"):
        draft.bad(key, f'is "{variant}"; allowed: grpo, dapo, gspo')
        variant = "grpo"
    if rho is not None:
        draft.put("algorithm.name", "aipo", f"{_PLACE}.aipo_rho", note="replaces PPO's clip")
        draft.put("algorithm.is_cap", rho, f"{_PLACE}.aipo_rho")
        draft.drop(key, "aipo_rho makes it AIPO") if variant != "grpo" else draft.same(key)
        return "aipo"
    draft.put("algorithm.name", variant, key)
    return str(variant)


def _group(draft: Draft) -> None:
    draft.put("algorithm.group_size", draft.get(f"{_ROLLOUT}.n_generation"), f"{_ROLLOUT}.n_generation")
    sampled, trained = f"{_ROLLOUT}.sampling_config.temperature", f"{_PLACE}.temperature"
    draft.put("algorithm.temperature", draft.get(sampled), sampled)
    if draft.get(trained) == draft.get(sampled):
        draft.same(trained, "that of the sampling")
    else:
        draft.drop(trained, f"log-probs are those of the sampling's temperature, {draft.get(sampled):g}")
    for name in ("advantage_low", "advantage_high"):
        key, bound = f"{_PLACE}.{name}", abs(draft.get(f"{_PLACE}.{name}"))
        size = draft.get(f"{_ROLLOUT}.n_generation")
        if draft.written(key) and size > 1 and bound * bound >= size - 1:
            draft.same(key, f"an advantage among {size} answers is never larger")


def _clip(draft: Draft, name: str) -> None:
    if name == "aipo":
        for key in ("epsilon_low", "epsilon_high", "lower_bound_ratio"):
            draft.drop(f"{_PLACE}.{key}", "AIPO truncates the ratio and does not clip")
        return
    for key, to, wide in (("epsilon_low", "clip_low", 0.99), ("epsilon_high", "clip_high", 1e6)):
        value = draft.get(f"{_PLACE}.{key}")
        note = "negative: that side is not clipped" if value < 0 else ""
        draft.put(f"algorithm.{to}", wide if value < 0 else value, f"{_PLACE}.{key}", note=note)
    if name == "gspo":
        return draft.drop(f"{_PLACE}.lower_bound_ratio", "cosmos-rl has no dual clip on sequence ratios")
    key = f"{_PLACE}.lower_bound_ratio"
    draft.put("algorithm.dual_clip", draft.get(key), key)


def _aggregation(draft: Draft, name: str) -> None:
    key, length = f"{_PLACE}.loss_type", f"{_PLACE}.unbiased_loss_max_tokens"
    said, tokens = draft.get(key), draft.get(length)
    if said not in _LOSSES:
        allowed = ", ".join(_LOSSES)
        return draft.bad(key, f'is "{said}"; allowed: {allowed} (a sum over tokens grows with the answers)')
    wanted = _LOSSES[said]
    if name == "gspo":
        note = "" if wanted == "sequence_mean" else "sequences count once, for the ratio is one of a sequence"
        draft.same(key, note) if not note else draft.drop(key, note)
        draft.drop(length, "sequences count once with GSPO")
    elif tokens is not None and said == "seq-mean-token-mean":
        note = "each sequence's sum is divided by this length"
        draft.put("algorithm.loss_aggregation", "constant_length", key, length)
        draft.put("algorithm.loss_length", tokens, length, note=note)
    else:
        draft.put("algorithm.loss_aggregation", wanted, key)
        draft.drop(length, f'cosmos-rl uses it with loss_type "seq-mean-token-mean", not "{said}"')
    unbiased = f"{_PLACE}.unbiased_advantage"
    draft.put(
        "algorithm.normalize_std", not draft.get(unbiased), unbiased, note="A = r - mean(r), without std"
    )


def _kl(draft: Draft) -> None:
    beta, unbiased = draft.get(f"{_PLACE}.kl_beta"), f"{_PLACE}.unbiased_kl_estimate"
    draft.put("algorithm.kl_beta", beta, f"{_PLACE}.kl_beta")
    reset = f"{_PLACE}.reference_reset_interval"
    if beta == 0:
        for key in (unbiased, reset, f"{_PLACE}.reset_optimizer_with_reference"):
            draft.drop(key, "kl_beta is 0: there is no reference model")
        return
    note = "the value of k3 with the gradient of k2, that of the KL itself" if draft.get(unbiased) else ""
    draft.put("algorithm.kl_estimator", "k3_k2" if draft.get(unbiased) else "k3", unbiased, note=note)
    if draft.get(reset):
        draft.put("policy.reference.reset_every", draft.get(reset), reset)
    else:
        draft.same(reset, "the reference stays the model that the run began with")
        draft.drop(f"{_PLACE}.reset_optimizer_with_reference", "the reference is never reset in this file")


def _off_policy(draft: Draft, name: str) -> None:
    """Without either flag cosmos-rl's ratio is 1 on samples of any age: nothing corrects them there."""
    decoupled, cap = f"{_PLACE}.use_decoupled_loss", f"{_PLACE}.behav_imp_weight_cap"
    sampler = f"{_PLACE}.use_rollout_logprobs_for_loss"
    if name == "aipo":
        for key in (decoupled, cap):
            draft.drop(key, "AIPO's ratio is to the sampler, which corrects by itself")
        return draft.same(sampler, "always")
    if not draft.get(decoupled):
        draft.same(decoupled)
        draft.drop(cap, "use_decoupled_loss is off")
        draft.put("algorithm.proximal", "sampler", sampler)
        if not draft.get(sampler):
            draft.notes.append(
                "algorithm.proximal: sampler; this file's loss has ratio 1 on samples up to "
                "allowed_outdated_steps old, with no correction. Here the ratio is to the sampler's log-probs"
            )
        return
    if draft.get(sampler):
        draft.bad(sampler, "is true beside use_decoupled_loss; cosmos-rl takes one of them")
    draft.put("algorithm.proximal", "recompute", decoupled)
    if (limit := draft.get(cap)) is not None:
        note = "weights above it are set to 0, not to it"
        draft.put("algorithm.correction.kind", "icepop", decoupled)
        draft.put("algorithm.correction.low", 0.0)
        draft.put("algorithm.correction.high", limit, cap, note=note)
    else:
        draft.put("algorithm.correction.kind", "tis", decoupled, note="weights are cut off at correction.cap")


def _staleness(draft: Draft) -> None:
    allowed, on_policy = f"{_PLACE}.allowed_outdated_steps", f"{_PLACE}.on_policy"
    if draft.get(on_policy):
        draft.put("algorithm.max_staleness", 0, on_policy, note="generation and training take turns")
        return draft.drop(allowed, "on_policy makes it 0")
    note = "bounded before a prompt is started, so that nothing is thrown away"
    draft.put("algorithm.max_staleness", draft.get(allowed), allowed, note=note)
    draft.same(on_policy)


def _filter(draft: Draft, name: str) -> None:
    key, retry = f"{_PLACE}.filter_reward_metric", f"{_PLACE}.max_retry_for_on_policy"
    metrics = draft.get(key)
    metrics = [metrics] if isinstance(metrics, str) and metrics else list(metrics)
    wanted = name == "dapo" or bool(metrics)
    note = "groups whose weighted rewards are all alike, whatever the reward" if metrics else ""
    if wanted or draft.written(key):
        draft.put("algorithm.drop_zero_variance", wanted, key, note=note)
    if name == "dapo":
        draft.put("algorithm.overlong_buffer", 0)  # cosmos-rl's is a reward
    if wanted and draft.get(retry) >= 0:
        note = "at most so many times a step's prompts are started for groups that teach nothing"
        draft.put("algorithm.max_refill", float(draft.get(retry)), retry, note=note)
    else:
        draft.drop(retry, "algorithm.max_refill bounds how often dropped groups are replaced")


def _batches(draft: Draft) -> None:
    """`train_batch_per_replica` counts answers of one policy replica, over all its ranks."""
    key, replicas = "train.train_batch_per_replica", draft.get("policy.parallelism.n_init_replicas")
    per_replica = draft.get(key)
    note = (
        f"{per_replica} answers on each of {replicas} replicas there, over all here" if replicas > 1 else ""
    )
    draft.put("policy.batch_size", per_replica * replicas, key, note=note)
    part = f"{_PLACE}.batch_size_per_optimize"
    if (size := draft.get(part)) is not None:
        if size < 1 or per_replica % size:
            draft.bad(part, f"is {size}; must divide train_batch_per_replica, which is {per_replica}")
        else:
            draft.put("policy.updates.mini_batches", per_replica // size, part)
    epochs = f"{_PLACE}.mu_iterations"
    draft.put("policy.updates.epochs", draft.get(epochs), epochs)
    length, rows = draft.get("policy.model_max_length"), f"{_PLACE}.mini_batch"
    tokens = f"{_PLACE}.max_token_len_per_mini_batch"
    if draft.get(tokens):
        draft.put("policy.micro_batch_tokens", draft.get(tokens), tokens)
        draft.drop(rows, "max_token_len_per_mini_batch bounds a forward")
    else:
        draft.same(tokens, "none")
        count = draft.get(rows)
        note = f"{count} rows of up to {length} tokens; short rows are packed into the same room"
        draft.put("policy.micro_batch_tokens", count * length, rows, note=note)
    checkpointing = "policy.model_gradient_checkpointing"
    draft.put("policy.activation_checkpointing", draft.get(checkpointing), checkpointing)
    draft.put("policy.cpu_offload", draft.get("train.fsdp_offload"), "train.fsdp_offload")


def _replicas(draft: Draft) -> None:
    place = f"{_ROLLOUT}.parallelism"
    backend = draft.get(f"{_ROLLOUT}.backend")
    if backend not in _BACKENDS:
        known = ", ".join(_BACKENDS)
        draft.bad(f"{_ROLLOUT}.backend", f'is "{backend}"; allowed: {known} (robots come later)')
        return
    note = "TensorRT-LLM is not here" if backend == "trtllm" else ""
    draft.put("rollout.engine", _BACKENDS[backend], f"{_ROLLOUT}.backend", note=note)
    draft.put("rollout.replicas", draft.get(f"{place}.n_init_replicas"), f"{place}.n_init_replicas")
    warn = "cosmos-rl's default is 2, whatever the model"
    note = "" if draft.written(f"{place}.tp_size") else warn
    draft.put("rollout.parallel.tp", draft.get(f"{place}.tp_size"), f"{place}.tp_size", note=note)
    draft.put("rollout.parallel.pp", draft.get(f"{place}.pp_size"), f"{place}.pp_size")
    limit = f"{_ROLLOUT}.max_response_length"
    draft.put("rollout.max_tokens", draft.get(limit), limit)
    length = "policy.model_max_length"
    if draft.written(length) or draft.get(length) > draft.get(limit):
        draft.put("rollout.max_model_len", draft.get(length), length)
    if _BACKENDS[backend] == "vllm":
        memory = f"{_ROLLOUT}.gpu_memory_utilization"
        draft.put("rollout.engine_options.gpu_memory_utilization", draft.get(memory), memory)
        eager = f"{_ROLLOUT}.enforce_eager"
        if draft.written(eager):
            draft.put("rollout.engine_options.enforce_eager", draft.get(eager), eager)
    flights = f"{_ROLLOUT}.async_config.max_concurrent_requests"
    if draft.written(flights):
        draft.put("rollout.max_in_flight", draft.get(flights), flights, note="prompts of a replica")
    width = draft.get(f"{place}.tp_size") * draft.get(f"{place}.pp_size")
    _nodes(draft, draft.get(f"{place}.n_init_replicas"), width)
    if draft.get("train.ema_enable"):
        draft.notes.append(
            "policy.ema: replicas sample from the policy, exports and evaluations are of the average"
        )


def _nodes(draft: Draft, replicas: int, width: int) -> None:
    if width < 1 or width > NODE or replicas < 1:
        return  # the plan says what does not fit
    nodes = -(-replicas // (NODE // width))
    if nodes > 1:
        draft.put("cluster.rollout.nodes", nodes)
        draft.notes.append(f"cluster.rollout.nodes: {nodes}, for {replicas} replicas of {width} GPUs each")


def is_given(overrides: Any, section: str) -> bool:
    """Whether the command line sets `section`, or something in it."""
    return any(text.replace(" ", "").startswith((f"{section}=", f"{section}.")) for text in overrides)
