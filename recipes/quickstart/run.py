"""`make quickstart`: a tiny model learns to sort digits, by SFT first and then by GRPO, on two cores.

It does what a user would do by hand, with the same commands: make the model and the data, `hpc-rl submit` the
SFT recipe, submit the GRPO recipe on the weights that came out, and look at the held-out accuracy. Where
Slurm's daemons are installed the jobs run on a private real Slurm (`hpc-rl devcluster`), otherwise with
`placement: local`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from hpc_rl.cluster.devcluster.cluster import DevCluster
from hpc_rl.cluster.devcluster.errors import DevClusterError
from hpc_rl.telemetry.curve import curve
from hpc_rl.telemetry.metrics import read_metrics, series

HERE = Path(__file__).resolve().parent
BEFORE, AFTER = 0.4, 0.8  # held-out greedy accuracy: below this before RL, above that after it


def say(text: str) -> None:
    print(f"quickstart: {text}", flush=True)


def hpc_rl(*arguments: str | Path, env: dict[str, str], capture: bool = False) -> str:
    """Run the command line that `make setup` installed; ends the quickstart when it fails."""
    command = [str(Path(sys.executable).with_name("hpc-rl")), *map(str, arguments)]
    say("$ hpc-rl " + " ".join(command[1:]))
    done = subprocess.run(command, env={**os.environ, **env}, text=True, check=False,
                          stdout=subprocess.PIPE if capture else None)  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"quickstart: hpc-rl {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout or ""


def submit_and_follow(recipe: Path, overrides: list[str], placement: list[str], env: dict[str, str]) -> Path:
    """Submit, follow to the end, and give the run directory."""
    started = time.monotonic()
    answer = json.loads(hpc_rl("submit", recipe, *overrides, *placement, "--json", env=env, capture=True))
    run_dir = Path(answer["run_dir"])
    say(f"run directory {run_dir}, job {answer.get('job_id') or 'local'}")
    hpc_rl("logs", run_dir, "--follow", "--role", "controller", env=env)
    status = json.loads(hpc_rl("status", run_dir, "--json", env=env, capture=True))
    if status["state"] != "COMPLETED":
        sys.exit(f"quickstart: the run ended as {status['state']}: {status['first_cause']}")
    say(f"{recipe.stem} done in {time.monotonic() - started:.0f} s")
    return run_dir


def learn(folder: Path, placement: list[str], env: dict[str, str]) -> bool:
    """Model, SFT, GRPO; True when the accuracy rose as promised."""
    data = folder / "task"
    subprocess.run([sys.executable, str(HERE / "make_model.py"), str(data)], check=True)
    paths = [f"output_root={folder / 'runs'}", f"model.path={data / 'model'}"]
    sft = submit_and_follow(
        HERE / "sft.yaml", [*paths, f"data.train.path={data / 'train_sft.jsonl'}"], placement, env
    )
    paths[1] = f"model.path={sft / 'safetensors' / 'final'}"
    files = [f"data.train.path={data / 'train.jsonl'}", f"data.eval.path={data / 'eval.jsonl'}"]
    run = submit_and_follow(HERE / "grpo.yaml", [*paths, *files], placement, env)
    points = series(read_metrics(run / "metrics.jsonl"), "eval/accuracy")
    print(curve(points, title="held-out greedy accuracy (eval/accuracy) by GRPO step"))
    before, after = points[0][1], points[-1][1]
    good = before < BEFORE and after > AFTER
    say(f"accuracy {before:.3f} before GRPO (should be < {BEFORE}), {after:.3f} after (should be > {AFTER})")
    say(f"report: {run / 'report.html'}   weights: {run / 'safetensors' / 'final'}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs") / "quickstart", help="where everything goes"
    )
    parser.add_argument("--placement", choices=["auto", "het", "local"], default="auto")
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = arguments.folder.absolute() / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    cluster = None
    if arguments.placement != "local":
        try:
            cluster = DevCluster(Path("/tmp") / f"hpc-rl-qs-{os.getpid()}").up()
        except DevClusterError as error:
            if arguments.placement == "het":
                sys.exit(f"quickstart: {error}")
            say(f"no devcluster here ({error}); using placement local")
    try:
        if cluster is not None:
            say(f"a private Slurm is up in {cluster.root}: placement het, watch it with")
            say(f"  SLURM_CONF={cluster.env['SLURM_CONF']} squeue -o '%i %j %T %M %k'")
            options = ["cluster.placement=het", "--site", str(cluster.site_profile)]
            good = learn(folder, options, cluster.env)
        else:
            say("placement local: supervisor and roles are processes of this machine")
            good = learn(folder, ["cluster.placement=local", "--site", "local"], {})
    finally:
        if cluster is not None:
            cluster.down()
    say(f"{'it learned' if good else 'IT DID NOT LEARN'} in {time.monotonic() - started:.0f} s")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
