"""The models beside the policy, looked at on this machine: of the reward group, and the teacher.

Like `model_check.py`: files and JSON only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_rl.catalog.facts import ModelFilesError, read_json
from hpc_rl.cluster.findings import Finding, place
from hpc_rl.cluster.model_check import check_config, check_tokenizer, check_weights, folder_of, repository
from hpc_rl.plan.groups import scoring_roles
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe

_CLASSIFIERS = ("ForSequenceClassification", "RewardModel", "ForRewardModel")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def check_scoring(loaded: LoadedRecipe, site: Site) -> list[Finding]:
    """Each model is here and whole; a classifier has its head, a teacher the policy's tokens."""
    findings: list[Finding] = []
    roles = scoring_roles(loaded.recipe)
    if "reward" in roles:
        for index, item in enumerate(loaded.recipe.reward):
            if item["name"] == "model":
                findings += _reward(loaded, site, item, index)
    if "teacher" in roles:
        findings += _teacher(loaded, site)
    return findings


def _files(
    loaded: LoadedRecipe, site: Site, path: str, revision: str | None, *key: str | int
) -> tuple[list[Finding], Path | None]:
    findings = repository(loaded, path, revision, site, *key)
    folder = folder_of(path, revision, site)
    if folder is None or any(finding.level == "error" for finding in findings):
        return findings, None
    where = place(loaded, *key)
    if not (folder / "config.json").is_file():
        error = Finding("error", where, f"{folder} has no config.json", "it must be a Transformers model")
        return [*findings, error], None
    findings += [*check_config(folder, where), *check_weights(folder, where), *check_tokenizer(folder, where)]
    whole = not any(finding.level == "error" for finding in findings)
    return findings, folder if whole else None


def _reward(loaded: LoadedRecipe, site: Site, item: dict[str, Any], index: int) -> list[Finding]:
    findings, folder = _files(loaded, site, item["path"], item["revision"], "reward", index, "path")
    if item["tokenizer"] is not None:
        findings += repository(loaded, item["tokenizer"], None, site, "reward", index, "tokenizer")
    if folder is None:
        return findings
    config = read_json(folder / "config.json")
    names = [str(name) for name in config.get("architectures") or []]
    where = place(loaded, "reward", index, "kind")
    if item["kind"] == "judge":
        if names and not any(name.endswith(_CAUSAL) for name in names):
            message = f"is judge, but {folder} holds {', '.join(names)}, which writes no text"
            findings.append(Finding("error", where, message, "take a causal model, or kind: classifier"))
        return findings
    if names and not any(name.endswith(_CLASSIFIERS) for name in names):
        message = f"is classifier, but {folder} holds {', '.join(names)}, which has no head for a score"
        findings.append(Finding("error", where, message, "take a reward model, or kind: judge"))
        return findings
    labels = len(config.get("id2label") or (0, 1))  # Transformers leaves out the two that it takes for usual
    if item["label"] is None and labels > 1:
        message = f"{folder} has {labels} outputs, and reward.{index}.label does not say which is the reward"
        findings.append(Finding("error", where, message, "set label to its number, from 0"))
    elif (item["label"] or 0) >= labels:
        message = f"is {item['label']}; {folder} has {labels} outputs, numbered from 0"
        findings.append(Finding("error", place(loaded, "reward", index, "label"), message))
    return findings


def _teacher(loaded: LoadedRecipe, site: Site) -> list[Finding]:
    teacher, model = loaded.recipe.teacher, loaded.recipe.model
    assert teacher is not None
    findings, folder = _files(loaded, site, teacher.path, teacher.revision, "teacher", "path")
    if model.tokenizer is not None:
        student = folder_of(model.tokenizer, None, site)
    else:
        student = folder_of(model.path, model.revision, site)
    if folder is None or student is None:
        return findings
    try:
        ours, theirs = _vocabulary(student), _vocabulary(folder)
    except ModelFilesError:  # said where that model is
        return findings
    if ours is None or theirs is None:
        return findings  # no tokenizer.json to read: the teacher's processes compare when they start
    different = [(number, token) for token, number in ours.items() if theirs.get(token) != number]
    if different:
        number, token = min(different)
        other = theirs.get(token)
        says = "does not have it" if other is None else f"has it as {other}"
        message = (
            f"{folder} has other tokens than the policy: {len(different)} of them differ, token {number} is "
            f"{token!r} and the teacher {says}"
        )
        fix = "distillation needs a teacher with the policy's tokenizer"
        findings.append(Finding("error", place(loaded, "teacher", "path"), message, fix))
    return findings


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """token -> number by tokenizer.json; None where that does not say."""
    if not (folder / "tokenizer.json").is_file():
        return None
    whole = read_json(folder / "tokenizer.json")
    model = whole.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):  # Unigram: [[token, score], ...]
        words = {str(word[0]): number for number, word in enumerate(words)}
    if not isinstance(words, dict):
        return None
    added = {str(token["content"]): int(token["id"]) for token in whole.get("added_tokens") or []}
    return {**words, **added}
