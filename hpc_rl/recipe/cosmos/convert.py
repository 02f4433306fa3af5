"""From a cosmos-rl TOML file to a recipe that loads. Nothing is written here.

Every key of the file ends as mapped, dropped with a reason, or unknown; what comes from a default of
cosmos-rl's that differs from ours is written out and said.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_rl.recipe.cosmos import data, optimizer, policy, rl, rl_data, saving
from hpc_rl.recipe.cosmos.draft import Assumed, Draft, Entry
from hpc_rl.recipe.cosmos.keys import GONE, KEYS, OLD, in_rl
from hpc_rl.recipe.cosmos.keys_rl import RL, foreign
from hpc_rl.recipe.cosmos.toml_source import TomlSource, read_toml
from hpc_rl.recipe.cosmos.write import recipe_text, report, without_defaults
from hpc_rl.recipe.layers import apply_overrides, shown_override
from hpc_rl.recipe.load import load_recipe
from hpc_rl.recipe.messages import nearest
from hpc_rl.recipe.yaml_source import Problem, RecipeError, Source, Where

_PATHS = (
    *("model.path", "model.lora.adapter"),
    *(f"data.{which}.{name}" for which in ("train", "eval") for name in ("path", "media_path")),
)


@dataclass
class Conversion:
    """`text` is the recipe; `entries` are what became of each key of the file, `assumed` what it left out."""

    text: str
    recipe: dict[str, Any]
    entries: list[Entry]
    assumed: list[Assumed]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        return report(self.entries, self.assumed, self.notes, mapped=True)

    def of(self, fate: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.fate == fate]


def convert_file(
    path: Path,
    *,
    script: str | None = None,
    gpus: int | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
) -> Conversion:
    """Convert the file at `path`. `script` is the launch script it was used with, `gpus` what -1 means,
    `overrides` are laid over the recipe, `folder` is where the recipe will lie (paths are relative to it).

    Raises RecipeError: each mistake with file, line and key.
    """
    source = read_toml(path)
    _refuse_foreign(source)
    draft = Draft(source, RL if _is_rl(source) else KEYS)
    _take(draft, source.data, ())
    _stop(draft)
    kind = _kind(draft)
    draft.put("kind", kind, "train.train_policy.type")
    _translate(draft, script, gpus, overrides, saving.stem_of(path), kind)
    draft.finish()
    _stop(draft)
    _move_paths(draft.recipe, folder or Path.cwd())
    recipe = without_defaults(_overridden(draft.recipe, overrides))
    draft.assumed = {key: item for key, item in draft.assumed.items() if _has(recipe, item.to)}
    text = recipe_text(recipe, _header(path, draft, script, overrides))
    _must_load(text, draft, Path(os.path.abspath(folder or Path.cwd())))
    return Conversion(text, recipe, list(draft.entries.values()), list(draft.assumed.values()), draft.notes)


def _translate(
    draft: Draft, script: str | None, gpus: int | None, overrides: Sequence[str], stem: str, kind: str
) -> None:
    given = any(text.replace(" ", "").startswith(("data.train.path=", "data.train=")) for text in overrides)
    saving.translate_names(draft, stem)
    policy.translate_model(draft)
    ranks = policy.translate_parallel(draft, gpus)
    if kind == "sft":
        policy.translate_batches(draft, ranks)
        data.translate_data(draft, script, given)
        data.translate_validation(draft)
    else:
        rl.translate_rl(draft)
        rl_data.translate_rl_data(draft, script, given, rl.is_given(overrides, "reward"))
    policy.translate_length(draft)
    optimizer.translate_optimizer(draft)
    policy.translate_extras(draft)
    saving.translate_checkpoints(draft)
    saving.translate_resume(draft)
    saving.translate_logging(draft)


def _stop(draft: Draft) -> None:
    if draft.problems:
        raise RecipeError(list(dict.fromkeys(draft.problems)))


def _refuse_foreign(source: TomlSource) -> None:
    """Files that are not of cosmos-rl's main schema."""
    known = {key.partition(".")[0] for key in KEYS} | {"rollout", "distillation", "vla"}
    top = set(source.data)
    world = {"model", "trainer", "dataloader_train", "model_parallel", "job", "optimizer", "scheduler"}
    if len(top & world) >= 2 and not top & {"train", "policy"}:
        text = "is a configuration of world models (cosmos-rl --wfm-mode); they come with a later converter"
        raise RecipeError([Problem(source.origin, ", ".join(sorted(top & world)), text)])
    if not top:
        text = "is empty; a cosmos-rl configuration has the tables train, policy, logging, validation"
        raise RecipeError([Problem(source.origin, "", text)])
    if not top & (known - {"mode", "redis", "custom"}):
        text = f"is no cosmos-rl configuration: it has none of the tables {', '.join(sorted(known))}"
        raise RecipeError([Problem(source.origin, ", ".join(sorted(top))[:80], text)])


def _take(draft: Draft, section: dict[str, Any], at: tuple[str, ...]) -> None:
    """Sort every key of the file: known (its value is read), of RL's sections, or unknown."""
    for name, value in section.items():
        parts = (*at, name)
        key = ".".join(part if "." not in part else repr(part) for part in parts)
        if key in OLD:
            _renamed(draft, key, OLD[key], value)
        elif key in draft.table:
            draft.load(key, value)
        elif any(known.startswith(f"{key}.") for known in draft.table):
            if isinstance(value, dict):
                _take(draft, value, parts)
            else:
                draft.bad(key, "must be a table")
        elif key in GONE:
            draft.unknown(key, value, GONE[key])
        elif (why := (foreign if draft.table is RL else in_rl)(key)) is not None:
            for leaf, inner in _leaves(key, value):
                draft.unknown(leaf, inner, why, "dropped")
        else:
            for leaf, inner in _leaves(key, value):
                draft.unknown(leaf, inner, _guess(leaf, list(draft.table)))


def _renamed(draft: Draft, key: str, new: str, value: Any) -> None:
    """An older name: read as the new one, unless the file has that too."""
    place, _, name = new.partition(".")
    if name in (draft.source.data.get(place) or {}):
        draft.unknown(key, value, f"an older name of {new}, which the file has too")
    else:
        draft.load(new, value)
        draft.unknown(key, value, f"an older name; read as {new}")
        draft.source.lines.setdefault(tuple(new.split(".")), draft.source.lines.get(tuple(key.split(".")), 1))


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]
    return [(key, value)]


def _guess(key: str, keys: list[str]) -> str:
    """The nearest known key: in the same section, else anywhere by its last name."""
    section, _, name = key.rpartition(".")
    if section == "custom" or section.startswith("custom."):
        return "read by a script of your own; what it does belongs in data.train or in a plugin"
    here = {known[len(section) + 1 :]: known for known in keys if section and known.startswith(f"{section}.")}
    here = {short: known for short, known in here.items() if "." not in short}
    close = nearest(name, list(here))
    if close is not None:
        return f"did you mean {here[close]}?"
    elsewhere = {known.rpartition(".")[2]: known for known in reversed(keys)}
    close = nearest(name, list(elsewhere))
    return f"did you mean {elsewhere[close]}?" if close is not None else "no known key is near"


def _is_rl(source: TomlSource) -> bool:
    """Whether the file is one of RL (cosmos-rl's default where nothing says otherwise)."""
    train = source.data.get("train")
    section = train.get("train_policy") if isinstance(train, dict) else None
    return not isinstance(section, dict) or section.get("type") != "sft"


def _kind(draft: Draft) -> str:
    """Raises RecipeError for what no converter of ours will read."""
    key = "train.train_policy.type"
    said, trainer = draft.get(key), draft.get("train.train_policy.trainer_type")
    if draft.get("policy.is_diffusers"):
        text = "is true: models of diffusers come with a later converter"
        raise RecipeError([draft.source.problem(text, "policy.is_diffusers")])
    if said not in (None, "grpo", "sft"):
        raise RecipeError([draft.source.problem(f'is "{said}"; allowed: sft, grpo', key)])
    own = said or "grpo"
    if trainer != own:
        text = f"is {trainer!r}; only the trainer {own!r} is converted"
        raise RecipeError([draft.source.problem(text, "train.train_policy.trainer_type")])
    if said is None:
        draft.notes.append('train.train_policy.type is missing, and cosmos-rl\'s default is "grpo"')
    return "sft" if own == "sft" else "rl"


def _move_paths(recipe: dict[str, Any], folder: Path) -> None:
    """cosmos-rl reads relative paths from the working folder, a recipe from its own."""
    if folder.resolve() == Path.cwd().resolve():
        return
    for path in _PATHS:
        *above, name = path.split(".")
        section: Any = recipe
        for part in above:
            section = section.get(part) if isinstance(section, dict) else None
        value = section.get(name) if isinstance(section, dict) else None
        if not isinstance(value, str) or os.path.isabs(value) or value.startswith("~"):
            continue
        if value.startswith("./") or value.startswith("../") or _exists(value):
            section[name] = os.path.relpath(value, folder)
            if not section[name].startswith("."):
                section[name] = f"./{section[name]}"


def _has(recipe: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(recipe, dict) or part not in recipe:
            return False
        recipe = recipe[part]
    return True


def _exists(value: str) -> bool:
    try:
        return bool(value) and Path(value).exists()
    except (OSError, ValueError):  # a name that cannot be one of a file
        return False


def _overridden(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    source = Source(recipe, {(): Where("the converted recipe", None, Path.cwd())})
    return apply_overrides(source, list(overrides)).data


def _header(path: Path, draft: Draft, script: str | None, overrides: Sequence[str]) -> list[str]:
    with_script = f" --script {script}" if script else ""
    lines = [f"Converted from cosmos-rl: hpc-rl convert {path}{with_script}"]
    lines += [f"override: {shown_override(text)}" for text in overrides]
    return [*lines, *report(draft.entries.values(), draft.assumed.values(), draft.notes, mapped=False)]


def _must_load(text: str, draft: Draft, folder: Path) -> None:
    """Load the recipe as from `folder`; its mistakes are told with the keys of the file they came from."""
    with tempfile.TemporaryDirectory(prefix="hpc-rl-convert-") as temporary:
        file = Path(temporary) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        plugins = [str((folder / name).resolve()) for name in draft.recipe.get("plugins", [])]
        try:
            load_recipe(file, [f"plugins={json.dumps(plugins)}"] if plugins else [])
            return
        except RecipeError as error:
            problems = error.problems
    raise RecipeError([_traced(problem, draft) for problem in problems])


def _traced(problem: Problem, draft: Draft) -> Problem:
    """The problem at the key of the TOML file that made the recipe's key, where there is one."""
    wanted = problem.key
    while wanted:
        below = [path for path in draft.origins if path == wanted or path.startswith(f"{wanted}.")]
        for path in below:
            for key in draft.origins[path]:
                text = f"makes {problem.key} of the recipe wrong: {problem.message}"
                return Problem(draft.source.where(key), key, text)
        wanted = wanted.rpartition(".")[0]
    return Problem(draft.source.origin, problem.key, f"in the recipe: {problem.message}")
