"""Images and videos of rows: where their files are, and what is in them. No torch.

A row says a path, bytes, `{"bytes", "path"}` as Hugging Face data sets do, a `data:` URL or a picture.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_rl.data import archives
from hpc_rl.data.chat import Conversation
from hpc_rl.data.errors import DataError
from hpc_rl.data.video import Video, read_video, shrunk
from hpc_rl.recipe.schema import DatasetSpec

_INDEX = ".hpc-rl-media.json"


class MediaFiles:
    """The media of one data set. `base` is the folder of its annotations.

    Paths are relative to `spec.media_path`, else to `base`; absolute ones are taken as they are. Rows of
    cosmos_reason1 name a clip by any path: it is found by its name anywhere under the media root.
    """

    def __init__(self, spec: DatasetSpec, base: Path | None, cache: Path | None = None) -> None:
        self._spec = spec
        self._root = Path(spec.media_path).expanduser() if spec.media_path else base
        self._cache = cache or cache_folder()
        self._by_name = spec.format == "cosmos_reason1"
        self._index: dict[str, list[str]] | None = None
        self._looks_into: set[str] = set()

    def prepare(self, unpack: bool = True) -> None:
        """Unpack the archives under the root and list its files, where clips are found by name.

        Without `unpack` (before the queue) archives are left alone, and what they may hold is not missed.
        """
        if self._index is not None or not self._by_name:
            return
        if self._root is None or not self._root.is_dir():
            raise DataError(f"data.media_path {self._root} is not a folder")
        root = self._root.resolve()
        names, packed = _files_below(root)
        roots = [root]
        for archive in packed:
            if unpack:
                target = archives.unpack(root / archive, self._cache)
                if not target.is_relative_to(root):
                    roots.append(target)
            else:
                self._looks_into.add(archive)
        if packed and unpack:
            names, _ = _files_below(root)
            for other in roots[1:]:
                names += [str(other / name) for name in _files_below(other)[0]]
        self._index = {}
        for name in names:
            self._index.setdefault(name.rpartition("/")[2], []).append(name)

    def find(self, source: str, where: str) -> Path | None:
        """The file that `source` names; None if it may be in an archive that is not unpacked yet."""
        if source.startswith(("http://", "https://")):
            raise DataError(f"{where}: {source} is on the web, and jobs run offline: download it")
        given = Path(source).expanduser()
        if self._by_name and not given.is_absolute():
            return self._clip(source, where)
        if given.is_absolute():
            path = given
        elif self._root is None:
            raise DataError(f"{where}: {source} is a relative path; set data.media_path")
        else:
            path = self._root / given
        if not path.is_file():
            raise DataError(f"{where}: {path} does not exist")
        return path

    def _clip(self, source: str, where: str) -> Path | None:
        self.prepare()
        assert self._index is not None
        assert self._root is not None
        found = self._index.get(source.rpartition("/")[2], [])
        # Of several files of that name, the one whose path agrees longest with the row's.
        score = {name: _common_tail(name, source) for name in found}
        best = [name for name in found if score[name] == max(score.values())]
        if len(best) > 1:
            raise DataError(f"{where}: {source} could be {best[0]} or {best[1]} under {self._root}")
        if not best:
            if self._looks_into:
                return None
            raise DataError(f"{where}: no file called {source.rpartition('/')[2]} under {self._root}")
        return self._root.resolve() / best[0]

    def check(self, conversation: Conversation, where: str) -> None:
        """Raises DataError if a file of the conversation is not there, or what is given can be none."""
        for source in conversation.images:
            if (path := _path_of(source)) is not None:
                self.find(path, where)
            else:
                _must_be_image(source, where)
        for source in conversation.videos:
            self.find(_video_path(source, where), where)

    def image(self, source: Any, where: str) -> Any:
        """A PIL image in RGB, upright (EXIF), within the recipe's limits of pixels.

        Raises DataError naming row and file.
        """
        from PIL import Image, ImageOps

        with self._opened(source, where) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        size = shrunk(*picture.size, self._spec.min_pixels, self._spec.max_pixels)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)

    def image_size(self, source: Any, where: str) -> tuple[int, int]:
        """`(width, height)` of what `image` returns, from the file's header (a PNG without EXIF is read)."""
        from PIL import ExifTags

        with self._opened(source, where) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            width, height = opened.size[::-1] if turned else opened.size
        return shrunk(width, height, self._spec.min_pixels, self._spec.max_pixels)

    @contextmanager
    def _opened(self, source: Any, where: str) -> Iterator[Any]:
        """The image with its header read. What goes wrong inside is a DataError naming row and file."""
        from PIL import Image, UnidentifiedImageError

        path = _path_of(source)
        name = f"image {path}" if path is not None else "image"
        try:
            if isinstance(source, Image.Image):
                yield source
                return
            file = self._existing(path, where) if path is not None else io.BytesIO(_bytes_of(source, where))
            with Image.open(file) as opened:
                yield opened
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: {name} cannot be read: {error}") from error

    def video(self, source: Any, where: str, *, blank: bool = False) -> Video:
        """Sampled frames (`spec.fps`, `spec.max_frames`), with `blank` black ones: nothing is decoded.

        Raises DataError naming row and file.
        """
        spec = self._spec
        found = self._existing(_video_path(source, where), where)
        return read_video(found, spec.fps, spec.max_frames, spec.max_pixels, where, blank=blank)

    def _existing(self, path: str, where: str) -> Path:
        found = self.find(path, where)
        assert found is not None, "archives are unpacked before rows are read"
        return found


def cache_folder() -> Path:
    """Where archives of folders that cannot be written are unpacked."""
    base = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hpc-rl" / "media"


def _path_of(source: Any) -> str | None:
    if isinstance(source, dict) and not source.get("bytes"):
        source = source.get("path")
    if isinstance(source, os.PathLike):
        source = str(source)
    if isinstance(source, str) and not source.startswith("data:"):
        return source.removeprefix("file://")
    return None


def _video_path(source: Any, where: str) -> str:
    path = _path_of(source)
    if path is None:
        raise DataError(f"{where}: a video must be a path, this is {_said(source)}")
    return path


def _must_be_image(source: Any, where: str) -> None:
    from PIL import Image

    given = source.get("bytes") if isinstance(source, dict) else source
    data_url = isinstance(given, str) and given.startswith("data:")
    if not data_url and not isinstance(given, (bytes, bytearray, memoryview, Image.Image)):
        raise DataError(f"{where}: an image must be a path, bytes or a picture, this is {_said(source)}")


def _said(source: Any) -> str:
    if isinstance(source, dict):
        return f"an object with {', '.join(map(repr, source)) or 'nothing'}"
    return f"{str(source)[:40]!r} ({type(source).__name__})"


def _bytes_of(source: Any, where: str) -> bytes:
    _must_be_image(source, where)
    if isinstance(source, dict):
        source = source.get("bytes")
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise DataError(f"{where}: a data: URL is not base64: {error}") from error
    return bytes(source)


def _common_tail(a: str, b: str) -> int:
    """How many path components agree, from the end."""
    count = 0
    for x, y in zip(reversed(a.split("/")), reversed(b.split("/")), strict=False):
        if x != y:
            break
        count += 1
    return count


def _files_below(root: Path) -> tuple[list[str], list[str]]:
    """`(files, archives)` below `root`, relative to it and sorted.

    The listing is kept in the folder and taken again while no folder below has changed: walking a parallel
    filesystem takes minutes, looking at its folders seconds.
    """
    kept = root / _INDEX
    listing = _kept(kept, root)
    if listing is None:
        listing = _walk(root)
        scratch = kept.with_name(f"{_INDEX}.{os.getpid()}")
        try:
            scratch.write_text(json.dumps(listing), encoding="utf-8")
            scratch.replace(kept)
        except OSError:
            scratch.unlink(missing_ok=True)  # a folder that cannot be written is walked each time
    names: Sequence[str] = listing["files"]
    return [n for n in names if not archives.is_archive(n)], [n for n in names if archives.is_archive(n)]


def _walk(root: Path) -> dict[str, Any]:
    folders: dict[str, int] = {}
    files = []
    for folder, below, names in os.walk(root):
        relative = os.path.relpath(folder, root)
        below[:] = sorted(name for name in below if not name.startswith("."))
        prefix = "" if relative == "." else f"{relative}/"
        if prefix:
            folders[relative] = os.stat(folder).st_mtime_ns
        files += [prefix + name for name in sorted(names) if not name.startswith(".")]
    return {"folders": folders, "top": sorted(os.listdir(root)), "files": files}


def _kept(path: Path, root: Path) -> dict[str, Any] | None:
    """The listing in `path` if it still holds. The root's own time changes with the listing itself."""
    try:
        listing: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        top = [name for name in sorted(os.listdir(root)) if not name.startswith(".")]
        same = [name for name in listing["top"] if not name.startswith(".")] == top
        same = same and all(os.stat(root / f).st_mtime_ns == t for f, t in listing["folders"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return listing if same else None
