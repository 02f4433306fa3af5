"""`python -m hpc_rl.supervisor RUN_DIR`: supervise a run from here on (what `local` starts)."""

from __future__ import annotations

import sys

from hpc_rl.supervisor.main import supervise

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hpc_rl.supervisor RUN_DIR")
    sys.exit(supervise(sys.argv[1]))
