"""`python -m hpc_rl.controller RUN_DIR --attempt N`: one attempt of a run, started by the supervisor."""

from __future__ import annotations

import sys

from hpc_rl.controller.rl import RlController
from hpc_rl.controller.sft import SftController
from hpc_rl.roles import RoleProcess, main


def body(role: RoleProcess) -> int:
    """The exit code of the attempt."""
    controller = RlController(role) if role.recipe.kind == "rl" else SftController(role)
    return controller.run()


if __name__ == "__main__":
    sys.exit(main("controller", body))
