"""Buffers are used again, and never while somebody has a tensor of them."""

from __future__ import annotations

import pytest
import torch

from hpc_rl.weights.buffers import BufferPool

pytestmark = pytest.mark.torch


def test_a_buffer_is_free_when_its_last_view_is_gone() -> None:
    pool = BufferPool(torch.device("cpu"))
    first = pool.take(100)
    address = first.data_ptr()
    kept = first[16:40].view(torch.float64).reshape(3, 1)
    del first
    second = pool.take(100)  # a view of the first is alive
    assert second.data_ptr() != address
    del kept
    again = pool.take(64)
    assert again.data_ptr() == address
    assert again.shape == (64,)
    assert pool.nbytes == 200


def test_a_free_buffer_that_is_too_small_makes_room_for_a_larger_one() -> None:
    pool = BufferPool(torch.device("cpu"))
    busy = pool.take(10)
    pool.take(20)
    assert pool.nbytes == 30
    large = pool.take(1000)
    assert pool.nbytes == 1010
    large.fill_(1)
    busy.fill_(2)
    assert int(large.sum()) == 1000
