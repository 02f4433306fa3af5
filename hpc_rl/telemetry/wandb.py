"""The W&B writer of the controller: one W&B run over all attempts, and never a reason for a run to stop.

Everything that may block or fail (import, login, init, log, finish) happens in one daemon thread fed
by a bounded queue; the controller only enqueues. The first failure is logged and ends the writer.
The W&B run id is kept in `<run>/wandb/run_id`, the link in `<run>/wandb/link` (read by `status`).
`step` is logged as an ordinary value and declared the axis of all others: W&B's own step must grow,
which the steps after a restored checkpoint do not.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Mode = Literal["online", "offline", "off"]
DEFAULT_URL = "https://api.wandb.ai"


def run_id(folder: Path) -> str:
    """The id kept in `folder/run_id`, made at the first call."""
    path = folder / "run_id"
    if path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    fresh = secrets.token_hex(4)
    path.write_text(fresh + "\n", encoding="utf-8")
    return fresh


def read_link(folder: Path) -> str | None:
    """What `status` shows: the URL of an online run, or how to sync an offline one."""
    path = folder / "link"
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def route_problem(url: str, timeout_s: float = 5.0) -> str | None:
    """Why W&B at `url` cannot be reached from here (through the proxy if one is set), or None."""
    parsed = urllib.parse.urlsplit(url)
    proxy = os.environ.get(f"{parsed.scheme.upper()}_PROXY") or os.environ.get(f"{parsed.scheme}_proxy")
    target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else parsed
    host, port = target.hostname, target.port or (443 if target.scheme == "https" else 80)
    if host is None:
        return f"{url!r} names no host"
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return f"no route to {host}:{port} ({error})"
    return None


class WandbWriter:
    """`log(row)` per step, `finish()` at the end; neither raises nor blocks longer than its deadline."""

    def __init__(
        self,
        mode: Mode,
        *,
        folder: Path,
        project: str,
        name: str,
        entity: str | None = None,
        config: Mapping[str, Any] | None = None,
        logger: logging.Logger | None = None,
        init_timeout_s: float = 60.0,
        route_timeout_s: float = 5.0,
    ) -> None:
        """`folder` is `<run>/wandb`, `name` the display name, `config` the resolved recipe."""
        self.mode: Mode = mode
        self.folder = Path(folder)
        self.link: str | None = None
        self.error: str | None = None
        self._project, self._entity, self._name, self._config = project, entity, name, dict(config or {})
        self._log = logger or logging.getLogger("hpc_rl.wandb")
        self._init_timeout_s, self._route_timeout_s = init_timeout_s, route_timeout_s
        self._rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(maxsize=1000)
        self._dropped = 0
        self._thread: threading.Thread | None = None
        if mode != "off":
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Enqueue one row of `metrics.jsonl`; a full queue (W&B hangs) drops it and says so once."""
        if self._thread is None or self.error is not None:
            return
        try:
            self._rows.put_nowait(dict(row))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._log.warning("W&B does not keep up: rows are dropped there; metrics.jsonl has them all")

    def finish(self, deadline_s: float = 30.0) -> bool:
        """Flush and close; False when W&B was not done within the deadline (the run ends anyway)."""
        if self._thread is None:
            return True
        try:
            self._rows.put(None, timeout=deadline_s)
        except queue.Full:
            pass  # the join below reports it
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._log.warning("W&B did not finish within %.0f s; sync %s later", deadline_s, self.folder)
            return False
        return self.error is None

    def _work(self) -> None:
        # The one place that swallows whatever a foreign service throws: a run must outlive W&B.
        try:
            run = self._start()
            while (row := self._rows.get()) is not None:
                run.log({key: value for key, value in row.items() if key not in ("time", "attempt")})
            run.finish()
        except Exception as error:  # noqa: BLE001
            self.error = f"{type(error).__name__}: {error}".splitlines()[0]
            self._log.warning("W&B is off for this attempt, the run goes on: %s", self.error)

    def _start(self) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = run_id(self.folder)
        import wandb  # slow (about a second), and absent from the base install

        if self.mode == "online" and (problem := self._online_problem(wandb)):
            self._log.warning("W&B goes offline by itself: %s", problem)
            self.mode = "offline"
        run = self._init(wandb, identity)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if self.mode == "online":
            self.link = run.url
        else:
            # run.dir is <folder>/wandb/offline-run-<time>-<id>/files. Each attempt has such a folder of the
            # same W&B run, and all of them have to be synced.
            self.link = f"offline: wandb sync {Path(run.dir).parent.parent}/offline-run-*-{identity}*"
        (self.folder / "link").write_text(f"{self.link}\n", encoding="utf-8")
        self._log.info("W&B: %s", self.link)
        return run

    def _online_problem(self, wandb: Any) -> str | None:
        base_url = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url or DEFAULT_URL
        if problem := route_problem(str(base_url), self._route_timeout_s):
            return problem
        if not wandb.api.api_key:
            return "no API key: set WANDB_API_KEY and name it in cluster.secrets, or run `wandb login`"
        return None

    def _init(self, wandb: Any, identity: str) -> Any:
        settings = wandb.Settings(
            init_timeout=self._init_timeout_s, console="off", silent=True, disable_code=True, save_code=False
        )
        arguments = {
            "project": self._project,
            "entity": self._entity,
            "name": self._name,
            "id": identity,
            "dir": str(self.folder),
            "config": self._config,
            "settings": settings,
        }
        if self.mode == "online":
            try:
                return wandb.init(mode="online", resume="allow", **arguments)
            except wandb.errors.Error as error:
                self._log.warning("W&B goes offline by itself: %s", str(error).splitlines()[0])
                self.mode = "offline"
        return wandb.init(mode="offline", **arguments)
