"""`python -m hpc_rl.policy RUN_DIR --attempt N --incarnation I [--rank R]`: one policy rank."""

from __future__ import annotations

import sys

from hpc_rl.policy.loop import body
from hpc_rl.roles import main

# Helper processes may import this module again; only the role itself may start.
if __name__ == "__main__":
    sys.exit(main("policy", body))
