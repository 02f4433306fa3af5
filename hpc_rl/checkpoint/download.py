"""A run back from S3: its settings and records, and the newest checkpoint that is whole. No torch.

What is downloaded is compared with the sizes and checksums of the upload. The run directory gets its name
when everything is there, so a download that was cut off is no run; a second call goes on with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from hpc_rl.checkpoint.manifest import FileEntry, checksum
from hpc_rl.checkpoint.s3 import Location, S3Store, UploadError
from hpc_rl.checkpoint.upload_items import CHECKPOINTS, RUN, Uploaded
from hpc_rl.recipe.dump import dump_resolved, read_resolved
from hpc_rl.run.paths import RunDir, RunError

_SETTINGS = f"{RUN}/resolved.yaml"
_LISTS = f"uploads/{CHECKPOINTS}/"
_BEGUN = ".downloading"


def find_location(location: Location) -> Location:
    """The location of one run: `location` itself, or the latest run below it.

    Raises UploadError when there is none, or runs of several names.
    """
    keys = S3Store(location).list()
    found = sorted(key[: -len(_SETTINGS)].strip("/") for key in keys if key.endswith(_SETTINGS))
    if not found:
        raise UploadError(f"no run was uploaded to {location}", permanent=True)
    if len({path.rpartition("/")[0] for path in found}) > 1:
        raise UploadError(f"{location} has several runs; name one: {', '.join(found)}", permanent=True)
    return location.under(found[-1])


def download_run(
    location: Location, output_root: Path | None = None, say: Callable[[str], None] = print
) -> RunDir:
    """The run of `location`, in `output_root` (default: the one of its recipe).

    Raises UploadError when nothing whole is there, RunError when the run directory exists already.
    """
    location = find_location(location)
    store = S3Store(location)
    name, run_id = location.prefix.split("/")[-2:] if "/" in location.prefix else ("run", location.prefix)
    settings = store.get(_SETTINGS)
    root = output_root or _output_root(settings)
    target = root.expanduser().absolute() / name / run_id
    if target.exists():
        raise RunError(f"{target} is here already; resume it as it is: hpc-rl resume {target}")
    begun = target.with_name(f"{_BEGUN}-{run_id}")
    if not begun.exists():
        RunDir.create(begun.parent.parent, name, run_id=begun.name)
    keys = store.list()
    for key in sorted(key for key in keys if key.startswith(f"{RUN}/") and key != _SETTINGS):
        path = begun / key.removeprefix(f"{RUN}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(key))
    step = _checkpoint(store, begun, keys, say)
    _write_settings(begun / "resolved.yaml", settings, root)
    os.replace(begun, target)
    say(f"downloaded {location} to {target}, checkpoint {step}")
    return RunDir(target)


def _checkpoint(store: S3Store, folder: Path, keys: dict[str, int], say: Callable[[str], None]) -> str:
    """Download the newest checkpoint that is whole, with a word for each that is not; its name."""
    lists = sorted((key for key in keys if key.startswith(_LISTS)), reverse=True)
    if not lists:
        raise UploadError(f"{store.location} has no complete checkpoint", permanent=True)
    problem: UploadError | None = None
    for key in lists:
        try:
            listed = msgspec.json.decode(store.get(key), type=Uploaded)
            item = folder / listed.item
            for number, (name, entry) in enumerate(sorted(listed.files.items()), 1):
                path = item / name
                if not _is_there(path, entry):
                    say(f"{number}/{len(listed.files)} {listed.item}/{name}: {entry.nbytes / 1e6:.1f} MB")
                    store.get_file(f"{listed.item}/{name}", path, entry)
            return item.name
        except (UploadError, msgspec.MsgspecError) as error:
            problem = error if isinstance(error, UploadError) else UploadError(f"{key} is damaged: {error}")
            if problem.permanent:
                raise problem from error
            say(f"warning: {problem}; looking for an older checkpoint")
            shutil.rmtree(folder / CHECKPOINTS / Path(key).stem, ignore_errors=True)
    assert problem is not None
    raise problem


def _is_there(path: Path, entry: FileEntry) -> bool:
    """From a download before, whole."""
    return path.is_file() and path.stat().st_size == entry.nbytes and checksum(path) == entry.xxh3


def _output_root(settings: bytes) -> Path:
    import yaml

    return Path(str(yaml.safe_load(settings)["output_root"]))


def _write_settings(path: Path, settings: bytes, root: Path) -> None:
    """What makes the folder a run, so it comes last. The run lies elsewhere now: later checks look there."""
    path.write_bytes(settings)
    moved = read_resolved(path).model_copy(update={"output_root": str(root.expanduser().absolute())})
    path.write_text(dump_resolved(moved), encoding="utf-8")
