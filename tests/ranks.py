"""Run a function in several gloo ranks, with a deadline: the ranks of the torch tests."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, limit_s: float = 240.0
) -> None:
    """Call `function(rank, world_size, *args)` in `world_size` processes with a default gloo group.

    `function` is a module-level function of a test module, `args` are JSON. Fails with the output of
    the ranks when one exits with an error or the deadline passes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store-{os.urandom(4).hex()}"
    root = Path(__file__).resolve().parents[1]
    code = Path(sys.modules[function.__module__].__file__ or "").resolve()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    paths = [str(root), str(root / "tests"), str(code.parent)]
    env["PYTHONPATH"] = os.pathsep.join([*paths, env.get("PYTHONPATH", "")])
    call = json.dumps([code.stem, function.__name__, world_size, str(store), list(args)], default=str)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, call, str(rank)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=limit_s)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                outputs.append(process.communicate()[0])
    codes = [process.returncode for process in processes]
    assert codes == [0] * world_size, "\n".join(f"--- rank {r}\n{o[-3000:]}" for r, o in enumerate(outputs))


def _rank_main() -> None:
    module_name, name, world_size, store_path, args = json.loads(sys.argv[1])
    rank = int(sys.argv[2])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store_path, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=200),
    )
    getattr(importlib.import_module(module_name), name)(rank, world_size, *args)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main()
