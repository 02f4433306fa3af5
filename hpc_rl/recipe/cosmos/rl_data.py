"""RL: rows, rewards and validation of a cosmos-rl file."""

from __future__ import annotations

from typing import Any

from hpc_rl.recipe.cosmos.data import dataset
from hpc_rl.recipe.cosmos.draft import Draft

_PLACE = "train.train_policy"
_OVERLONG = f"{_PLACE}.overlong_reward"

# What cosmos-rl's own rewards are here.
REWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "direct_math": ({"name": "math"}, "1 and 0 here, 1 and -1 there: the same advantages"),
    "boxed_math": ({"name": "math", "boxed": True}, ""),
    "single_choice": ({"name": "single_choice"}, ""),
    "gsm8k": ({"name": "gsm8k"}, ""),
    "format": ({"name": "format", "style": "think_answer"}, ""),
}

# The launch scripts of cosmos-rl's own: what they do to the rows, and the rewards that they bring.
SCRIPTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "gsm8k_grpo.py": (
        {"format": "prompt_answer", "prompt": "question", "answer": "answer"},
        [{"name": "gsm8k"}],
    ),
    "cosmos_grpo.py": (
        {"format": "cosmos_reason1", "fps": 1.0, "max_pixels": 81920},
        [{"name": "single_choice"}, {"name": "format", "style": "think_answer"}],
    ),
}


def translate_rl_data(draft: Draft, script: str | None, given: bool, rewards_given: bool) -> None:
    """`given` and `rewards_given`: the command line names the rows or the rewards."""
    base = script.replace("\\", "/").rsplit("/", 1)[-1] if script is not None else ""
    base = base if not base or base.endswith(".py") else f"{base}.py"
    known = SCRIPTS.get(base)
    if known is None and script is not None:
        _own_script(draft, script, base)
    _rows(draft, known[0] if known is not None else {}, given or (known is None and script is not None))
    _rewards(
        draft, known[1] if known is not None else None, rewards_given or (known is None and bool(script))
    )
    _validation(draft)


def _own_script(draft: Draft, script: str, base: str) -> None:
    """A script of the user's own is a plugin, and its dataset and rewards are called by its name."""
    stem = base.removesuffix(".py")
    draft.put("plugins", [script if "/" in script or "\\" in script else f"./{base}"])
    draft.put("data.train.path", f"plugin:{stem}")
    draft.put("reward", [{"name": f"{stem}_rewards"}])
    draft.notes.append(
        f"{base} is not one of cosmos-rl's own: it runs as a plugin (docs/convert.md), whose dataset is "
        f"plugin:{stem} and whose reward functions together are the reward {stem}_rewards. Conversations "
        "need data.train.format=chat, prompts that are whole texts data.train.chat=false"
    )


def _rows(draft: Draft, columns: dict[str, Any], given: bool) -> None:
    place = f"{_PLACE}.dataset"
    if "path" not in draft.recipe.get("data", {}).get("train", {}):
        dataset(draft, place, "data.train")
    else:
        for name in ("name", "subset", "revision", "split", "local_dir"):
            draft.drop(f"{place}.{name}", "the script's own dataset is read")
    train = draft.recipe.setdefault("data", {}).setdefault("train", {})
    if "path" not in train and not given and not draft.problems:
        text = (
            "is empty, so a script of your own made the rows: name it with --script, or data.train.path=FILE"
        )
        draft.bad(f"{place}.name", text)
    for key, value in columns.items():
        draft.put(f"data.train.{key}", value)
    for key, to in (("prompt_column_name", "prompt"), ("response_column_name", "answer")):
        column = f"{_PLACE}.{key}"
        if value := draft.get(column):
            draft.put(f"data.train.{to}", value, column)
        else:
            draft.same(column, "empty: as the script or the recipe has it")
    shuffle = f"{_PLACE}.dataloader_shuffle"
    draft.put("data.train.shuffle", draft.get(shuffle), shuffle)


def _rewards(draft: Draft, of_script: list[dict[str, Any]] | None, given: bool) -> None:
    key = f"{_PLACE}.reward_function"
    if of_script is not None:
        draft.put("reward", [dict(item) for item in of_script])
        draft.drop(key, "the script brings its own rewards")
    elif given:
        draft.drop(key, "the rewards are named elsewhere: on the command line, or by the script")
    else:
        _named(draft, key)
    _overlong(draft)


def _named(draft: Draft, key: str) -> None:
    weights = _weights(draft.get(key))
    if weights is None:
        return draft.bad(key, "must be a name, a list of names, or a table of names and weights")
    items, notes = [], []
    for name, weight in weights.items():
        if name == "overlong":
            continue  # its section says how much
        if name not in REWARDS:
            known = ", ".join(REWARDS)
            text = f'"{name}" is none of cosmos-rl\'s rewards ({known}); name yours on the command line:'
            return draft.bad(key, f"{text} 'reward=[{{name: python, function: module:function}}]'")
        item, note = REWARDS[name]
        items.append({**item, **({"weight": weight} if weight != 1 else {})})
        notes += [f"{name}: {note}"] if note else []
    draft.put("reward", items, key, note="; ".join(notes))


def _weights(value: Any) -> dict[str, float] | None:
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value, 1.0)
    if isinstance(value, dict) and value:
        numbers = all(
            isinstance(weight, int | float) and not isinstance(weight, bool) for weight in value.values()
        )
        return dict(value) if numbers else None
    return None


def _overlong(draft: Draft) -> None:
    keys = tuple(
        f"{_OVERLONG}.{name}" for name in ("enable_overlong_penalty", "buffer_length", "penalty_factor")
    )
    if not draft.get(keys[0]):
        draft.same(keys[0])
        for key in keys[1:]:
            draft.drop(key, "enable_overlong_penalty is off")
        return
    item: dict[str, Any] = {"name": "overlong", "buffer": draft.get(keys[1])}
    if draft.get(keys[2]) != 1:
        item["penalty"] = draft.get(keys[2])
    note = "by sampled tokens; never less than minus the penalty"
    draft.put("reward", [*draft.recipe.get("reward", []), item], *keys, note=note)


def _validation(draft: Draft) -> None:
    names = ("val_before_train", "freq", "temperature", "top_p", "n_generation", "max_response_length")
    sources = ("name", "subset", "revision", "split", "local_dir")
    named = draft.get("validation.dataset.name") or draft.get("validation.dataset.local_dir")
    if not draft.get("validation.enable") or not named:
        why = "validation is off in this file (validation.enable)"
        if draft.get("validation.enable"):
            why = "validation.dataset names no rows, and RL evaluates rows of their own: data.eval"
            draft.notes.append(f"{why}; name them, as in data.eval={{path: FILE, limit: 256}}")
            draft.drop("validation.enable", why)
        for name in names:
            draft.drop(f"validation.{name}", why)
        for name in sources:
            draft.drop(f"validation.dataset.{name}", why)
        return draft.same("validation.enable")
    dataset(draft, "validation.dataset", "data.eval")
    draft.put("data.eval.path", draft.recipe["data"]["eval"]["path"], "validation.enable")
    train = draft.recipe["data"]["train"]
    for name in ("format", "prompt", "answer", "chat", "media_path", "fps", "max_pixels"):
        if name in train:
            draft.put(f"data.eval.{name}", train[name])
    draft.put("eval.every", draft.get("validation.freq"), "validation.freq")
    draft.put("eval.before", draft.get("validation.val_before_train"), "validation.val_before_train")
    _answers(draft)


def _answers(draft: Draft) -> None:
    heat, share, count = (f"validation.{name}" for name in ("temperature", "top_p", "n_generation"))
    temperature = draft.get(heat)
    draft.put("eval.temperature", temperature, heat)
    if draft.get(share) is not None and temperature > 0:
        draft.put("eval.top_p", draft.get(share), share)
    else:
        draft.drop(share, "the evaluation is greedy (validation.temperature is 0)")
    if temperature == 0 and draft.get(count) > 1:
        draft.drop(count, "the evaluation is greedy: all answers to a prompt are alike")
    else:
        draft.put("eval.samples", draft.get(count), count)
    if (limit := draft.get("validation.max_response_length")) is not None:
        draft.put("eval.max_tokens", limit, "validation.max_response_length")
    else:
        draft.same("validation.max_response_length", "that of the training")
