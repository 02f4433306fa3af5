"""Where everything of a run lies: the layout of the run directory, and its creation.

A run directory alone is enough to resume the run; nothing outside it is needed. It is private
(mode 0700) unless the recipe shares it (`cluster.shared_run`); the folders that hold passwords stay
private even then.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

COMPLETE, BAD = "COMPLETE", "BAD"
_RUN_ID = re.compile(r"^(\d{8}-\d{6})-")
_STEP = re.compile(r"^step_(\d{8,})$")
_PRIVATE = ("bus", "control", "secrets")
_FOLDERS = ("code", "ledger", "logs", "checkpoints", "safetensors", "samples", "wandb", *_PRIVATE)


class RunError(ValueError):
    """The run directory is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory. Holds no open file and reads nothing until asked."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())

    @classmethod
    def create(
        cls, output_root: Path | str, name: str, *, run_id: str | None = None, shared: bool = False
    ) -> RunDir:
        """Make `<output_root>/<name>/<run id>/` with its folders.

        `shared` lets the group read the run (0750). Raises RunError if it cannot be written or exists.
        """
        run_id = run_id or time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        root = Path(output_root).expanduser().absolute() / name / run_id
        mode = 0o750 if shared else 0o700
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir(mode=mode)
            os.chmod(root, mode)  # mkdir's mode is cut by the umask
            for folder in _FOLDERS:
                (root / folder).mkdir()
                os.chmod(root / folder, 0o700 if folder in _PRIVATE else mode)
        except FileExistsError as error:
            raise RunError(f"the run directory {root} exists already; choose another run id") from error
        except OSError as error:
            raise RunError(
                f"cannot make the run directory {root}: {error.strerror}; "
                "set `output_root` to a folder you can write on the shared filesystem"
            ) from error
        return cls(root)

    @property
    def name(self) -> str:
        """The recipe's name (the folder above the run id)."""
        return self.root.parent.name

    def recorded_name(self) -> str:
        """The recipe's name as `plan.json` has it, also in a copy that lies elsewhere; else as `name`."""
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self.name
        name = plan.get("name") if isinstance(plan, dict) else None
        return name if isinstance(name, str) else self.name

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def made(self) -> datetime:
        """When the run was made: what templates take for today, in every role, rank and attempt."""
        named = _RUN_ID.match(self.run_id)
        if named is not None:
            return datetime.strptime(named[1], "%Y%m%d-%H%M%S")
        made = self.plan if self.plan.exists() else self.root
        return datetime.fromtimestamp(made.stat().st_mtime)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        return self.root / "resolved.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs.jsonl"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def safetensors(self) -> Path:
        return self.root / "safetensors"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def secrets(self) -> Path:
        """The 0600 file of secret values (`run.secrets` reads and writes it)."""
        return self.root / "secrets" / "secrets.json"

    @property
    def control(self) -> Path:
        """Files that the command line leaves for the controller (`control/stop.json`)."""
        return self.root / "control"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    def attempt_logs(self, attempt: int) -> Path:
        return self.logs / f"attempt_{attempt}"

    def open_logs(self, attempt: int) -> Path:
        """Make the log folder of `attempt` and point `logs/latest` at it."""
        folder = self.attempt_logs(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        link = self.logs / f".latest-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, self.logs / "latest")
        return folder

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def complete_steps(self) -> list[int]:
        """Steps whose checkpoint is complete, ascending. A folder without COMPLETE does not count, nor one
        that was found damaged (`BAD`)."""
        if not self.checkpoints.is_dir():
            return []
        steps = [
            int(match.group(1))
            for entry in self.checkpoints.iterdir()
            if (match := _STEP.match(entry.name))
            and (entry / COMPLETE).exists()
            and not (entry / BAD).exists()
        ]
        return sorted(steps)

    def latest_complete(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        steps = self.complete_steps()
        return steps[-1] if steps else None

    def bus_file(self, attempt: int) -> Path:
        """Host, port and password of the attempt's Redis; 0600, removed when the attempt ends."""
        return self.root / "bus" / f"attempt_{attempt}.json"


def write_private(path: Path, data: bytes) -> None:
    """Write `data` to `path` with mode 0600 from the first byte on, atomically and durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)


def check_private(path: Path) -> None:
    """Raise RunError unless `path` belongs to this user and nobody else can open it."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RunError(
            f"{path} must belong to you with mode 0600 (it has owner {status.st_uid}, mode "
            f"{status.st_mode & 0o777:04o}); remove it or run `chmod 600` on it"
        )
