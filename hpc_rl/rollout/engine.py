"""The engine protocol: what the worker loop needs from whatever generates tokens.

Every engine, shipped or foreign, passes `tests/rollout/test_engine_contract.py`: log-probs are those of
softmax(fp32 logits / temperature) after top-p renormalisation, spans say which weights made which token,
a seed reproduces, and weights change at a token boundary, whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hpc_rl.data.prompt_media import PromptMedia
from hpc_rl.recipe.extensions import registry
from hpc_rl.types import EngineLoad, Sampling, VersionSpan


class EngineError(RuntimeError):
    """The engine cannot go on: its replica must be started anew."""


class PromptError(ValueError):
    """This prompt cannot be generated from (too long, unknown token); the engine goes on."""


@dataclass(frozen=True)
class TransferSettings:
    """How a replica meets the policy. The bus file holds the password; only its path is passed on. With
    `keep`, each worker keeps a copy of the weights that arrived last in host memory."""

    bus_file: Path
    attempt: int
    replica: int
    incarnation: int
    transport: str = "gloo"
    keep: bool = False


@dataclass(frozen=True)
class AdapterShape:
    """What is known of an adapter before it arrives: the largest rank of its layers, and the last parts of
    their names (empty: any linear layer but the head)."""

    rank: int
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineSettings:
    """Everything an engine is made from. `options` is the engine's own pydantic config.

    With `adapter` pushes hold a LoRA adapter alone, which belongs to the weights of `model`; without it,
    whole weights.
    """

    model: str
    options: Any
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str = "bfloat16"
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    tp: int = 1
    pp: int = 1
    max_model_len: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    transfer: TransferSettings | None = None
    adapter: AdapterShape | None = None


@dataclass
class Sample:
    """One answer. `log_probs[t]` belongs to `token_ids[t]`; `spans` cover the tokens without gaps.

    `finish` is `stop` (end-of-sequence token or stop string, kept in `token_ids`), `length` or `abort`.
    """

    token_ids: list[int]
    log_probs: list[float]
    spans: list[VersionSpan]
    finish: str


@dataclass
class WeightReport:
    """What was received in a push: tensors, bytes, and seconds by phase."""

    version: int
    tensors: int
    nbytes: int
    seconds: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A model that generates. All methods are called from one event loop."""

    version: int
    """The policy version of the weights now in use; changes only when a whole push is verified."""
    vocab_size: int
    max_model_len: int

    async def start(self) -> None:
        """Load the model. Version is 0: the recipe's weights."""
        ...

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        count: int,
        request_id: str,
        media: PromptMedia | None = None,
    ) -> list[Sample]:
        """`count` samples; sample i uses seed `sampling.seed + i`. Many calls may be under way.

        Temperature 0 is greedy. `media` are given where a prompt has some; `prompt_ids` then begin with
        `media.token_ids`. Raises PromptError, or EngineError when the engine is lost.
        """
        ...

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of `token_ids[1:]` under the present weights at temperature 1."""
        ...

    def load(self) -> EngineLoad:
        """How full the engine is; by it the controller finds how many prompt groups to keep in flight."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request early; its samples come back with finish `abort`."""
        ...

    async def fetch_weights(self, version: int, timeout_s: float) -> None:
        """Take the push of `version` in while generation goes on, as far as the engine can: what is here at
        the pause need not be waited for then. Changes no weight. Raises WeightTransferError."""
        ...

    async def pause(self) -> None:
        """Stop at the next token boundary; requests under way are kept."""
        ...

    async def receive_weights(self, version: int, timeout_s: float) -> WeightReport:
        """While paused: take part in the push of `version`.

        Raises WeightTransferError if it fails in any way. `version` then stays as it is, and the engine
        refuses to resume unless its old weights are still whole.
        """
        ...

    async def resume(self) -> None:
        """Go on; requests under way continue with the present weights. Raises EngineError."""
        ...

    async def close(self) -> None:
        """End everything the engine started."""
        ...


def prompt_room(
    prompt_ids: Sequence[int], max_model_len: int, vocab_size: int, media: PromptMedia | None = None
) -> int:
    """How many tokens can follow the prompt. Raises PromptError: none, no prompt, or an unknown token."""
    room = max_model_len - len(prompt_ids)
    if room < 1 or not prompt_ids:
        message = f"the prompt has {len(prompt_ids)} tokens; between 1 and {max_model_len - 1} fit "
        message += "(rollout.max_model_len)"
        if media is not None:
            more = len(media.token_ids) - len(media.short_ids)
            message += f"; {more} are its images and videos: lower max_pixels, fps or max_frames of the data"
        raise PromptError(message)
    if max(prompt_ids) >= vocab_size or min(prompt_ids) < 0:
        raise PromptError(f"the prompt has a token outside the vocabulary of {vocab_size}")
    return room


def check_places(prompt_ids: Sequence[int], media: PromptMedia | None, placeholders: frozenset[int]) -> None:
    """Raises PromptError where tokens that stand for an image or video (`placeholders`) have none: the
    learner could not make of them what the engine did."""
    before = 0 if media is None else len(media.token_ids)
    found = next((token for token in prompt_ids[before:] if token in placeholders), None)
    if found is not None:
        raise PromptError(
            f"the prompt holds token {found}, the model's place for an image or video, without one: write it "
            "differently, or give the medium in the row"
        )


def make_engine(name: str, settings: EngineSettings) -> Engine:
    """An engine by its registered name. Raises UnknownExtension."""
    engine: Engine = registry("engines").load(name)(settings)
    return engine
