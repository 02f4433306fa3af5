"""Which parameters are trained: the regular expressions of `model.train` and `model.freeze`."""

from __future__ import annotations

import difflib
import logging
import re
from typing import Any

from hpc_rl.models.base import ModelError

LOG = logging.getLogger("hpc_rl.models")


def choose_trained(module: Any, train: list[str], freeze: list[str]) -> None:
    """Freeze what `freeze` matches and, where there is a `train`, all that it does not match.

    Patterns are searched in the names of parameters in memory; a tied weight has one name, its first.
    Raises ModelError for a pattern that matches nothing, with names like it, and if nothing is left.
    """
    if not train and not freeze:
        return
    named = dict(module.named_parameters())
    trained = set(_matches("model.train", train, named)) if train else set(named)
    trained -= _matches("model.freeze", freeze, named)
    if not trained:
        raise ModelError("model.train and model.freeze leave nothing to train")
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    count = sum(named[name].numel() for name in trained)
    total = sum(p.numel() for p in named.values())
    LOG.info(
        "training %d of %d tensors (%s of %s parameters)",
        len(trained),
        len(named),
        f"{count:,}",
        f"{total:,}",
    )


def _matches(key: str, patterns: list[str], named: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for index, pattern in enumerate(patterns):
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{key}[{index}] {pattern!r} is not a regular expression: {error}") from error
        hits = {name for name in named if compiled.search(name)}
        if not hits:
            raise ModelError(f"{key}[{index}] {pattern!r} matches no parameter; {near(pattern, list(named))}")
        found |= hits
    return found


def near(pattern: str, names: list[str]) -> str:
    """Names like the pattern, layer numbers aside."""
    words = re.sub(r"[\\^$.*+?()\[\]|{}]+", ".", pattern).strip(".")
    short = {re.sub(r"\.\d+\.", ".*.", name): name for name in reversed(names)}
    parts = {part for name in short for part in (name, *name.split("."), name.removesuffix(".weight"))}
    close = difflib.get_close_matches(words, sorted(parts), n=3, cutoff=0.4)
    return f"near it: {', '.join(close)}" if close else f"names look like {names[0]}"
