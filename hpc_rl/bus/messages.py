"""The typed messages of the bus: who says what to whom.

Each message is a tagged `msgspec.Struct`; a stream carries msgpack of the union `Message`. Streams
are named by `inbox(role, index)`: every process reads its own inbox only, in order, and everyone
writes to `inbox("controller")`. Policy rank r reads `inbox("policy", r)`; since the controller is the
only writer and writes the same sequence of commands to each rank, all ranks run the same commands
in the same order. What the groups `reward` and `teacher` answer a replica is on a stream of its own
(`answers`): the replica reads its inbox no further while it has all the prompts that it may have.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_rl.types import EngineLoad, Prompt, PromptGroup, Sampling, TrainSample


def inbox(role: str, index: int = 0) -> str:
    """The stream that process `index` of `role` reads."""
    return f"inbox:{role}:{index}"


def answers(replica: int, incarnation: int) -> str:
    """The stream on which a rollout replica is told who serves, and gets what it asked them for."""
    return f"answers:{replica}:{incarnation}"


class _Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    pass


# --- any role -> controller ------------------------------------------------------------------------
class Register(_Message):
    """A role process is alive and reads its inbox. `incarnation` counts starts of this index."""

    role: str
    index: int
    incarnation: int
    pid: int
    node: str
    host: str
    info: dict[str, str] = {}


class RoleFailed(_Message):
    """A role process is about to exit because of `cause` (one line); `detail` is the traceback."""

    role: str
    index: int
    incarnation: int
    time: float
    phase: str
    cause: str
    detail: str = ""
    exit_code: int = 1


class RoleStopped(_Message):
    """A role process obeyed `Stop` and exits with code 0."""

    role: str
    index: int


# --- supervisor <-> controller ---------------------------------------------------------------------
class StartRole(_Message):
    """Start the step of `role`; `index` names the replica, and is 0 for the policy."""

    role: str
    index: int
    incarnation: int


class StopRole(_Message):
    """End the step of `role`/`index`: SIGTERM to its tasks, SIGKILL after `grace_s` seconds.

    `lost`: it is given up, and may have died before; what ended it is then still worth a word.
    """

    role: str
    index: int
    grace_s: float
    reason: str
    lost: bool = False


class StepStarted(_Message):
    role: str
    index: int
    incarnation: int
    time: float


class StepExited(_Message):
    """A job step (or local child) ended. `code` is the exit code; 128+n stands for signal n."""

    role: str
    index: int
    incarnation: int
    code: int
    time: float


class Interrupt(_Message):
    """`walltime` (USR2: save, exit 75), `term` (flush and leave) or `save_and_stop` (cancel --save)."""

    kind: str
    deadline: float


# --- controller -> policy --------------------------------------------------------------------------
class MicroBatch(msgspec.Struct, forbid_unknown_fields=True):
    """Sequences that one rank packs into one forward."""

    samples: list[TrainSample]


class MiniBatch(msgspec.Struct, forbid_unknown_fields=True):
    """The micro-batches `[start, end)` of a step: one optimizer update, with its own loss denominator (0: on
    no rank is there anything to train on)."""

    start: int
    end: int
    denominator: float


class TrainStep(_Message):
    """Run step `step` (1-based) on this rank's micro-batches: one optimizer update, or one for each of
    `mini_batches`.

    All ranks get the same number of micro-batches (an empty one still takes part in collectives).
    `denominator` is the loss denominator over all ranks and micro-batches, counted after all masks
    (tokens for token-mean); 0 in RL: nothing can be trained on, the step counts and changes nothing.
    For SFT `micro_batches` is empty and the policy draws its own data.
    """

    step: int
    micro_batches: list[MicroBatch] = []
    denominator: float = 0.0
    mini_batches: list[MiniBatch] = []


class PushWeights(_Message):
    """Send the current weights as `version` to `replicas`, joining any that are new."""

    version: int
    replicas: list[int]
    incarnations: list[int]


class SaveCheckpoint(_Message):
    """Stage model and optimizer now (the state after `step`), write in the background."""

    step: int
    sync: bool = False


class ExportModel(_Message):
    """Write safetensors of the current weights to `safetensors/<label>` in the background."""

    step: int
    label: str


class EvalLoss(_Message):
    """Measure the loss on the validation data with the weights after `step` (0: before the first)."""

    step: int


class Stop(_Message):
    """Finish background writes, leave the process groups, exit 0."""

    reason: str


# --- policy -> controller (rank 0 unless said) -----------------------------------------------------
class PolicyReady(_Message):
    """Every rank: model loaded; `step` steps were done before (restored from a checkpoint)."""

    rank: int
    step: int
    info: dict[str, str] = {}


class StepDone(_Message):
    step: int
    seconds: float
    metrics: dict[str, float]


class EvalDone(_Message):
    """The answer to `EvalLoss`: `eval/loss` and the like."""

    step: int
    seconds: float
    metrics: dict[str, float]


class WeightsPushed(_Message):
    """The push of `version` ended; `failed` maps a replica to why it did not get it."""

    version: int
    seconds: float
    nbytes: int
    failed: dict[str, str] = {}


class CheckpointStaged(_Message):
    """The state of `step` is copied; training may go on. `seconds` is the stall."""

    step: int
    seconds: float


class CheckpointSaved(_Message):
    """The policy part of the checkpoint is on disk and synced (COMPLETE is not written yet)."""

    step: int
    seconds: float
    error: str = ""


class ModelExported(_Message):
    step: int
    label: str
    path: str
    seconds: float
    error: str = ""


# --- controller -> rollout -------------------------------------------------------------------------
class Generate(_Message):
    """Sample `group_size` trajectories of `prompt`, score them, answer with `GroupDone`."""

    prompt: Prompt
    group_size: int
    sampling: Sampling
    purpose: str = "train"  # train | eval
    tag: str = ""  # of this hand-out, given back


class CancelGroups(_Message):
    """Stop generating for these hand-outs (`Generate.tag`). They are answered with `GroupFailed`."""

    tags: list[str]


class ReceiveWeights(_Message):
    """Take part in the push of `version` at the next token boundary, then resume."""

    version: int


# --- rollout -> controller -------------------------------------------------------------------------
class ReplicaReady(_Message):
    """The engine is loaded; it may be handed prompts once it has got weights (or has `version`)."""

    replica: int
    incarnation: int
    version: int
    info: dict[str, str] = {}


class GroupDone(_Message):
    replica: int
    incarnation: int
    purpose: str
    tag: str
    group: PromptGroup
    metrics: dict[str, float] = {}
    load: EngineLoad | None = None  # of the engine, now


class GroupFailed(_Message):
    """This prompt could not be generated or scored (bad row, scorer crash); the replica goes on."""

    replica: int
    incarnation: int
    purpose: str
    tag: str
    ordinal: int
    cause: str


class WeightsApplied(_Message):
    """The acknowledgement that bumps the replica's version. `metrics` has phase times and the probe."""

    replica: int
    incarnation: int
    version: int
    tensors: int
    metrics: dict[str, float] = {}


class WeightsFailed(_Message):
    replica: int
    incarnation: int
    version: int
    cause: str


# --- the groups that serve models: reward and teacher ----------------------------------------------
class ScoringReady(_Message):
    """reward or teacher -> controller: the models are loaded, requests are answered."""

    role: str
    index: int
    incarnation: int
    info: dict[str, str] = {}


class ScoringMembers(_Message):
    """controller -> a replica's `answers`: which processes of `role` serve now, as (index, incarnation).
    What was asked of any other is lost."""

    role: str
    live: list[tuple[int, int]] = []


class ScoreAnswer(_Message):
    """rollout -> reward: an answer for every reward that the group serves. `conversation` are the messages of
    the prompt, which `prompt` has the text of (that of the last user message); `reply_to` is a stream."""

    number: int
    reply_to: str
    conversation: list[dict[str, Any]]
    prompt: str
    response: str
    answer: str | None = None
    fields: dict[str, Any] = {}


class ScoreTokens(_Message):
    """rollout -> teacher: the log-probs of `token_ids` after `prompt_ids` at `temperature`."""

    number: int
    reply_to: str
    prompt_ids: list[int]
    token_ids: list[int]
    temperature: float = 1.0


class ScoringBegan(_Message):
    """reward or teacher -> rollout: these requests are being computed from now on."""

    numbers: list[int]


class AnswerScored(_Message):
    """The answer to `ScoreAnswer`, by reward key; `errors` of those that have no score for it."""

    number: int
    scores: dict[str, float] = {}
    errors: dict[str, str] = {}


class TokensScored(_Message):
    """The answer to `ScoreTokens`: as many log-probs as tokens, or why there are none."""

    number: int
    log_probs: list[float] = []
    error: str = ""


Message = (
    Register
    | RoleFailed
    | RoleStopped
    | StartRole
    | StopRole
    | StepStarted
    | StepExited
    | Interrupt
    | TrainStep
    | PushWeights
    | SaveCheckpoint
    | ExportModel
    | EvalLoss
    | Stop
    | PolicyReady
    | StepDone
    | EvalDone
    | WeightsPushed
    | CheckpointStaged
    | CheckpointSaved
    | ModelExported
    | Generate
    | CancelGroups
    | ReceiveWeights
    | ReplicaReady
    | GroupDone
    | GroupFailed
    | WeightsApplied
    | WeightsFailed
    | ScoringReady
    | ScoringMembers
    | ScoreAnswer
    | ScoreTokens
    | ScoringBegan
    | AnswerScored
    | TokensScored
)
