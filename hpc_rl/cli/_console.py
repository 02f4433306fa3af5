"""Output that all commands share: notes on stderr, answers on stdout, JSON, a plain table, a live line."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any


def note(text: str) -> None:
    """Progress and hints: stderr, so that stdout holds the answer alone."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns padded to their widest cell; nothing is cut, so that the output can be parsed."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def size(nbytes: float) -> str:
    """`512 B`, `3.4 MiB`, `14.9 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def ago(then: float | None, now: float | None = None) -> str:
    """`45s`, `12m`, `3h`, `2d`; `-` for no time."""
    if then is None:
        return "-"
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


class LiveLine:
    """One line that is rewritten in place on a terminal; elsewhere a line only when it changes."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = ""

    def show(self, text: str) -> None:
        if text == self._shown:
            return
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[2K" + text[:width], end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        self._shown = text

    def end(self) -> None:
        """Leave the line where it is; what follows starts on a new one."""
        if self._terminal and self._shown:
            print(file=sys.stderr, flush=True)
        self._shown = ""
