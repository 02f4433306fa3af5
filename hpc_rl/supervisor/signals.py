"""The supervisor's signals. Handlers only set flags; the loop acts on them.

USR2 (walltime, planned preemption) asks for a save and a requeue. TERM (scancel, requeue, preemption)
and INT end the attempt after a bounded flush and never requeue.
"""

from __future__ import annotations

import faulthandler
import signal
from types import FrameType


class Signals:
    """Flags `walltime` and `term`, set for good when the signal comes."""

    def __init__(self) -> None:
        self.walltime = False
        self.term = False

    def install(self) -> None:
        """Take the signals over, also from submitit, which ignores TERM and counts time-outs on USR2."""
        signal.signal(signal.SIGUSR2, self._on_walltime)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_term)
        faulthandler.register(signal.SIGUSR1, all_threads=True)

    def ignore(self) -> None:
        """From here on nothing may interrupt (the requeue itself sends TERM)."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def _on_walltime(self, number: int, frame: FrameType | None) -> None:
        self.walltime = True

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self.term = True
