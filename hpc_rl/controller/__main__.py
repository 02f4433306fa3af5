"""`python -m hpc_rl.controller RUN_DIR --attempt N`: one attempt of a run, started by the supervisor."""

from __future__ import annotations

import sys

from hpc_rl.controller.base import Controller
from hpc_rl.controller.eval_only import RlEvaluation, SftEvaluation
from hpc_rl.controller.rl import RlController
from hpc_rl.controller.sft import SftController
from hpc_rl.roles import RoleProcess, main


def body(role: RoleProcess) -> int:
    """The exit code of the attempt."""
    kinds: dict[str, type[Controller]] = {
        "rl": RlController,
        "sft": SftController,
        "preference": SftController,
    }
    if role.recipe.eval.only:
        kinds = {kind: RlEvaluation if kind == "rl" else SftEvaluation for kind in kinds}
    controller = kinds[role.recipe.kind](role)
    try:
        code = controller.run()
    except BaseException:
        conclude(controller, wandb_s=2.0)  # SIGTERM and failures leave little time
        raise
    conclude(controller, wandb_s=30.0)
    return code


def conclude(controller: Controller, wandb_s: float) -> None:
    """End W&B. The supervisor writes `report.html`, when it knows how the attempt ended."""
    if controller.recorder is not None:
        controller.recorder.close(wandb_s)


if __name__ == "__main__":
    sys.exit(main("controller", body))
