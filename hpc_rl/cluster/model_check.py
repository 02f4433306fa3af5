"""The model of a recipe, looked at on this machine: files whole, JSON readable, sizes that fit together.

Only headers and JSON are read, so that `check` answers at once; nothing of torch or transformers is
imported, and nothing of the model is run.
"""

from __future__ import annotations

import json
from pathlib import Path

from hpc_rl.catalog.facts import ModelFilesError, config_mistakes, read_json, safetensors_header
from hpc_rl.catalog.local_models import find_snapshot, is_local
from hpc_rl.cluster.findings import Finding, place
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pt")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
# What transformers reads beside the tokenizer; each must be JSON where it is there.
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json")


def check_model(loaded: LoadedRecipe, site: Site) -> list[Finding]:
    """Config, weights and tokenizer are on this machine, whole, at the recipe's revision."""
    model = loaded.recipe.model
    findings = repository(loaded, model.path, model.revision, site, "model", "path")
    if any(finding.level == "error" for finding in findings):
        return findings
    folder = folder_of(model.path, model.revision, site)
    assert folder is not None
    where = place(loaded, "model", "path")
    if not (folder / "config.json").is_file():
        return [Finding("error", where, f"{folder} has no config.json", "it must be a Transformers model")]
    findings += check_config(folder, where)
    findings += check_weights(folder, where)
    tokenizer = folder
    if model.tokenizer is not None:
        found = repository(loaded, model.tokenizer, None, site, "model", "tokenizer")
        findings += found
        other = folder_of(model.tokenizer, None, site)
        if other is None or any(finding.level == "error" for finding in found):
            return findings
        tokenizer, where = other, place(loaded, "model", "tokenizer")
    if not any((tokenizer / name).is_file() for name in _TOKENIZER):
        fix = "set model.tokenizer to a folder or Hub name that has one"
        findings.append(Finding("error", where, f"{tokenizer} has no tokenizer files", fix))
    return findings + check_tokenizer(tokenizer, where) + _reference(loaded, site)


def _reference(loaded: LoadedRecipe, site: Site) -> list[Finding]:
    """The files of a reference model that is another than the policy's."""
    options = loaded.recipe.policy.reference
    if options.path is None:
        return []
    findings = repository(loaded, options.path, options.revision, site, "policy", "reference", "path")
    folder = folder_of(options.path, options.revision, site)
    if folder is None or any(finding.level == "error" for finding in findings):
        return findings
    where = place(loaded, "policy", "reference", "path")
    if not (folder / "config.json").is_file():
        return [Finding("error", where, f"{folder} has no config.json", "it must be a Transformers model")]
    return findings + check_config(folder, where) + check_weights(folder, where)


def check_config(folder: Path, where: str) -> list[Finding]:
    """config.json (and generation_config.json) are JSON, and the sizes are those of a model."""
    try:
        mistakes = config_mistakes(read_json(folder / "config.json"))
        if (folder / "generation_config.json").is_file():
            read_json(folder / "generation_config.json")
    except ModelFilesError as error:
        return [Finding("error", where, str(error), "copy or fetch it again")]
    return [Finding("error", where, f"{folder}/config.json: {mistake}") for mistake in mistakes]


def check_tokenizer(folder: Path, where: str) -> list[Finding]:
    """The tokenizer's JSON files are JSON; tokenizer.json describes a model."""
    try:
        found = {name: read_json(folder / name) for name in _TOKENIZER_JSON if (folder / name).is_file()}
    except ModelFilesError as error:
        return [Finding("error", where, str(error), "copy or fetch it again")]
    whole = found.get("tokenizer.json")
    if whole is not None and not isinstance(whole.get("model"), dict):
        message = f"{folder}/tokenizer.json has no 'model': it is no tokenizer"
        return [Finding("error", where, message, "copy or fetch it again")]
    return []


def folder_of(path: str, revision: str | None, site: Site) -> Path | None:
    """The folder of a model on this machine."""
    if is_local(path):
        return Path(path).expanduser()
    return find_snapshot(path, revision, site.paths.hf_home)


def repository(
    loaded: LoadedRecipe, path: str, revision: str | None, site: Site, *key: str | int
) -> list[Finding]:
    """Whether the model that the recipe names at `key` is a folder here, or in the Hub's cache."""
    where = place(loaded, *key)
    folder = folder_of(path, revision, site)
    if is_local(path):
        if folder is not None and folder.is_dir():
            return [Finding("ok", where, str(folder))]
        what = "is a file, not a model folder" if folder is not None and folder.exists() else "does not exist"
        return [Finding("error", where, f"{path} {what}")]
    if folder is None:
        at = f" at revision {revision}" if revision else ""
        message = f"{path}{at} is neither a folder nor in the Hub cache, and jobs run offline"
        fix = f"run 'hpc-rl fetch {loaded.path}' where there is internet"
        return [Finding("error", where, message, fix)]
    return [Finding("ok", where, f"{path} is cached ({folder.name[:12]})")]


def check_weights(folder: Path, where: str) -> list[Finding]:
    """Weight files are there, and every safetensors file is as long as its header says."""
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    if not files:
        return [Finding("error", where, f"{folder} has no weights (*.safetensors)")]
    try:
        missing = _missing_shards(folder)
        for file in files:
            if file.suffix == ".safetensors":
                header = safetensors_header(file)
                ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
                with file.open("rb") as handle:
                    prefix = 8 + int.from_bytes(handle.read(8), "little")
                if file.stat().st_size < prefix + max(ends, default=0):
                    return [Finding("error", where, f"{file} is cut short", "copy or fetch it again")]
    except (ModelFilesError, KeyError, TypeError) as error:
        return [Finding("error", where, str(error), "copy or fetch it again")]
    if missing:
        message = (
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more"
            if missing[1:]
            else f"{folder} lacks {missing[0]}"
        )
        return [Finding("error", where, message, "copy or fetch it again")]
    return []


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFilesError(f"{index} is not an index of weights: {error}") from error
    return sorted(name for name in names if not (folder / name).is_file())
