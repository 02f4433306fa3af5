"""Rows made ready ahead of the step that needs them, by threads; the order is the caller's. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _PerThread(threading.local):
    maker: Callable[[int], Any] | None = None


class RowStream(Generic[T]):
    """`make(ordinal)` for ordinals that are announced (`want`) and later taken, each once.

    `make_maker` is called once per thread: tokenizers and processors are not safe to share. What a row
    raises is raised where it is taken, so a bad row fails its own step and no other. With 0 workers
    nothing is made ahead.
    """

    def __init__(self, make_maker: Callable[[], Callable[[int], T]], workers: int) -> None:
        self._make_maker = make_maker
        self._own: Callable[[int], T] | None = None
        self._local = _PerThread()
        self._pool = ThreadPoolExecutor(workers, "hpc-rl-data") if workers else None
        self._coming: dict[int, Future[T]] = {}

    def want(self, ordinals: Iterable[int]) -> None:
        """Begin with these rows; those wanted before and not taken are kept."""
        if self._pool is not None:
            for ordinal in ordinals:
                if ordinal not in self._coming:
                    self._coming[ordinal] = self._pool.submit(self._make, ordinal)

    def take(self, ordinal: int) -> T:
        """The row; waits for it if it is under way."""
        future = self._coming.pop(ordinal, None)
        if future is not None:
            return future.result()
        if self._own is None:
            self._own = self._make_maker()
        return self._own(ordinal)

    def forget(self) -> None:
        """Drop what was wanted and not taken (the position changed)."""
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()

    def close(self) -> None:
        """Stop the threads; a row under way is finished first."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, ordinal: int) -> T:
        if self._local.maker is None:
            self._local.maker = self._make_maker()
        made: T = self._local.maker(ordinal)
        return made
