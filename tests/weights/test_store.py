"""RedisStore holds c10d's contract, and real process groups (gloo, FSDP2) rendezvous over it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hpc_rl.weights.store import RedisStore

pytestmark = [pytest.mark.redis, pytest.mark.torch, pytest.mark.timeout(120)]


def test_keys_values_and_counters(bus_file: Path) -> None:
    store = RedisStore.from_bus_file(bus_file, "basics", 2.0)
    store.set("a", b"\x00\xff")
    store.set("text", "hello")
    assert store.get("a") == b"\x00\xff"
    assert store.get("text") == b"hello"
    assert store.add("n", 3) == 3
    assert store.add("n", -1) == 2
    assert store.get("n") == b"2"
    assert store.check(["a", "n"])
    assert not store.check(["a", "nothing"])
    assert store.num_keys() == 3
    assert sorted(store.list_keys()) == ["a", "n", "text"]
    assert store.delete_key("a")
    assert not store.delete_key("a")
    store.append("log", b"x")
    store.append("log", b"y")
    assert store.multi_get(["log", "text"]) == [b"xy", b"hello"]
    store.drop()
    assert store.num_keys() == 0


def test_compare_set_is_that_of_tcp_store(bus_file: Path) -> None:
    ours = RedisStore.from_bus_file(bus_file, "compare", 2.0)
    theirs = dist.TCPStore("127.0.0.1", 0, 1, True)
    for key, expected, desired in [
        ("k", "wrong", "x"),
        ("k", "", "first"),
        ("k", "", "second"),
        ("k", "first", "third"),
        ("k", "first", "fourth"),
    ]:
        assert ours.compare_set(key, expected, desired) == theirs.compare_set(key, expected, desired)


def test_wait_names_the_missing_key(bus_file: Path) -> None:
    store = RedisStore.from_bus_file(bus_file, "wait", 0.3)
    store.set("here", b"1")
    with pytest.raises(dist.DistStoreError, match=r"store:wait.*waited 0.3 s for rank_1;"):
        store.wait(["here", "rank_1"])
    with pytest.raises(dist.DistStoreError, match="rank_2"):
        store.wait(["rank_2"], timedelta(seconds=0.05))
    threading.Timer(0.2, lambda: store.set("late", b"v")).start()
    store.set_timeout(timedelta(seconds=5))
    assert store.get("late") == b"v"


def test_refuses_a_readable_bus_file_and_a_wrong_password(bus_file: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose.json"
    loose.write_text(bus_file.read_text())
    loose.chmod(0o644)
    with pytest.raises(PermissionError, match="mode 0600"):
        RedisStore.from_bus_file(loose, "x", 1.0)
    wrong = tmp_path / "wrong.json"
    wrong.write_text(bus_file.read_text().replace('"password": "', '"password": "no'))
    wrong.chmod(0o600)
    with pytest.raises(dist.DistNetworkError, match=r"Redis at 127\.0\.0\.1"):
        RedisStore.from_bus_file(wrong, "x", 1.0)


def _fsdp_rank(rank: int, bus: str, results: multiprocessing.Queue) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.pop("MASTER_ADDR", None)  # nothing but the store may be used
    store = RedisStore.from_bus_file(bus, "fsdp", 60.0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    fully_shard(model, mesh=mesh)
    loss = model(torch.ones(2, 8) * (rank + 1)).sum()
    loss.backward()
    gradient = model[0].weight.grad.full_tensor()
    second = dist.new_group(backend="gloo")
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total, group=second)
    gathered: list = [None, None]
    dist.all_gather_object(gathered, float(gradient.sum()))
    results.put((rank, float(total), gathered))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_with_fsdp2_and_a_second_group(bus_file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_fsdp_rank, args=(r, str(bus_file), results)) for r in range(2)]
    for process in ranks:
        process.start()
    answers = sorted(results.get(timeout=90) for _ in ranks)
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert answers[0][1] == answers[1][1] == 3.0
    assert answers[0][2][0] == answers[0][2][1] != 0.0


def test_raw_group_in_threads_and_a_peer_that_never_comes(bus_file: Path) -> None:
    """What a transfer group is: ProcessGroupGloo beside any default group."""
    received = torch.zeros(4)
    stores = [RedisStore.from_bus_file(bus_file, "raw", 20.0) for _ in range(2)]

    def member(rank: int, tensor: torch.Tensor) -> None:
        group = dist.ProcessGroupGloo(stores[rank], rank, 2, timedelta(seconds=20))
        group.broadcast([tensor], dist.BroadcastOptions()).wait()

    other = threading.Thread(target=member, args=(1, received))
    other.start()
    member(0, torch.arange(4.0))
    other.join(20)
    assert received.tolist() == [0.0, 1.0, 2.0, 3.0]

    lonely = RedisStore.from_bus_file(bus_file, "lonely", 1.0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"waited 1\.0 s"):
        dist.ProcessGroupGloo(lonely, 0, 2, timedelta(seconds=1))
    assert time.monotonic() - began < 10
