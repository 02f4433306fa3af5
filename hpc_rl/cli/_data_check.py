"""The data of a recipe before the queue: rows, roles, templates and media files, as the run reads them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rl.catalog.facts import ModelFilesError, read_json
from hpc_rl.catalog.families import family_of
from hpc_rl.catalog.local_models import find_model, find_snapshot, hub_cache, is_local
from hpc_rl.cli._episode_check import check_template
from hpc_rl.cluster.findings import Finding, place
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.plugins import plugin_source
from hpc_rl.recipe.schema import DatasetSpec, Recipe

if TYPE_CHECKING:
    from hpc_rl.data.chat import Conversation
    from hpc_rl.data.rows import Rows

ROWS_CHECKED = 100
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def data_findings(loaded: LoadedRecipe, site: Site, *, light: bool = False) -> list[Finding]:
    """The data sets are here, and the first rows have the columns that the recipe names.

    `light`: of a data set that only the Hub's library can open, see no more than that it is in the cache.
    """
    data = loaded.recipe.data
    only = loaded.recipe.eval.only and not loaded.recipe.supervised  # then the training's rows are not read
    findings = [] if only else _rows(loaded, site, data.train, "train", light)
    if data.eval is not None:
        findings += _rows(loaded, site, data.eval, "eval", light)
    return findings


def _rows(loaded: LoadedRecipe, site: Site, spec: DatasetSpec, which: str, light: bool) -> list[Finding]:
    from hpc_rl.data.errors import DataError
    from hpc_rl.data.rows import find_path, load_rows

    where, sft = place(loaded, "data", which), loaded.recipe.supervised
    try:
        path = find_path(spec.path, None)
        if (
            light
            and plugin_source(spec.path) is None
            and (path is None or (path / "dataset_info.json").exists())
        ):
            return _cached(loaded, site, spec, where) if path is None else [Finding("ok", where, str(path))]
        with _as_in_the_job(site):
            rows = load_rows(spec)
            _check_rows(loaded, site, spec, rows, sft=sft, light=light)
            trained = len(rows)
            if which == "train" and sft and loaded.recipe.data.holdout and loaded.recipe.data.eval is None:
                trained = len(rows.split(loaded.recipe.data.holdout, loaded.recipe.seed)[0])
    except DataError as error:
        return [Finding("error", where, str(error))]
    total = steps_of(loaded.recipe, trained) if which == "train" else None
    steps = f": {loaded.recipe.policy.epochs} epochs of {trained} are {total} steps" if total else ""
    found = [Finding("ok", where, f"{len(rows)} rows of {rows.name}{steps}")]
    found += _beyond_the_end(loaded, total) if total else []
    if which == "train" and len(rows) < (wanted := rows_per_step(loaded.recipe)):
        message = f"{len(rows)} rows, and one step takes {wanted}: a step has the same rows more than once"
        fix = "raise data.train.limit" if spec.limit is not None else "give more rows"
        found.append(Finding("warning", where, message, f"{fix}, or lower policy.batch_size"))
    return found


def steps_of(recipe: Recipe, rows: int) -> int | None:
    """How many steps the epochs of a recipe without rollouts are; None where steps or tokens are given."""
    policy = recipe.policy
    if not recipe.supervised or policy.epochs is None or policy.batch_tokens is not None:
        return None
    return math.ceil(policy.epochs * rows / policy.batch_size)


def _beyond_the_end(loaded: LoadedRecipe, total: int) -> list[Finding]:
    """What the recipe counts in steps and begins, or ends, after the last one. With `policy.steps` these are
    the recipe's own mistakes; with epochs the rows must be known."""
    policy = loaded.recipe.policy
    optimizer, profile = policy.optimizer, policy.profile
    last = f"the run has {total} steps ({policy.epochs} epochs)"
    found = []
    if optimizer.warmup_ratio is None and optimizer.warmup_steps >= total:
        where = place(loaded, "policy", "optimizer", "warmup_steps")
        message = f"is {optimizer.warmup_steps}, and {last}: the rate never gets to lr"
        found.append(Finding("warning", where, message, "give fewer, or warmup_ratio"))
    elif optimizer.decay_steps is not None and optimizer.warmup_steps + optimizer.decay_steps > total:
        where = place(loaded, "policy", "optimizer", "decay_steps")
        message = f"is {optimizer.decay_steps} after {optimizer.warmup_steps} of warm-up, and {last}"
        found.append(Finding("warning", where, message, "give fewer"))
    if profile is not None and profile.start > total:
        where = place(loaded, "policy", "profile", "start")
        message = f"is {profile.start}, and {last}: nothing will be profiled"
        found.append(Finding("warning", where, message, "begin earlier"))
    return found


def _check_rows(
    loaded: LoadedRecipe, site: Site, spec: DatasetSpec, rows: Rows, *, sft: bool, light: bool
) -> None:
    """The first rows as training will read them: columns, roles, the chat template, files of media.

    `light` leaves the template out. Raises DataError.
    """
    from hpc_rl.data.errors import DataError
    from hpc_rl.data.media import MediaFiles
    from hpc_rl.data.preference import check_pairs
    from hpc_rl.data.prompts import check_rows
    from hpc_rl.data.rows import find_path
    from hpc_rl.data.templates import ChatTemplate
    from hpc_rl.rewards.base import row_checker

    model = loaded.recipe.model
    folder = find_model(model.path, model.revision, site.paths.hf_home)
    words = _tokenizer_folder(model.tokenizer, site) if model.tokenizer else folder
    if loaded.recipe.simulator is not None and words is not None and not light:
        check_template(loaded.recipe, words)
    # A model that is missing has its own finding; without its template less can be said of the rows.
    template = ChatTemplate.read(words) if sft and not light and words is not None else None
    if template is None and sft and not light and words is not None and needs_template(spec):
        raise DataError(
            f"chat messages (format {spec.format}, `system` or `chat: true`) need a chat template, and "
            f"{words} has none; set model.tokenizer to a folder or name that has one"
        )
    path = find_path(spec.path, None)
    files = MediaFiles(spec, path if path is None or path.is_dir() else path.parent)
    looks = folder is not None and any((folder / name).is_file() for name in PROCESSORS)
    padded = _padded_family(folder) if looks and folder is not None else None
    if looks and spec.format == "cosmos_reason1":
        files.prepare(unpack=False)

    def seen(conversation: Conversation, where: str) -> None:
        if template is None and spec.format == "preference" and words is not None and not light:
            raise DataError(
                f"{where} has chat messages, and {words} has no chat template; set model.tokenizer"
            )
        if not conversation.has_media:
            return
        if not looks and folder is not None:
            raise DataError(f"{where} has images or videos, and {folder} has no processor for them")
        if loaded.recipe.policy.batch_tokens is not None and padded is not None:
            raise DataError(
                f"{where} has images, and policy.batch_tokens packs rows with images, which {padded} cannot: "
                "use policy.batch_size with policy.micro_batch_size"
            )
        if not sft:
            _check_vision_prompt(loaded, folder, None if light else words, conversation, where)
        files.check(conversation, where)

    if spec.format == "preference":
        check_pairs(rows, spec, max_rows=ROWS_CHECKED, template=template, seen=seen)
        return
    lacking = None if sft else row_checker(loaded.recipe.reward)
    check_rows(rows, spec, sft=sft, max_rows=ROWS_CHECKED, template=template, seen=seen, lacking=lacking)


def _check_vision_prompt(
    loaded: LoadedRecipe, folder: Path | None, words: Path | None, conversation: Conversation, where: str
) -> None:
    """Raises DataError where a prompt with images or videos cannot be generated from. `words` has the chat
    template (None: it is not looked at)."""
    from hpc_rl.data.errors import DataError
    from hpc_rl.data.templates import ChatTemplate

    recipe = loaded.recipe
    for key, what in (("simulator", "an episode of several turns"), ("teacher", "a teacher's text")):
        if getattr(recipe, key) is not None:
            raise DataError(f"{where} has images or videos, and {what} ({key}) takes none")
    padded = _padded_family(folder) if folder is not None else None
    if padded is not None and recipe.rollout is not None and recipe.rollout.engine == "hf":
        raise DataError(f"{where} has images, and rollout.engine hf does not generate from those of {padded}")
    if words is None:
        return
    template = ChatTemplate.read(words)
    if template is None:
        raise DataError(f"{where} has images or videos, and {words} has no chat template to place them")
    try:
        template.render(template.prepared(conversation.messages), generate=True)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _padded_family(folder: Path) -> str | None:
    """The name of the model's family, if the catalog says that its rows with images must be padded."""
    try:
        family = family_of(str(read_json(folder / "config.json").get("model_type")))
    except ModelFilesError:
        return None  # the model's own finding says so
    return family.name if family is not None and not family.packed else None


def _tokenizer_folder(name: str, site: Site) -> Path | None:
    if not is_local(name):
        return find_snapshot(name, None, site.paths.hf_home)
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def needs_template(spec: DatasetSpec) -> bool:
    return spec.format in ("chat", "llava", "cosmos_reason1") or bool(spec.chat) or spec.system is not None


def _cached(loaded: LoadedRecipe, site: Site, spec: DatasetSpec, where: str) -> list[Finding]:
    """A data set of the Hub: downloaded, or prepared by its library in an earlier run."""
    prepared = hub_cache(site.paths.hf_home).parent / "datasets"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", prepared))
    owner = spec.path.partition("/")[0]
    snapshot = find_snapshot(spec.path, spec.revision, site.paths.hf_home, kind="datasets")
    if snapshot is not None or any(prepared.glob(f"{owner}*")):
        return [Finding("ok", where, f"{spec.path} is cached")]
    message = f"{spec.path} is neither a path nor in the Hub cache, and jobs run offline"
    return [Finding("error", where, message, f"run 'hpc-rl fetch {loaded.path}' where there is internet")]


def rows_per_step(recipe: Recipe) -> int:
    """Rows of the training data in one optimizer step: each makes a sequence, or (rl) a prompt group."""
    per_row = recipe.algorithm.get("group_size", 1) if recipe.kind == "rl" else 1
    return max(1, recipe.policy.batch_size // per_row)


@contextmanager
def _as_in_the_job(site: Site) -> Iterator[None]:
    """Look where the job will look: in the site's cache, offline. (The Hub's libraries read these names
    when they are first imported, which happens inside.)"""
    names = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if site.paths.hf_home is not None:
        names["HF_HOME"] = site.paths.hf_home
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
