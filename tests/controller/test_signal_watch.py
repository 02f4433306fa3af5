"""When nothing can be learned, the log says so once."""

from __future__ import annotations

from hpc_rl.controller.signal_watch import PATIENCE, SignalWatch


def test_it_speaks_once_per_stretch_without_signal() -> None:
    watch = SignalWatch()
    silent = {"rollout/zero_variance_groups": 1.0, "rollout/reward_mean": 0.0}
    assert [watch.step(silent) for _ in range(PATIENCE - 1)] == [None] * (PATIENCE - 1)
    warning = watch.step(silent)
    assert warning is not None
    assert "mean 0.000" in warning
    assert watch.step(silent) is None
    assert watch.step({"rollout/zero_variance_groups": 0.5}) is None
    assert [watch.step(silent) is not None for _ in range(PATIENCE)] == [False] * (PATIENCE - 1) + [True]
