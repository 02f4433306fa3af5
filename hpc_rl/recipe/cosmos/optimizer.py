"""cosmos-rl's `train.optm_*`: one factor for warm-up, plateau and decay there, a named schedule here.

Their factor (its `warmup_stable_decay`): linear warm-up, plateau, and a decay over the last
`optm_decay_ratio` of all steps (all steps after the warm-up without a ratio) down to `optm_min_lr_factor`.
"""

from __future__ import annotations

import re

from hpc_rl.recipe.cosmos.draft import Draft

# Parts of a vision-language model in the order of cosmos-rl's optimizers; the first is the language model.
_PROJECTOR = r"(^|\.)(multi_modal_projector|merger|mlp1|connector)\."
_VISION = r"(^|\.)(visual|vision_tower|vision_model)\."
_HEAD = r"(^|\.)lm_head\."
_PARTS = {2: (_VISION,), 3: (_PROJECTOR, _VISION), 4: (_PROJECTOR, _VISION, _HEAD)}


def translate_optimizer(draft: Draft) -> None:
    _name(draft)
    base = _rates(draft)
    for key, to in (("optm_weight_decay", "weight_decay"), ("optm_betas", "betas"), ("epsilon", "eps")):
        draft.put(f"policy.optimizer.{to}", draft.get(f"train.{key}"), f"train.{key}")
    norm = draft.get("train.optm_grad_norm_clip")
    note = "" if norm > 0 else "no clipping"
    draft.put(
        "policy.optimizer.clip_norm", norm if norm > 0 else None, "train.optm_grad_norm_clip", note=note
    )
    _warmup(draft)
    _schedule(draft, base)


def _name(draft: Draft) -> None:
    name, key = str(draft.get("train.optm_name")).lower(), "train.optm_name"
    if name == "adam" and draft.get("train.optm_weight_decay") != 0:
        note = "AdamW: the weight decay is decoupled from the gradient, which is not Adam's"
        draft.put("policy.optimizer.name", "adamw", key, note=note)
    else:
        draft.put("policy.optimizer.name", "adamw" if name == "adam" else name, key)


def _rates(draft: Draft) -> float:
    """Learning rates; the main one."""
    value, key = draft.get("train.optm_lr"), "train.optm_lr"
    if isinstance(value, dict):
        return _rate_map(draft, value)
    if not isinstance(value, list):
        draft.put("policy.optimizer.lr", value, key)
        return float(value)
    if not value:
        draft.bad(key, "is an empty list; must be a number, or one number per part of the model")
        return 0.0
    draft.put("policy.optimizer.lr", value[0], key)
    if len(set(value)) > 1:
        parts = _PARTS.get(len(value))
        if parts is None:
            draft.bad(
                key, f"has {len(value)} different rates; give one, and the others as policy.optimizer.groups"
            )
            return 0.0
        groups = [{"match": match, "lr": lr} for match, lr in zip(parts, value[1:], strict=True)]
        order = ("language model", "projector", "vision tower", "head")
        names = (order[0], order[2]) if len(value) == 2 else order[: len(value)]
        note = f"in cosmos-rl's order of a vision-language model's parts: {', '.join(names)}"
        draft.put("policy.optimizer.groups", groups, key, note=note)
    return float(value[0])


def _rate_map(draft: Draft, rates: dict[str, object]) -> float:
    key = "train.optm_lr"
    wrong = [
        name for name, rate in rates.items() if isinstance(rate, bool) or not isinstance(rate, int | float)
    ]
    if wrong or "global" not in rates:
        named = f"{wrong[0]!r} has no number (quote names with dots)" if wrong else "it has no 'global'"
        draft.bad(key, f"must map names of modules and 'global' to learning rates; {named}")
        return 0.0
    numbers = {name: float(rate) for name, rate in rates.items()}  # type: ignore[arg-type]
    draft.put("policy.optimizer.lr", numbers["global"], key)
    # The deepest module wins there; here the first group that matches.
    names = sorted((name for name in numbers if name != "global"), key=lambda name: -name.count("."))
    groups = [{"match": rf"(^|\.){re.escape(name)}\.", "lr": numbers[name]} for name in names]
    if groups:
        note = "names are Transformers' parameter names; cosmos-rl's own classes may call them otherwise"
        draft.put("policy.optimizer.groups", groups, key, note=note)
    return numbers["global"]


def _warmup(draft: Draft) -> None:
    value, key = draft.get("train.optm_warmup_steps"), "train.optm_warmup_steps"
    if isinstance(value, float) and 0 < value < 1:
        draft.put("policy.optimizer.warmup_ratio", value, key, note="a share of all steps")
    elif value == 1.0 and isinstance(value, float):
        draft.put(
            "policy.optimizer.warmup_ratio",
            0.999,
            key,
            note="1.0 is the whole run there; a share is below 1 here",
        )
    else:
        draft.put("policy.optimizer.warmup_steps", int(value), key)
    factor = draft.get("train.optm_warmup_start_factor")
    if factor:
        draft.drop(
            "train.optm_warmup_start_factor", f"the warm-up begins at (almost) 0, not at {factor:g} x lr"
        )


def _schedule(draft: Draft, base: float) -> None:
    kind, ratio = draft.get("train.optm_decay_type"), draft.get("train.optm_decay_ratio")
    kind = None if kind in ("none", "None", "") else kind
    at, keys = "policy.optimizer.schedule", ("train.optm_decay_type",)
    if kind not in (None, "linear", "cosine", "sqrt"):
        return draft.bad(keys[0], f'is "{kind}"; allowed: cosine, linear, sqrt, none')
    if kind is None or ratio == 0:
        draft.put(at, "constant", *keys)
        draft.drop("train.optm_decay_ratio", "nothing decays in this file")
        return draft.drop("train.optm_min_lr_factor", "nothing decays in this file")
    note = "sqrt decay is not here; linear is the nearest" if kind == "sqrt" else ""
    if ratio is None or ratio >= 1:
        draft.put(at, "cosine" if kind == "cosine" else "linear", *keys, note=note)
        draft.same("train.optm_decay_ratio", "the decay begins after the warm-up")
    else:
        note = (
            ""
            if kind == "linear"
            else f"a plateau and then a linear decay; {kind} decay only without a plateau"
        )
        draft.put(at, "wsd", *keys, "train.optm_decay_ratio", note=note)
        _decay_steps(draft, ratio)
    factor = draft.get("train.optm_min_lr_factor")
    draft.put(
        "policy.optimizer.min_lr", factor * base, "train.optm_min_lr_factor", note="a rate, not a factor"
    )


def _decay_steps(draft: Draft, ratio: float) -> None:
    steps, key = draft.get("train.max_num_steps"), "train.optm_decay_ratio"
    if ratio < 0:
        draft.bad(key, f"is {ratio:g}; must be between 0 and 1")
    elif steps is not None:
        draft.put("policy.optimizer.decay_steps", max(1, round(steps * ratio)), key)
    elif ratio != 0.1:
        note = f"the decay takes the last tenth; for {ratio:g} of all steps set policy.optimizer.decay_steps"
        draft.put("policy.optimizer.schedule", "wsd", key, note=note)
