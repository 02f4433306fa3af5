"""Memory for payloads that is used again: on a CPU, fresh pages cost several times the copy into them.

A buffer is free once no tensor made of it lives, wherever it went: who keeps a view (vLLM keeps those of a
padded layer until the end of an update) keeps the buffer from being used again, and no word needs to be said.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class _Buffer:
    memory: np.ndarray[Any, np.dtype[np.uint8]]
    lease: weakref.ref[Any] | None = None  # the view that a tensor's storage holds for as long as it lives

    @property
    def free(self) -> bool:
        return self.lease is None or self.lease() is None


class BufferPool:
    """Buffers on `device`, for one thread to take. On GPUs torch's own allocator does the same, so it is
    left to it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[_Buffer] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] with any content: of the smallest free buffer that holds it, else of a new one
        (in the place of a free one that is too small)."""
        if self.device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        free = sorted((b for b in self._buffers if b.free), key=lambda b: b.memory.nbytes)
        buffer = next((b for b in free if b.memory.nbytes >= nbytes), None)
        if buffer is None:
            if free:
                self._buffers = [b for b in self._buffers if b is not free[-1]]
            buffer = _Buffer(np.empty(nbytes, dtype=np.uint8))
            self._buffers.append(buffer)
        view = buffer.memory[:nbytes]
        buffer.lease = weakref.ref(view)
        return torch.from_numpy(view)

    @property
    def nbytes(self) -> int:
        """What is held, free or not."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)
