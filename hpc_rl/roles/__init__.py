"""What every role process shares: registration, heartbeat, phases, logs, secrets, exit cause. No torch."""

from hpc_rl.roles.process import RoleProcess, RoleTerminated
from hpc_rl.roles.program import main

__all__ = ["RoleProcess", "RoleTerminated", "main"]
