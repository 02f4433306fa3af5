"""`recipes/gsm8k-grpo.yaml` on a tiny model: real Slurm, real vLLM; SFT first, then GRPO on its weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import Run

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "recipes" / "gsm8k-tiny"
DATA = ROOT / "tests" / "assets" / "gsm8k"


def run_gsm8k(devcluster, folder: Path, *, sft: tuple[str, ...] = (), grpo: tuple[str, ...] = ()) -> Run:  # type: ignore[no-untyped-def]
    """The finished GRPO run. `sft` and `grpo` are further overrides of the two recipes."""
    make = [sys.executable, str(TINY / "make_model.py"), str(folder / "tiny"), "--data", str(DATA)]
    subprocess.run(make, check=True, capture_output=True, timeout=300)
    site = ("--site", str(devcluster.site_profile))
    env = dict(devcluster.env)
    where = (f"output_root={folder / 'runs'}", "cluster.placement=het", "cluster.time=00:59:00")
    train = f"data.train.path={DATA / 'train.jsonl'}"
    model = f"model.path={folder / 'tiny' / 'model'}"
    first = Run.submit(TINY / "sft.yaml", model, train, *where, *sft, *site, env=env)
    first.complete(1200)
    overrides = (TINY / "overrides.txt").read_text().split("\n")
    second = Run.submit(
        ROOT / "recipes" / "gsm8k-grpo.yaml",
        *[line for line in overrides if line],
        f"model.path={first.root / 'safetensors' / 'final'}",
        train,
        f"data.eval.path={DATA / 'test.jsonl'}",
        *where,
        *grpo,
        *site,
        env=env,
    )
    second.complete(2400)
    return second
