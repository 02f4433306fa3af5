"""The controller's part of an RL checkpoint: `controller/state.json` and `controller/buffer.msgpack`.

With it, and the order of prompts being a function of the seed, nothing is lost or repeated: what was trained
is behind `next_ordinal` and not in the buffer, answers that were not trained yet come back from the buffer
with their deadlines, and what was in flight is handed out again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from hpc_rl.controller.evaluation import Evaluator
from hpc_rl.controller.members import AttemptFailed
from hpc_rl.controller.prompts import PromptSource
from hpc_rl.controller.recorder import Recorder
from hpc_rl.controller.window import Answer, PromptWindow
from hpc_rl.types import PromptGroup

LOG = logging.getLogger("hpc_rl.controller")
FORMAT = 2  # of the prompts' part; 1 had no deadlines, and steps of consecutive ordinals


def write_state(
    folder: Path,
    step: int,
    window: PromptWindow,
    source: PromptSource,
    evaluator: Evaluator,
    recorder: Recorder,
) -> None:
    """Cursor, answers not trained yet, evaluations done, held metrics, and what data they belong to."""
    (folder / "buffer.msgpack").write_bytes(msgspec.msgpack.encode(window.answers()))
    state = {
        "format": FORMAT,
        "step": step,
        "prompts_per_step": window.prompts_per_step,
        "fingerprint": source.fingerprint,
        "next_ordinal": window.next_ordinal,
        "in_flight": window.again(),
        "kept": sorted(window.kept),
        "evaluated": sorted(evaluator.done_steps - {evaluator.current.step if evaluator.current else -1}),
        "held_rows": recorder.held_rows,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def read_state(
    folder: Path,
    step: int,
    window: PromptWindow,
    source: PromptSource,
    evaluator: Evaluator,
    recorder: Recorder,
) -> None:
    """Fill the empty objects. Raises AttemptFailed when data or batch changed since the checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    if state["fingerprint"] != source.fingerprint:
        raise AttemptFailed(
            f"the training data {source.spec.path} changed since the checkpoint of step {step} "
            f"(fingerprint {source.fingerprint}, was {state['fingerprint']})"
        )
    if state["prompts_per_step"] != window.prompts_per_step:
        raise AttemptFailed(
            f"prompts per step changed from {state['prompts_per_step']} to {window.prompts_per_step}: "
            "batch_size and group_size may not change on resume"
        )
    data, version = (folder / "buffer.msgpack").read_bytes(), state.get("format", 1)
    if version > FORMAT:
        raise AttemptFailed(
            f"{folder} was written by a newer hpc-rl (format {version}, this one reads up to {FORMAT}): "
            "resume with that one, or from an older checkpoint"
        )
    if version == 1:
        answers, next_ordinal, again = _consecutive(data, step, state)
    else:
        answers = msgspec.msgpack.decode(data, type=list[Answer])
        next_ordinal, again = state["next_ordinal"], state["in_flight"]
    window.restore(step, answers, next_ordinal, again)
    window.kept = set(state.get("kept", []))
    evaluator.done_steps = set(state["evaluated"])
    recorder.restore({int(s): row for s, row in state["held_rows"].items()})
    LOG.info("restored step %d: %d answers kept, %d prompts handed out again", step, len(answers), len(again))


def _consecutive(data: bytes, step: int, state: dict[str, Any]) -> tuple[list[Answer], int, list[int]]:
    """Format 1: step s trained the ordinals [(s-1)*B, s*B), which is the deadline of each."""
    size = int(state["prompts_per_step"])
    groups = msgspec.msgpack.decode(data, type=list[PromptGroup])
    answers = [Answer(g.prompt.ordinal, g.prompt.ordinal // size + 1, g) for g in groups]
    dropped = {int(ordinal): reason for ordinal, reason in state["dropped"].items()}
    answers += [Answer(o, o // size + 1, reason=reason) for o, reason in dropped.items() if o >= step * size]
    known = {answer.ordinal for answer in answers}
    next_ordinal = max([step * size - 1, *known]) + 1
    return answers, next_ordinal, [o for o in range(step * size, next_ordinal) if o not in known]
