"""What benchmarks of a sharded model share: ranks of a gloo group, a random model, a folder in memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._report import interleave

RANKS = 2
LIMIT_S = 1500.0


@contextmanager
def work_folder(needed_bytes: int) -> Iterator[Path]:
    """A scratch folder in memory (/dev/shm) if it has the room, so that no disk is measured and `fsync`
    costs nobody anything; else the temporary folder."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed_bytes
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        yield Path(folder)


def random_model(folder: Path, hidden: int, layers: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a random Qwen3 to `folder`."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def run_ranks(function: Callable[..., Any], folder: Path, *args: Any) -> Any:
    """Call `function(rank, *args)` in RANKS processes with a gloo group; what rank 0 returned."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [
        context.Process(target=_main, args=(function, rank, str(folder / "store"), answers, args))
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(LIMIT_S)
        if any(rank.exitcode != 0 for rank in ranks):
            raise RuntimeError(f"ranks ended with {[rank.exitcode for rank in ranks]} (None: too slow)")
    finally:
        for rank in ranks:
            rank.kill()
    return answers.get()


def alternate(
    rank: int, ours: Callable[[], float], peer: Callable[[], float], pairs: int
) -> dict[str, list[float]]:
    """`interleave` on each rank after one run of each side to warm up; rank 0 says how it goes."""
    ours(), peer()
    mine, theirs = interleave(ours, peer, pairs, say=print if rank == 0 else lambda line: None)
    return {"ours": mine, "peer": theirs}


def _main(function: Callable[..., Any], rank: int, store: str, answers: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // RANKS))
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    result = function(rank, *args)
    if rank == 0:
        answers.put(result)
    dist.barrier()
    dist.destroy_process_group()
