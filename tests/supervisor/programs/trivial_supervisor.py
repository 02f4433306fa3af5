"""The real supervisor, with the trivial roles in place of the real ones: `-m trivial_supervisor RUN_DIR`."""

import sys

from hpc_rl.supervisor.main import supervise

MODULES = {role: f"trivial_{role}" for role in ("controller", "policy", "rollout")}

if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1], modules=MODULES))
