"""The policy of the trivial run."""

import sys

from trivial_role import body

from hpc_rl.roles import main

sys.exit(main("policy", body))
