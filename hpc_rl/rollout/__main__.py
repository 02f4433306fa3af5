"""`python -m hpc_rl.rollout RUN_DIR --attempt N --incarnation I --replica K`: one rollout replica."""

import sys

from hpc_rl.roles import main
from hpc_rl.rollout.worker import body

# vLLM starts its processes by spawning, which imports this module again under another name.
if __name__ == "__main__":
    sys.exit(main("rollout", body))
