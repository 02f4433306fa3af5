"""What the server needs of whatever it serves, and how the models are loaded."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from hpc_rl.bus import messages as m
from hpc_rl.models.hf.folder import model_folder
from hpc_rl.roles import RoleProcess

LOG = logging.getLogger("hpc_rl.scoring")
LOAD_LIMIT_S = 1800.0
FAILURES = 5
T = TypeVar("T")


class ScoringError(ValueError):
    """This request cannot be answered (too long, no column of that name); the server goes on."""


class ServedError(ValueError):
    """The model cannot be served as the recipe says; the message says what to change."""


@dataclass
class Job:
    """A request made ready. `length` are the tokens that it takes of a batch, `parts` what each model gets of
    it, by name; `errors` say which of them cannot answer it."""

    number: int
    reply_to: str
    length: int
    parts: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


class Work(Protocol):
    """What the processes of a group compute."""

    batch_tokens: int
    """Tokens of a batch, padding included (one that is longer alone is computed alone)."""

    def open(self, request: m.Message) -> Job:
        """Raises TypeError for a request of another kind."""
        ...

    def run(self, jobs: Sequence[Job]) -> list[m.Message]:
        """The answers, in order. Raises when nothing can be computed any more: the process ends."""
        ...


class ServedReward(Protocol):
    """A reward that the group serves: made from its config, one batch at a time."""

    batch_tokens: int

    def open(self, request: m.ScoreAnswer) -> tuple[Any, int]:
        """`(what score gets of it, its tokens)`. Raises ScoringError."""
        ...

    def score(self, parts: Sequence[Any]) -> list[float]:
        """One value per part."""
        ...


@dataclass(frozen=True)
class Failed:
    """Why one of a batch has no value."""

    words: str


class Halving:
    """Computes batches. One that fails is halved, down to what it fails for; raises when nothing works any
    more: FAILURES in a row that failed alone."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0

    def __call__(self, compute: Callable[[Sequence[Any]], list[T]], parts: Sequence[Any]) -> list[T | Failed]:
        if not parts:
            return []
        try:
            values: list[T | Failed] = list(compute(parts))
            self._failures = 0
            return values
        except Exception as error:
            if len(parts) == 1:
                self._failures += 1
                if self._failures >= FAILURES:
                    raise
                LOG.warning("%s failed for one answer: %s: %s", self._name, type(error).__name__, error)
                return [Failed(f"{type(error).__name__}: {error}")]
            LOG.warning("%s: a batch of %d failed and is halved: %s", self._name, len(parts), error)
        middle = len(parts) // 2
        return [*self(compute, parts[:middle]), *self(compute, parts[middle:])]


def begin(process: RoleProcess) -> None:
    """To be called before a model is made: a role that was given no GPU sees none, whatever the node has."""
    process.phase("load", LOAD_LIMIT_S)
    if process.plan.group(process.role).gpus_per_task == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(auto: Any, spec: Any) -> Any:
    """The model of `spec` (`path`, `revision`, `dtype`, `attn_implementation`, `trust_remote_code`) by one of
    Transformers' auto classes, ready to compute. Several visible GPUs share its layers.

    Raises ModelError or ServedError.
    """
    began = time.monotonic()
    folder = model_folder(spec.path, spec.revision)
    several = torch.cuda.device_count() > 1
    if several and importlib.util.find_spec("accelerate") is None:
        raise ServedError("gpus_per_replica above 1 needs the package accelerate: pip install accelerate")
    options: dict[str, Any] = {"device_map": "auto"} if several else {}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    try:
        model = auto.from_pretrained(
            folder, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code, **options
        )
    except (ValueError, ImportError) as error:  # a family that the class does not know, a missing package
        raise ServedError(f"{spec.path} cannot be loaded by {auto.__name__}: {error}") from error
    if not several:
        model = model.to(device())
    model.eval().requires_grad_(False)
    LOG.info("%s: %s in %.1f s", type(model).__name__, folder, time.monotonic() - began)
    return model


def load_tokenizer(spec: Any, path: str | None = None) -> Any:
    """The tokenizer of `spec`, or of `path`."""
    from transformers import AutoTokenizer

    folder = model_folder(path or spec.path, None if path else spec.revision)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)


def positions(model: Any) -> int | None:
    """How many tokens the model has positions for, if its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def text_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their text alone: images and videos of the prompt are not shown to these models."""
    return [{**message, "content": _text(message.get("content"))} for message in messages]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    return "" if content is None else str(content)
