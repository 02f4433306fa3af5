"""Fixtures of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from hpc_rl.bus.server import RedisServer
from tests.tiny_models import save_model, save_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random character-level Qwen2 with tied embeddings, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_tokenizer(save_model(folder, "qwen2"))


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for each test, as for each attempt of a run: ranks must not meet at another group's addresses."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """A test that fails before it closes its trainer does not take the next ones with it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
