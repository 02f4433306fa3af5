"""The controller's part of an RL checkpoint: `controller/state.json` and `controller/buffer.msgpack`.

With it, and the order of prompts being a function of the seed, nothing is lost or repeated: prompts of
trained steps are behind the cursor, answers that were not trained yet come back from the buffer, and
what was in flight is handed out again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import msgspec

from hpc_rl.controller.evaluation import Evaluator
from hpc_rl.controller.members import AttemptFailed
from hpc_rl.controller.prompts import PromptSource
from hpc_rl.controller.recorder import Recorder
from hpc_rl.controller.window import PromptWindow
from hpc_rl.types import PromptGroup

LOG = logging.getLogger("hpc_rl.controller")


def write_state(
    folder: Path,
    step: int,
    window: PromptWindow,
    source: PromptSource,
    evaluator: Evaluator,
    recorder: Recorder,
) -> None:
    """Cursor, answers not trained yet, evaluations done, held metrics, and what data they belong to."""
    first = step * window.prompts_per_step
    groups = [group for ordinal, group in sorted(window.done.items()) if ordinal >= first]
    (folder / "buffer.msgpack").write_bytes(msgspec.msgpack.encode(groups))
    state = {
        "step": step,
        "prompts_per_step": window.prompts_per_step,
        "fingerprint": source.fingerprint,
        "dropped": {str(ordinal): reason for ordinal, reason in window.dropped.items()},
        "in_flight": sorted(window.in_flight),
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
    groups = msgspec.msgpack.decode((folder / "buffer.msgpack").read_bytes(), type=list[PromptGroup])
    window.restore(step, groups, {int(ordinal): why for ordinal, why in state["dropped"].items()})
    evaluator.done_steps = set(state["evaluated"])
    recorder.restore({int(s): row for s, row in state["held_rows"].items()})
    again = len(state["in_flight"])
    LOG.info("restored step %d: %d answers kept, %d prompts handed out again", step, len(groups), again)
