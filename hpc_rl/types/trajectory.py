"""Prompt, trajectory and prompt group: the unit of work of an RL run and what becomes of it."""

from __future__ import annotations

from typing import Any

import msgspec


class BlobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A large payload (image, latent, episode) that lives outside the bus.

    `where` names a store (`file`, `replica:3`, ...), `key` the object in it, `nbytes` its size and
    `sha` the hex SHA-256 of its bytes, checked by whoever fetches it.
    """

    where: str
    key: str
    nbytes: int
    sha: str


class VersionSpan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Generated tokens `[start, end)` were sampled with policy weights `version`."""

    version: int
    start: int
    end: int


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to sample one trajectory. `seed` is the seed of the prompt; sample i adds i."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int


class Prompt(msgspec.Struct, forbid_unknown_fields=True):
    """One row of the data set, handed out once per epoch.

    `ordinal` counts prompts over the whole run (epoch * rows + position in that epoch's order) and is
    the key of the ledger; `row` is the row's index in the data set. `content` is a string (plain
    prompt) or a list of chat messages; the replica that generates turns it into token ids, so that
    the controller needs no tokenizer. `fields` carries the row's other columns for the rewards.
    """

    ordinal: int
    epoch: int
    row: int
    content: str | list[dict[str, Any]]
    answer: str | None = None
    fields: dict[str, Any] = {}
    blobs: dict[str, BlobRef] = {}


class Trajectory(msgspec.Struct, forbid_unknown_fields=True):
    """Prompt tokens, sampled tokens, and what the sampler knew of them.

    `log_probs[t]` is the log-probability of `token_ids[t]` under softmax(logits / temperature), as
    recorded by the sampler (fp32); non-finite values are kept and dropped from the loss mask later.
    `spans` cover `[0, len(token_ids))` without gaps. `loss_mask[t]` is 0 for tokens the policy did
    not write (tool output); an empty list means all ones. `finish` is `stop`, `length` or `abort`.
    `turn_ends` are the ends (in `token_ids`, exclusive) of what the policy wrote turn by turn and
    `turn_rewards` what each turn earned by itself; both empty where there is one turn. `text` is the answer,
    of several turns the last; it is what rewards are told. `metrics` are numbers
    of this trajectory (tool calls, ...), of which the step reports the means.
    """

    ordinal: int
    sample: int
    replica: int
    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: list[float]
    spans: list[VersionSpan]
    finish: str
    text: str = ""
    loss_mask: list[int] = []
    rewards: dict[str, float] = {}
    reward: float = 0.0
    seconds: float = 0.0
    turn_ends: list[int] = []
    turn_rewards: list[float] = []
    teacher_log_probs: list[float] = []  # as `log_probs`, of the teacher; empty without one
    metrics: dict[str, float] = {}
    blobs: dict[str, BlobRef] = {}

    @property
    def oldest_version(self) -> int:
        """The version of the oldest weights that made a token (0 for an empty answer)."""
        if len(self.spans) == 1:
            return self.spans[0].version
        return min((span.version for span in self.spans), default=0)


class PromptGroup(msgspec.Struct, forbid_unknown_fields=True):
    """The G trajectories of one prompt (GRPO's group)."""

    prompt: Prompt
    trajectories: list[Trajectory]


class TrainSample(msgspec.Struct, forbid_unknown_fields=True):
    """One sequence for the learner: `token_ids` is prompt + answer, all lists have its length (for SFT,
    `log_probs` and `advantages` are empty). `media` are tensors by the names of the model's forward; it
    does not travel.

    `loss_mask[t]` is 1 where token t is trained on (never the first token); `log_probs[t]` is the
    sampler's log-prob of token t (0.0 where the mask is 0); `advantages[t]` and `teacher_log_probs[t]`
    (empty without a teacher) likewise per token. `spans` say which version made the tokens that were
    generated, as positions in `token_ids`. `row` is the row of the data that the prompt is from, where the
    learner needs its media (else -1). A preference pair is one sample, so that nothing can part it: its
    chosen sequence goes up to `split`, the rejected one follows (0: a single sequence).
    """

    ordinal: int
    sample: int
    token_ids: list[int]
    loss_mask: list[int]
    log_probs: list[float]
    advantages: list[float]
    version: int = 0
    spans: list[VersionSpan] = []
    row: int = -1
    teacher_log_probs: list[float] = []
    split: int = 0
    media: dict[str, Any] | None = None

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where its sequences begin and end in `token_ids`: one, or the two of a pair."""
        ends = [self.split, len(self.token_ids)] if self.split else [len(self.token_ids)]
        return list(zip([0, *ends], ends, strict=False))
