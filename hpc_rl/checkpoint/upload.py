"""Uploads of a run, in a process of their own: `python -m hpc_rl.checkpoint.upload RUN_DIR ITEM...`.

The controller starts it beside the training, `hpc-rl upload` calls the same functions by hand. What fails
is tried again a few times, recorded in events.jsonl (`status` shows it), and never more than that: the
training does not depend on it, and a later upload goes on where this one stopped. Secrets come from the
run's 0600 file into this process's environment. No torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hpc_rl.checkpoint.hub import HubRepo
from hpc_rl.checkpoint.s3 import Location, S3Store, UploadError
from hpc_rl.checkpoint.upload_items import (
    EXPORTS,
    items_of,
    run_location,
    upload_item,
    upload_run_files,
)
from hpc_rl.recipe.schema import Checkpoint
from hpc_rl.run.events import EventLog
from hpc_rl.run.paths import RunDir, RunError
from hpc_rl.run.secrets import load_into_environ, mask
from hpc_rl.run.settings import load_run

LOG = logging.getLogger("hpc_rl.upload")
PAUSES_S = (5.0, 30.0)  # between tries of one folder; each request has its own within
FINAL = f"{EXPORTS}/final"


@dataclass(frozen=True)
class Targets:
    """Where to: an S3 location (the run's name and id are added), a Hub repository, or both."""

    s3: Location | None = None
    hub: str | None = None
    hub_private: bool = True


def targets_of(options: Checkpoint) -> Targets:
    """What the recipe says."""
    s3, hub = options.upload_s3, options.upload_hub
    return Targets(
        Location(s3.bucket, s3.prefix.strip("/")) if s3 is not None else None,
        hub.repo if hub is not None else None,
        hub.private if hub is not None else True,
    )


class Uploads:
    """Uploads `items` to every target that takes them; `events` gets an entry for each. `secrets` are
    values that no message may show."""

    def __init__(self, run: RunDir, events: EventLog, secrets: Sequence[str] = ()) -> None:
        self.run, self.events, self.secrets = run, events, secrets

    def run_all(self, targets: Targets, items: Sequence[str], pauses_s: Sequence[float] = PAUSES_S) -> bool:
        """Whether everything is stored. Never raises for what a network, a server or a token does."""
        done = True
        if targets.s3 is not None:
            done &= self._to_s3(run_location(targets.s3, self.run), items, pauses_s)
        if targets.hub is not None and FINAL in items:
            hub, private = targets.hub, targets.hub_private
            error = self._try(f"hub:{hub}", FINAL, partial(self._to_hub, hub, private), pauses_s)
            done &= error is None
        return done

    def _to_s3(self, location: Location, items: Sequence[str], pauses_s: Sequence[float]) -> bool:
        try:
            store = S3Store(location)
        except UploadError as error:
            self._failed(str(location), "", error)
            return False

        def one(item: str) -> dict[str, object]:
            upload_run_files(store, self.run)  # first: a checkpoint that is listed can be resumed
            result = upload_item(store, self.run, item, LOG.info)
            return {"nbytes": result.nbytes, "sent": result.sent}

        done = True
        for number, item in enumerate(items):
            failure = self._try(str(location), item, partial(one, item), pauses_s)
            done &= failure is None
            if (
                failure is not None and not failure.permanent
            ):  # the store is away: trying on would take as long
                for other in items[number + 1 :]:
                    self._failed(str(location), other, failure)
                break
        return done

    def _to_hub(self, name: str, private: bool) -> dict[str, object]:
        folder = self.run.root / FINAL
        if not folder.is_dir():
            raise UploadError(f"{folder} is not there: the run has no final export", permanent=True)
        message = f"{self.run.recorded_name()}, run {self.run.run_id}"
        return {"url": HubRepo(name, private).upload(folder, message)}

    def _try(
        self, target: str, item: str, action: Callable[[], dict[str, object]], pauses_s: Sequence[float]
    ) -> UploadError | None:
        """None when it is stored; else what the last try said, which is recorded."""
        began = time.monotonic()
        for pause in (*pauses_s, None):
            try:
                facts = action()
            except UploadError as error:
                if error.permanent or pause is None:
                    self._failed(target, item, error)
                    return error
                LOG.warning("%s: %s; again in %.0f s", item, mask(str(error), self.secrets), pause)
                time.sleep(pause)
            else:
                seconds = round(time.monotonic() - began, 2)
                self.events.append("uploaded", target=target, item=item, seconds=seconds, **facts)
                LOG.info("%s is at %s after %.1f s", item, facts.get("url", target), seconds)
                return None
        raise AssertionError("the last try ends the loop")

    def _failed(self, target: str, item: str, error: UploadError) -> None:
        text = mask(str(error), self.secrets)
        self.events.append("upload_failed", target=target, item=item, error=text)
        LOG.error("upload of %s to %s FAILED: %s", item or "everything", target, text)


def online() -> None:
    """Jobs run with the Hub offline; this process is the one that is not. Before the Hub's library is
    imported, which reads it then."""
    os.environ.pop("HF_HUB_OFFLINE", None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hpc_rl.checkpoint.upload")
    parser.add_argument("run_dir")
    parser.add_argument(
        "items", nargs="*", help="folders, relative to the run; default: what the recipe says"
    )
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    os.nice(10)
    online()
    run = RunDir(arguments.run_dir)
    try:
        recipe = load_run(run)
        secrets = load_into_environ(run, recipe.cluster.secrets)
    except RunError as error:
        LOG.error("%s", error)
        return 2
    options = recipe.checkpoint
    what = options.upload_s3.what if options.upload_s3 is not None else "final"
    items = arguments.items or items_of(run, what)
    uploads = Uploads(run, EventLog(run, arguments.attempt), secrets)
    return 0 if uploads.run_all(targets_of(options), items) else 1


if __name__ == "__main__":
    sys.exit(main())
