"""`python -m hpc_rl.scoring.teacher RUN_DIR --attempt N --incarnation I --replica K`: serves the teacher."""

from __future__ import annotations

import sys

from hpc_rl.roles import RoleProcess, main
from hpc_rl.scoring.base import begin
from hpc_rl.scoring.server import Server
from hpc_rl.scoring.tokens import TeacherWork


def body(process: RoleProcess) -> int:
    """Load the teacher, then answer until told to stop."""
    teacher = process.recipe.teacher
    assert teacher is not None, "the plan has a teacher group only if the recipe has a teacher"
    begin(process)
    process.register(teacher=teacher.path)
    Server(process, TeacherWork(teacher, process.recipe.model), limit_s=teacher.limit_s).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main("teacher", body))
