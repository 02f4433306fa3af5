"""What a run with `model.lora` sends to its rollout engines: whole merged weights, or the adapter alone.

The adapter alone is right only where engine and policy have the same base weights, bit for bit, and the
engine has a place for every adapted layer. What is known before the start is decided here; the engines
compare the rest (the model's files, the layers) when they start and at each push, and refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hpc_rl.catalog.facts import ModelFacts, ModelFilesError, read_json
from hpc_rl.recipe.schema import Lora, Recipe

VLLM_MAX_RANK = 512
_FLOATS = {"F64", "F32", "F16", "BF16"}
_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


def lora_sync(recipe: Recipe, facts: ModelFacts | None) -> tuple[Literal["merged", "adapter"], str]:
    """What `rollout.weights.lora: auto` becomes, and why it is merged where it is. `facts` is None where
    the model's files are not on this machine."""
    reason = obstacle(recipe, facts) or _unproven(recipe, facts)
    return ("merged", reason) if reason else ("adapter", "")


def obstacle(recipe: Recipe, facts: ModelFacts | None) -> str:
    """Why an adapter cannot be sent alone, whatever the recipe says; empty where it can."""
    rollout, lora = recipe.rollout, recipe.model.lora
    assert rollout is not None
    if lora is None:
        return "there is no model.lora"
    if recipe.policy.trainer != "fsdp2":
        return f"trainer {recipe.policy.trainer} sends whole weights"
    settings = adapter_settings(lora)
    if settings["modules_to_save"]:
        return "modules_to_save are trained whole, which is more than an adapter"
    for key in ("use_dora", "lora_bias", "target_parameters"):
        if settings.get(key):
            return f"the adapter has {key}, which is more than A and B of linear layers"
    if settings.get("bias", "none") != "none":
        return "the adapter trains biases"
    if rollout.engine == "vllm":
        if rollout.parallel.pp > 1:
            return "vLLM's adapters with rollout.parallel.pp above 1 are not checked layer by layer"
        if settings["rank"] > VLLM_MAX_RANK:
            return f"vLLM takes ranks up to {VLLM_MAX_RANK}, this adapter has {settings['rank']}"
    wanted = _DTYPES.get(recipe.model.dtype)
    dtypes = facts.dtypes if facts is not None else frozenset()
    if packed := sorted(dtypes - _FLOATS):
        return f"the model's files hold {', '.join(packed)}, which every program unpacks in its own way"
    other = sorted(dtypes - {wanted})
    if wanted is not None and other:
        return (
            f"the model's files hold {', '.join(other)}, which an engine in {recipe.model.dtype} rounds "
            "before the adapter is added, and the policy after it"
        )
    return ""


def _unproven(recipe: Recipe, facts: ModelFacts | None) -> str:
    """Why `auto` does not choose the adapter although the recipe may."""
    assert recipe.rollout is not None
    engine = recipe.rollout.engine
    if engine not in ("vllm", "hf"):
        return f"engine {engine} is not known to take adapters"
    if facts is None:
        return "the model's files are not here to look at"
    if engine == "vllm" and not (facts.family is not None and facts.family.vllm_lora):
        name = facts.family.name if facts.family is not None else facts.model_type
        return f"vLLM's adapters are not proven for {name} models"
    return ""


def adapter_settings(lora: Lora) -> dict[str, Any]:
    """The recipe's settings, or those of the file where `lora.adapter` names one, with `rank`, the largest of
    all layers. A file that cannot be read is the policy's to refuse."""
    if lora.adapter is None:
        return {**lora.model_dump(), "rank": max(lora.r, *lora.r_pattern.values(), 0)}
    try:
        saved = read_json(Path(lora.adapter).expanduser() / "adapter_config.json")
    except ModelFilesError:
        return {"rank": lora.r, "modules_to_save": []}
    ranks = [saved.get("r", lora.r), *(saved.get("rank_pattern") or {}).values()]
    return {**saved, "rank": max(ranks), "modules_to_save": saved.get("modules_to_save") or []}
