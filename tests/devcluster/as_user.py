"""Drives a devcluster as the user who runs this: up, a het job, GPU steps, requeue, scancel, down.

usage: as_user.py FOLDER. Prints one JSON object. Needs hpc_rl and this folder's modules on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from hetjob import HetJob

from hpc_rl.cluster.devcluster import DevCluster, default_spec

_STEPS = (
    "srun --het-group=1 --exact -n1 -c1 --gres=gpu:1 --mem=1G printenv CUDA_VISIBLE_DEVICES & "
    "srun --het-group=1 --exact -n1 -c1 --gres=gpu:1 --mem=1G printenv CUDA_VISIBLE_DEVICES & wait"
)


def main(folder: Path) -> dict[str, object]:
    cluster = DevCluster(folder / "dc", default_spec())
    begun = time.monotonic()
    with cluster:
        seconds = time.monotonic() - begun
        job = HetJob(cluster, folder / "job").submit(obedient=True).started()
        partitions = {e["who"]: e["env"]["SLURM_JOB_PARTITION"] for e in job.events("task", "start")}
        cluster.run("scontrol", "requeue", job.job_id)
        job.poke_after_requeue()
        job.started(attempt=2)
        restarts = job.show("Restarts")
        cluster.run("scancel", job.job_id)
        cancelled = job.ended()
        job.end_children()
        script = folder / "gpu.sbatch"
        script.write_text(
            "#!/bin/bash\n#SBATCH --partition=policy\n#SBATCH hetjob\n"
            f"#SBATCH --partition=rollout --ntasks=2 --gres=gpu:2 --mem=4G\n{_STEPS}\n"
        )
        out = folder / "gpu.out"
        cluster.run("sbatch", "--wait", f"--output={out}", str(script), cwd=folder, timeout_s=60)
        status = cluster.status()
    return {
        "uid": os.getuid(),
        "up_seconds": round(seconds, 2),
        "state": status.state,
        "partitions": partitions,
        "restarts": restarts,
        "cancelled": cancelled,
        "gpus": sorted(out.read_text().split()),
        "gone": not cluster.root.exists(),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
