"""Whether the bytes of checkpoints and exports are still those that were written (`hpc-rl verify`). No torch.

A checkpoint is compared with its `COMPLETE`: sizes and XXH3-64 of every file. An export has no checksums, for
many ranks write into one file: its safetensors headers are compared with the sizes of the files and with
the index. That finds what is missing, cut off or overwritten at the front, but not a byte that changed inside
a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from hpc_rl.checkpoint.layout import step_of
from hpc_rl.checkpoint.manifest import BAD, CHUNK, COMPLETE, FileEntry, Manifest, read_manifest
from hpc_rl.run.paths import RunDir

THREADS = 4  # a parallel filesystem gives one reader a fraction of what it has
INDEX = "model.safetensors.index.json"
_HEADER = 8  # bytes of a safetensors file that say how long its header is
_HEADER_LIMIT = 100_000_000  # the format's own limit

Read = Callable[[int], None]  # told of every piece that was read, in bytes


@dataclass
class Checked:
    """What was found in a folder. `problems` name the files; `notes` are no damage; `gone`: the run removed
    it while it was read (`checkpoint.max_keep`)."""

    folder: Path
    step: int | None
    files: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gone: bool = False

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def saved_checkpoints(run: RunDir) -> list[Path]:
    """Every folder with `COMPLETE`, also those that a start found bad, oldest first."""
    found = [path for path in run.checkpoints.glob("step_*") if (path / COMPLETE).is_file()]
    return sorted((path for path in found if step_of(path) is not None), key=lambda path: step_of(path) or 0)


def planned_bytes(folder: Path) -> int:
    """How many bytes `check_checkpoint` will read at most: for progress, so damage counts as nothing."""
    try:
        return sum(entry.nbytes for entry in read_manifest(folder).files.values())
    except (ValueError, OSError):
        return 0


def check_checkpoint(folder: Path, read: Read = lambda nbytes: None) -> Checked:
    """Compare every file of a complete checkpoint with the sizes and checksums of its `COMPLETE`.

    A checkpoint that its run removes meanwhile is no damage.
    """
    found = Checked(folder, step_of(folder))
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:  # it was there when it was listed
        found.gone = True
        return found
    except OSError as error:
        found.problems.append(f"{COMPLETE} cannot be read: {error.strerror}")
        return found
    except ValueError as error:
        found.problems.append(str(error))
        return found
    if not manifest.files:
        found.notes.append(f"its {COMPLETE} lists no files, so there is nothing to compare with")
    with ThreadPoolExecutor(THREADS) as pool:
        files = sorted(manifest.files.items(), key=lambda item: -item[1].nbytes)
        jobs = {name: pool.submit(_problem, folder / name, entry, read) for name, entry in files}
        problems = [f"{name} {problem}" for name, job in sorted(jobs.items()) if (problem := job.result())]
    if problems and not (folder / COMPLETE).exists():
        found.gone = True
        return found
    found.files, found.nbytes = len(manifest.files), sum(entry.nbytes for entry in manifest.files.values())
    found.problems = problems
    found.notes += _notes(folder, manifest)
    return found


def _problem(path: Path, entry: FileEntry, read: Read) -> str:
    """What is wrong with the file, behind its name; "" if nothing is."""
    try:
        nbytes = path.stat().st_size
        if nbytes != entry.nbytes:
            return f"has {nbytes} bytes, {entry.nbytes} were written"
        now = _checksum(path, read) if entry.xxh3 else ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return f"changed since it was written (checksum {now}, was {entry.xxh3})" if now != entry.xxh3 else ""


def _checksum(path: Path, read: Read) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
            read(len(chunk))
    return state.hexdigest()


def _notes(folder: Path, manifest: Manifest) -> Iterator[str]:
    bare = sum(not entry.xxh3 for entry in manifest.files.values())
    if bare:
        yield f"{bare} of {len(manifest.files)} files have no checksum: sizes only"
    if (folder / BAD).is_file():
        yield f"marked {BAD} by an earlier start, which passed it over"


# --- exports ---------------------------------------------------------------------------------------------
def check_export(folder: Path) -> Checked:
    """Compare the safetensors files of an export with their own headers and with the index."""
    found = Checked(folder, step_of(folder))
    held: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = str(path.relative_to(folder))
        try:
            held[name] = set(tensor_names(path))
            found.nbytes += path.stat().st_size
        except (ValueError, OSError) as error:
            held[name] = set()
            found.problems.append(f"{name} {error.strerror if isinstance(error, OSError) else error}")
    found.files = len(held)
    if not held:
        found.problems.append("no *.safetensors file is there")
    if (folder / INDEX).is_file():
        found.problems += _index_problems(folder / INDEX, held)
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            found.problems.append(f"{path.name} cannot be read: {error}")
    found.notes.append("an export has no checksums: headers, sizes and index only")
    return found


def tensor_names(path: Path) -> list[str]:
    """The tensors of a safetensors file. Raises ValueError unless header and size of the file agree."""
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER), "little")
        if nbytes < _HEADER or length > min(nbytes - _HEADER, _HEADER_LIMIT):
            raise ValueError(f"is cut off or overwritten: its header does not fit into its {nbytes} bytes")
        try:
            header = json.loads(file.read(length))
            spans = {name: value["data_offsets"] for name, value in header.items() if name != "__metadata__"}
            ends, end = sorted((int(start), int(stop)) for start, stop in spans.values()), 0
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"has a damaged header: {error}") from error
    for start, stop in ends:
        if start != end or stop < start:
            raise ValueError(
                f"has a damaged header: a tensor begins at {start}, the one before ends at {end}"
            )
        end = stop
    if _HEADER + length + end != nbytes:
        raise ValueError(f"has {nbytes} bytes, by its header {_HEADER + length + end}")
    return list(spans)


def _index_problems(index: Path, held: dict[str, set[str]]) -> list[str]:
    """Files and tensors that the index names and that are not there."""
    try:
        names: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        wanted = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return []  # no JSON: said with the other JSON files; or none of ours
    problems = [f"{name} is missing" for name in wanted if name not in held]
    lost = [tensor for tensor, name in names.items() if held.get(name) and tensor not in held[name]]
    return problems + ([f"{index.name} names {lost[0]}, which is in no file"] if lost else [])
