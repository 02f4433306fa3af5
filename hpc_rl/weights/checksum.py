"""A 64-bit checksum of a tensor's bytes, computed where the tensor lives (CPU or GPU).

The bytes are read as little-endian int64 words w_0, w_1, ... (zero-padded at the end) and the checksum
is sum_i w_i * (2 i + 1) mod 2^64. The multipliers are odd, so a change of any one word always changes
the sum; they differ, so swapped or shifted words change it too. Integer arithmetic wraps and does not
depend on the order of summation: every device and thread count gives the same number. It guards
against lost, torn and misplaced data, not against an attacker.
"""

from __future__ import annotations

import numpy as np
import torch

CHUNK_WORDS = 1 << 22  # 32 MiB of data per pass on a GPU, so that the multipliers need no more than that
CPU_CHUNK_WORDS = 1 << 17  # 1 MiB: chunk and multipliers stay in the cache for both passes


def tensor_checksum(tensor: torch.Tensor) -> int:
    """The checksum of `tensor`'s bytes in row-major order, in [-2^63, 2^63)."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    words = _words(data[:whole])
    total = _sum_on_cpu(words) if data.device.type == "cpu" else _sum_on_gpu(words)
    if whole < data.numel():
        tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
        tail[: data.numel() - whole] = data[whole:]
        total += tail.view(torch.int64)[0] * (2 * len(words) + 1)
    return int(total)


def _sum_on_cpu(words: torch.Tensor) -> torch.Tensor:
    """Two reads and no temporary: a product of all words would be written to fresh pages first, which costs
    ten times as much as the sum. NumPy, because it stays in this thread: torch would wake as many threads as
    an engine beside us generates with."""
    values = words.numpy()
    total = 0
    odd = np.arange(min(len(values), CPU_CHUNK_WORDS), dtype=np.int64) * 2 + 1
    for start in range(0, len(values), CPU_CHUNK_WORDS):
        chunk = values[start : start + CPU_CHUNK_WORDS]
        total += int(np.dot(chunk, odd[: len(chunk)])) + int(chunk.sum()) * 2 * start
    return torch.tensor((total + 2**63) % 2**64 - 2**63)


def _sum_on_gpu(words: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    odd = torch.arange(min(len(words), CHUNK_WORDS), dtype=torch.int64, device=words.device) * 2 + 1
    for start in range(0, len(words), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
        total += (chunk * (odd[: len(chunk)] + 2 * start)).sum()
    return total


def _words(data: torch.Tensor) -> torch.Tensor:
    """`data` as int64 words; copied first where it does not start at an 8-byte boundary."""
    if data.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=data.device)
    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)
