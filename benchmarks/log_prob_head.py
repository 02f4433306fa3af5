"""Log-probs from hidden states, forward and backward: ours in chunks over TRL of all logits (its
`selective_log_softmax`): `python -m benchmarks.log_prob_head [--pairs N] [--threads N]`.

N = 2048 rows, 32,000 tokens, hidden size 512, fp32. The loss is a weighted sum of the log-probs, as that of
SFT, so our gradients are made in the forward; `rl` is the ratio with DAPO's loss (on-policy, so that the
gradients are the same), whose gradients are made in the forward as well, chunk by chunk; `any_loss` that
where the weights are not known and the logits are made twice. TRL's function loops over the first
dimension, so it is timed with the rows as one dimension and as [8, 256], and the faster is the peer.
`memory_mb` is from processes of their own: how far the resident memory rises above what it was before the
forward, beside the gradients that are left in the end and the logits of one chunk and of all rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._report import interleave, report_seconds, summary
from hpc_rl.algorithms.base import TokenBatch
from hpc_rl.algorithms.chunked_head import Head, chunk_rows, chunked_log_probs
from hpc_rl.algorithms.config import DapoConfig
from hpc_rl.algorithms.dapo import Dapo

ROWS, VOCABULARY, HIDDEN = 2048, 32_000, 512
GOAL = 0.75


class Case:
    """The tensors, and a run of each side; a run gives its seconds and leaves its gradients."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(ROWS, HIDDEN).requires_grad_()
        self.weight = (torch.randn(VOCABULARY, HIDDEN) * 0.02).requires_grad_()
        self.targets = torch.randint(VOCABULARY, (ROWS,))
        self.weights = torch.rand(ROWS) / ROWS
        self.dapo = Dapo(DapoConfig())

    def run(self, loss: Callable[[], Tensor]) -> float:
        self.hidden.grad = self.weight.grad = None
        began = time.perf_counter()
        loss().backward()
        return time.perf_counter() - began

    def weighted(self, log_probs: Tensor) -> Tensor:
        return (log_probs * -self.weights).sum()

    def known(self) -> Tensor:
        head = Head(self.weight)
        return self.weighted(chunked_log_probs(self.hidden, head, self.targets, weights=self.weights)[0])

    def any_loss(self) -> Tensor:
        return self.weighted(chunked_log_probs(self.hidden, Head(self.weight), self.targets)[0])

    @functools.cached_property
    def batch(self) -> TokenBatch:
        """Tokens that the present weights sampled, with advantages whose gradient is that of `weighted`."""
        with torch.no_grad():
            sampled, _ = chunked_log_probs(self.hidden, Head(self.weight), self.targets)
        sequence = torch.arange(ROWS) // 128
        everything = (self.targets, torch.ones(ROWS), sequence, ROWS // 128, float(ROWS))
        return TokenBatch(*everything, sampled, self.weights * ROWS)

    def rl(self) -> Tensor:
        weights = functools.partial(self.dapo.token_gradient, self.batch)
        log_probs, _ = chunked_log_probs(self.hidden, Head(self.weight), self.targets, weights=weights)
        return self.dapo.loss(self.batch, log_probs, None).loss

    def trl(self, *shape: int) -> Tensor:
        from trl.trainer.utils import selective_log_softmax

        hidden, targets = self.hidden.view(*shape, HIDDEN), self.targets.view(*shape)
        return self.weighted(selective_log_softmax(hidden @ self.weight.T, targets).flatten())

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad.clone(), self.weight.grad.clone()


SIDES: dict[str, Callable[[Case], Tensor]] = {
    "known": Case.known,
    "rl": Case.rl,
    "any_loss": Case.any_loss,
    "trl_rows": lambda case: case.trl(ROWS),
    "trl_batch": lambda case: case.trl(8, ROWS // 8),
}


def resident_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (at most) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024 / 1e6


def measure_memory(side: str) -> None:
    """In a process of its own: print the MB by which the resident memory rises."""
    case = Case()
    if side.startswith("trl"):  # the import is no part of it
        import trl.trainer.utils  # noqa: F401
    torch.ones(64, 64).mm(torch.ones(64, 64))  # the library's threads and buffers
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at VmRSS
    before = resident_mb("VmRSS")
    case.run(functools.partial(SIDES[side], case))
    print(json.dumps({"rise_mb": round(resident_mb("VmHWM") - before, 1)}))


def memory_of(side: str, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.log_prob_head", "--memory", side, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return float(json.loads(done.stdout.splitlines()[-1])["rise_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", choices=SIDES, help="only this: the memory of one side")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory is not None:
        measure_memory(options.memory)
        return
    case = Case()
    runs = {name: functools.partial(case.run, functools.partial(side, case)) for name, side in SIDES.items()}
    found = {}
    for name, run in runs.items():  # also the warm-up
        run()
        found[name] = case.gradients()
    for name, gradients in found.items():
        for ours, peers in zip(gradients, found["trl_rows"], strict=True):
            off = float((ours - peers).abs().max() / peers.abs().max())
            assert off < 1e-4, f"{name} and TRL have different gradients: {off:.2g}"
    seconds = {name: min(runs[name]() for _ in range(2)) for name in ("trl_rows", "trl_batch")}
    peer = min(seconds, key=lambda name: seconds[name])
    print(f"the peer is {peer}: {seconds}")
    slow, slow_peer = interleave(runs["any_loss"], runs[peer], max(2, options.pairs // 3))
    rl, rl_peer = interleave(runs["rl"], runs[peer], options.pairs)
    ours, theirs = interleave(runs["known"], runs[peer], options.pairs)
    chunk = chunk_rows(ROWS, VOCABULARY, case.hidden.device)
    memory = {name: memory_of(name, options.threads) for name in ("known", "rl", "any_loss", peer)}
    report_seconds(
        "log_prob_head",
        ours,
        theirs,
        goal=GOAL,
        fastest_peer=peer,
        rl=summary(rl, rl_peer),
        any_loss=summary(slow, slow_peer),
        memory_mb=memory
        | {
            "gradients": round((ROWS + VOCABULARY) * HIDDEN * 4 / 1e6, 1),
            "chunk": round(chunk * VOCABULARY * 4 / 1e6, 1),
            "all_logits": round(ROWS * VOCABULARY * 4 / 1e6, 1),
        },
        threads=options.threads,
    )


if __name__ == "__main__":
    main()
