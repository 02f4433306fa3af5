"""Uploads from the controller's side: what is due, one process at a time, and how long the end waits.

The process (`hpc_rl.checkpoint.upload`) does all the talking to the network. A checkpoint that is being
uploaded, or is next, is kept from retention; of those that wait longer only the newest stays in line, so
that a store that is away cannot fill the disk. What is not stored when the job ends is left to
`hpc-rl upload RUN`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable

from hpc_rl.checkpoint.upload_items import items_of
from hpc_rl.recipe.schema import Checkpoint
from hpc_rl.run.paths import RunDir
from hpc_rl.run.process import describe_exit, die_with_parent, exit_code

LOG = logging.getLogger("hpc_rl.controller")
# Both bounds are further limited by the walltime: its warning ends the waiting.
END_LIMIT_S = 3600.0
MODULE = "hpc_rl.checkpoint.upload"
_NOT_INHERITED = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


class Uploads:
    """`tell(kind, **fields)` is for events.jsonl. Nothing here waits, and nothing raises."""

    def __init__(self, run: RunDir, options: Checkpoint, attempt: int, tell: Callable[..., None]) -> None:
        self.run, self.attempt, self._tell = run, attempt, tell
        s3, hub = options.upload_s3, options.upload_hub
        self.everything = s3 is not None and s3.what == "all"
        self.enabled = s3 is not None or hub is not None
        self._line: list[str] = []  # waiting, oldest first
        self._current: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: float | None = None  # since when the end of the job waits
        self._given_up = False

    @property
    def steps(self) -> set[int]:
        """Checkpoints that must stay for now."""
        names = [item.rpartition("/")[2] for item in (*self._current, *self._line)]
        return {int(name.removeprefix("step_")) for name in names if name.startswith("step_")}

    def written(self, item: str) -> None:
        """A folder of the run is complete: a checkpoint, or an export."""
        if not self.everything or item in self._line:
            return
        kind = item.partition("/")[0]
        waiting = [other for other in self._line if other.startswith(f"{kind}/")]
        for other in waiting:
            self._line.remove(other)
            LOG.warning("%s is not uploaded: %s is newer, and the upload before still runs", other, item)
            self._tell("upload_failed", target="", item=other, error=f"superseded by {item} before its turn")
        self._line.append(item)
        self.poll()

    def finish(self) -> None:
        """The run is done: what the recipe wants stored is due, whatever has been stored before."""
        if self.enabled and self._ending is None:
            self._ending = time.monotonic()
            self._line = items_of(self.run, "all" if self.everything else "final")
            LOG.info("uploading %s", ", ".join(self._line))
            self.poll()

    def poll(self) -> None:
        """See how the process is doing; start the next one."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            if code not in (0, 1):  # 1: it said in events.jsonl what failed
                words = describe_exit(exit_code(code))
                LOG.error("the upload of %s ended with %s; see upload.log", ", ".join(self._current), words)
                for item in self._current:
                    self._tell("upload_failed", target="", item=item, error=f"its process ended: {words}")
            elif code == 1:
                LOG.error("an upload FAILED (see upload.log); the run goes on. By hand: %s", self._by_hand())
            self._process, self._current = None, []
        if self._line and not self._given_up:
            self._current, self._line = self._line, []
            self._start()

    def settled(self) -> bool:
        """Whether the job may end: everything has been tried, or it has waited long enough."""
        self.poll()
        if self._process is None and not self._line:
            return True
        if self._ending is None or time.monotonic() - self._ending > END_LIMIT_S:
            self.give_up("the job ends" if self._ending is None else f"not done after {END_LIMIT_S:.0f} s")
        return self._given_up

    def give_up(self, reason: str) -> None:
        """End the process; what it has stored stays there, and the next upload goes on from it."""
        rest, self._given_up = [*self._current, *self._line], True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._current, self._line = None, [], []
        if rest:
            LOG.warning("not uploaded (%s): %s. By hand: %s", reason, ", ".join(rest), self._by_hand())
            for item in rest:
                self._tell("upload_failed", target="", item=item, error=reason)

    def _start(self) -> None:
        command = [sys.executable, "-m", MODULE, str(self.run.root), *self._current]
        log = self.run.attempt_logs(self.attempt) / "upload.log"
        try:
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    [*command, "--attempt", str(self.attempt)],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={k: v for k, v in os.environ.items() if k not in _NOT_INHERITED},
                    preexec_fn=die_with_parent(),
                )
        except OSError as error:
            LOG.error("an upload cannot be started: %s", error)
            for item in self._current:
                self._tell("upload_failed", target="", item=item, error=str(error))
            self._current = []

    def _by_hand(self) -> str:
        return f"hpc-rl upload {self.run.root}"
