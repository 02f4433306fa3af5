"""The run directory: paths, attempts, events, metrics, prompt ledger, lock, secrets. No torch, no Redis."""

from hpc_rl.run.paths import RunDir

__all__ = ["RunDir"]
