"""Rows of a data set without torch: JSON lines, JSON, Parquet, or a Hugging Face data set from disk or cache.

The controller hands out prompts from here, the policy's SFT loop its sequences, and `check` reads it
before anything is queued. Nothing is downloaded: `hpc-rl fetch` fills the cache on the login node.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from hpc_rl.data.errors import DataError
from hpc_rl.recipe.extensions import UnknownExtension, registry
from hpc_rl.recipe.launch.script import ScriptSource
from hpc_rl.recipe.plugins import plugin_source
from hpc_rl.recipe.schema import DatasetSpec

_SUFFIXES = (".jsonl", ".json", ".parquet")
_HASHED_ROWS = 256  # of a plugin's, whose rows may cost something
_HOLDOUT_KEY = 2**63  # no epoch has this number
_HASH_WHOLE = 64 << 20  # files above this are hashed by size, head and tail


class _Store(Protocol):
    """Random access to raw rows."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Rows:
    """A fixed sequence of rows (dicts by column name).

    `name` is the file or data set it came from; `fingerprint` identifies the content and selection,
    so that a resumed run can tell that its cursor belongs to the same data.
    """

    def __init__(self, store: _Store, length: int, fingerprint: str) -> None:
        self._store = store
        self._length = length
        self.name = store.name
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return self._length

    def number(self, index: int) -> int:
        """The number of row `index` in the file or data set that it comes from."""
        return int(self._store.numbers[index]) if isinstance(self._store, _Part) else index

    def where(self, index: int) -> str:
        """How messages name row `index`."""
        return f"{self.name}: row {self.number(index)}"

    def split(self, held_out: float, seed: int) -> tuple[Rows, Rows]:
        """`(the rest, the held-out rows)`: so many rows, or below 1 that share; at random, in file order.

        The same seed takes the same rows. Raises DataError if one side would be empty.
        """
        count = round(held_out * len(self)) if held_out < 1 else int(held_out)
        if not 0 < count < len(self):
            raise DataError(f"data.holdout {held_out:g} takes {count} of the {len(self)} rows of {self.name}")
        words = np.random.Philox(key=[seed, _HOLDOUT_KEY]).random_raw(len(self))
        order = np.argsort(words, kind="stable")
        parts = [np.sort(order[count:]), np.sort(order[:count])]
        rest, held = (
            Rows(_Part(self, part), len(part), f"{self.fingerprint}/{name} {count} seed {seed}")
            for name, part in zip(("without", "holdout"), parts, strict=True)
        )
        return rest, held

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as a dict. Raises IndexError outside `[0, len)`, DataError if it cannot be decoded."""
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name}: row {index} of {self._length}")
        return self._store[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self._length))


class _Part:
    """Some rows of another data set."""

    def __init__(self, rows: Rows, numbers: np.ndarray) -> None:
        self.name, self.numbers, self._rows = rows.name, numbers, rows

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(self.numbers[index])]


class _JsonLines:
    """Lines of several files by byte offset: the rows themselves stay on disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
        self._paths = list(paths)
        spans: list[tuple[int, int, int, int]] = []
        for number, path in enumerate(self._paths):
            offset = 0
            with path.open("rb") as file:
                for line_number, line in enumerate(file, 1):
                    if line.strip():
                        spans.append((number, offset, len(line), line_number))
                    offset += len(line)
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 4)
        self._files: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, offset, size, line_number = (int(x) for x in self._spans[index])
        with self._lock:  # rows are read by several threads
            if number not in self._files:
                self._files[number] = self._paths[number].open("rb")
        raw = os.pread(self._files[number].fileno(), size, offset)
        where = f"{self._paths[number]}:{line_number}"
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:  # its own line number would be that within this line
            raise DataError(
                f"{where}: not a JSON object: {error.msg} at character {error.pos + 1}"
            ) from error
        except UnicodeDecodeError as error:
            bad = f"byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line"
            raise DataError(f"{where}: not UTF-8: {bad} ({error.reason}); save the file as UTF-8") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
        return row


class _Json:
    """One JSON file: a list of objects, or an object whose only list of objects is the rows."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error} (JSON lines belong in a .jsonl file)") from error
        if isinstance(content, dict):
            lists = [value for value in content.values() if isinstance(value, list)]
            content = lists[0] if len(lists) == 1 else content
        if not isinstance(content, list):
            raise DataError(f"{path}: expected a list of objects, found {type(content).__name__}")
        self._rows = content

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise DataError(f"{self.name}: row {index} must be an object, this is {type(row).__name__}")
        return row


class _Table:
    """A Hugging Face data set (Arrow-backed): from the Hub's cache, `save_to_disk`, or Parquet files."""

    def __init__(self, name: str, table: Any) -> None:
        self.name = name
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._table[index])


class _Parquet:
    """Parquet files through pyarrow: the table is memory-mapped, rows become Python objects on access."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
        try:
            self._table = pa.concat_tables([pq.read_table(path, memory_map=True) for path in paths])
        except pa.ArrowException as error:
            raise DataError(f"{self.name}: not readable as Parquet: {error}") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return row


def load_rows(spec: DatasetSpec, base: Path | None = None) -> Rows:
    """The rows `spec` names; relative paths are tried under `base` first, then the working folder.

    A path that exists is a file (.jsonl, .json, .parquet), a folder with one file (or several shards)
    per split, or a `datasets.save_to_disk` folder; `plugin:NAME` is what a plugin registered as `data`;
    anything else is a data set of the Hub, read from the local cache only. Raises DataError when nothing is
    found or there are no rows.
    """
    store: _Store
    if plugin_source(spec.path) is not None:
        store, identity = _open_plugin(spec)
    else:
        path = find_path(spec.path, base)
        store, identity = _open_path(path, spec) if path is not None else _open_hub(spec)
    length = len(store) if spec.limit is None else min(spec.limit, len(store))
    if length == 0:
        raise DataError(f"{store.name}: no rows")
    digest = hashlib.sha256(f"{identity}|{len(store)}|{length}".encode()).hexdigest()[:32]
    return Rows(store, length, digest)


def _near(missing: Path, base: Path | None) -> str:
    """The file of the same folder whose name is nearest to the one that is missing."""
    folder = (base / missing if base is not None else missing).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f". Did you mean {str(missing.with_name(close[0]))!r}?" if close else ""


def find_path(path: str, base: Path | None) -> Path | None:
    """`path` on this machine (under `base`, or as it is), or None if it is a plugin's or can only be a Hub
    name."""
    if plugin_source(path) is not None:
        return None
    given = Path(path).expanduser()
    for candidate in ([base / given] if base is not None else []) + [given]:
        if candidate.exists():
            return candidate.resolve()
    looks_local = given.is_absolute() or path.startswith(("./", "../", "~")) or given.suffix in _SUFFIXES
    if looks_local or path.count("/") > 1:
        places = [] if given.is_absolute() else [str(p) for p in (base, Path.cwd()) if p is not None]
        looked = f" (looked in {' and '.join(places)})" if places else ""
        raise DataError(f"data path {path} does not exist{looked}{_near(given, base)}")
    return None


class _Plugin:
    """Rows that a plugin makes: anything with a length and items that are mappings of columns."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self._rows[index]
        except ValueError as error:  # what the plugin says of the row
            raise DataError(f"{self.name}: row {index}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{self.name}: row {index} must be a mapping, this is {type(row).__name__}")
        return row


def _open_plugin(spec: DatasetSpec) -> tuple[_Store, str]:
    """What `plugin:NAME` stands for: a function of the dataset section, registered as `data`."""
    source = plugin_source(spec.path)
    assert source is not None
    try:
        make = registry("data").load(source[0])
    except (UnknownExtension, ImportError) as error:
        raise DataError(f"{spec.path}: {error}") from error
    try:
        if isinstance(make, ScriptSource):
            from hpc_rl.data.script_rows import ScriptRows

            rows: Any = ScriptRows(make, spec)
        else:
            rows = make(spec)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{spec.path} cannot be opened: {type(error).__name__}: {error}") from error
    store = _Plugin(spec.path, rows)
    digest = hashlib.sha256()
    for index in range(min(len(store), _HASHED_ROWS)):
        digest.update(json.dumps(store[index], sort_keys=True, default=str).encode())
    return store, digest.hexdigest()


def _open_path(path: Path, spec: DatasetSpec) -> tuple[_Store, str]:
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _open_saved(path, spec)
        paths = _split_files(path, spec)
    else:
        paths = [path]
    kinds = {p.suffix for p in paths}
    if len(kinds) > 1 or not kinds <= set(_SUFFIXES):
        raise DataError(f"{path}: {sorted(kinds)} cannot be read; use one of {', '.join(_SUFFIXES)}")
    kind = kinds.pop()
    identity = "|".join(_file_digest(p) for p in paths)
    if kind == ".jsonl":
        return _JsonLines(paths), identity
    if kind == ".parquet":
        return _Parquet(paths), identity
    if len(paths) > 1:
        raise DataError(f"{path}: several .json files for split {spec.split!r}; name one, or use .jsonl")
    return _Json(paths[0]), identity


def _split_files(folder: Path, spec: DatasetSpec) -> list[Path]:
    """`<split>.jsonl`, `<split>-00000-of-00002.parquet`, `<split>/…`, also under `<subset>/` or `data/`."""
    roots = [folder, folder / "data"]
    if spec.subset:
        roots = [root / spec.subset for root in roots]
    for root in roots:
        for suffix in _SUFFIXES:
            found = sorted(root.glob(f"{spec.split}{suffix}")) or sorted(root.glob(f"{spec.split}-*{suffix}"))
            found = found or sorted((root / spec.split).glob(f"*{suffix}"))
            if found:
                return found
    there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in _SUFFIXES)[:8]
    raise DataError(
        f"{folder}: no file for split {spec.split!r}"
        + (f" of subset {spec.subset!r}" if spec.subset else "")
        + (f"; there are {', '.join(there)}" if there else f"; it holds no {', '.join(_SUFFIXES)} file")
    )


def _open_saved(path: Path, spec: DatasetSpec) -> tuple[_Store, str]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if spec.split not in loaded:
            raise DataError(f"{path}: no split {spec.split!r}; there are {', '.join(loaded)}")
        loaded = loaded[spec.split]
    files = sorted(Path(entry["filename"]) for entry in loaded.cache_files)
    return _Table(str(path), loaded), "|".join(_file_digest(p) for p in files)


def _open_hub(spec: DatasetSpec) -> tuple[_Store, str]:
    import datasets

    name = f"{spec.path}[{spec.subset}]" if spec.subset else spec.path
    try:
        loaded = datasets.load_dataset(
            spec.path,
            spec.subset,
            split=spec.split,
            revision=spec.revision,
            download_config=datasets.DownloadConfig(local_files_only=True),
        )
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data set {name} (split {spec.split}) is neither a path nor in the local cache; "
            f"run `hpc-rl fetch` on a node with internet, or give a file: {reason}"
        ) from error
    files = sorted(Path(entry["filename"]) for entry in loaded.cache_files)
    return _Table(f"{name}:{spec.split}", loaded), "|".join(_file_digest(p) for p in files)


def _file_digest(path: Path) -> str:
    try:
        return _digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _HASH_WHOLE:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            digest.update(file.read(1 << 20))
            file.seek(-(1 << 20), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()
