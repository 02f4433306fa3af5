"""Run a function in several gloo ranks, with a deadline: the ranks of the torch tests.

The ranks are forked from a server that has torch imported already, so that starting them costs little.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hpc_rl.models.hf.model", "torch.distributed.tensor"])


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    folder: Path,
    *args: Any,
    group: bool = True,
    limit_s: float = 240.0,
) -> None:
    """Call `function(rank, world_size, *args)` in `world_size` processes.

    With `group` they have a default gloo group. `function` is a module-level function of a test module.
    Fails with the output of the ranks when one exits with an error or the deadline passes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = os.urandom(4).hex()
    logs = [folder / f"rank_{rank}_{token}.log" for rank in range(world_size)]
    store = str(folder / f"store_{token}") if group else None
    ranks = [
        CONTEXT.Process(
            target=_rank_main,
            args=(function, rank, world_size, store, str(log), args),
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + limit_s
    try:
        for rank in ranks:
            rank.start()
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
            if any(rank.exitcode not in (None, 0) for rank in ranks):
                break  # the others wait for it in a collective
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    codes = [rank.exitcode for rank in ranks]
    said = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())
    assert codes == [0] * world_size, f"exit codes {codes}\n{said}"


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str | None,
    log: str,
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    try:
        if store is not None:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=200),
            )
        function(rank, world_size, *args)
        if store is not None:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 -- the parent shows it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
