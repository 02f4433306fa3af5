"""`hpc-rl devcluster`: a private real Slurm on this machine, to try a recipe before it is queued anywhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_DIR = typer.Option(
    None, "--dir", help="Folder of the devcluster; default: one per user in the temporary folder."
)
_JSON = typer.Option(False, "--json", help="Print one JSON object.")


@app.command("up")
def up(
    directory: Path | None = _DIR,
    policy: int = typer.Option(2, min=0, help="Fake nodes in partition policy."),
    rollout: int = typer.Option(2, min=0, help="Fake nodes in partition rollout."),
    cpu: int = typer.Option(1, min=0, help="Fake nodes in partition cpu."),
    gpus: int = typer.Option(4, min=0, help="Fake GPUs of each policy and rollout node."),
    partition: list[str] = typer.Option(
        [],
        "--partition",
        metavar="NAME:NODES[:GPUS]",
        help="Own partitions instead of those three; repeatable.",
    ),
    urgent: bool = typer.Option(False, "--urgent", help="Add a partition that preempts the others."),
    accounting: bool = typer.Option(False, "--accounting", help="Also run slurmdbd and MariaDB, for sacct."),
    as_json: bool = _JSON,
) -> None:
    """Start the devcluster and say how to use it. Works as root or as a normal user.

    \b
    Example:
      hpc-rl devcluster up
      hpc-rl devcluster up --policy 4 --rollout 8 --gpus 8 --accounting
      hpc-rl devcluster up --dir /tmp/two --partition gpu:8:8 --partition gpu-small:4:8 --partition cpu:1
    """
    from hpc_rl.cli._console import note
    from hpc_rl.cluster.devcluster import DevCluster, default_dir, default_spec, parse_partition, spec_of

    if partition:
        spec = spec_of([parse_partition(text) for text in partition], accounting=accounting, urgent=urgent)
    else:
        spec = default_spec(
            policy=policy, rollout=rollout, cpu=cpu, gpus=gpus, accounting=accounting, urgent=urgent
        )
    root = directory or default_dir()
    running = DevCluster(root)
    if running.status().state == "up" and running.spec == spec:
        note(f"already up in {running.root}")
        _say(running, as_json)
        return
    _say(DevCluster(root, spec).up(), as_json)


def _say(cluster: object, as_json: bool) -> None:
    from hpc_rl.cli._console import print_json
    from hpc_rl.cluster.devcluster import DevCluster

    assert isinstance(cluster, DevCluster)
    conf, gpu_profile = cluster.env["SLURM_CONF"], cluster.gpu_site_profile
    if as_json:
        print_json(
            {"dir": cluster.root, "slurm_conf": conf, "site": cluster.site_profile, "gpu_site": gpu_profile}
        )
        return
    shown = {part.name: len(cluster.spec.nodes_of(part)) for part in cluster.spec.partitions}
    typer.echo(f"devcluster up in {cluster.root}: nodes per partition {shown}")
    typer.echo(f"  export SLURM_CONF={conf}")
    typer.echo(f"  hpc-rl submit recipe.yaml --site {cluster.site_profile}")
    if gpu_profile is not None:
        typer.echo(f"  fake GPUs, for --dry-run and check: --site {gpu_profile}")
    typer.echo(f"  hpc-rl devcluster down --dir {cluster.root}")


@app.command("down")
def down(directory: Path | None = _DIR) -> None:
    """End the jobs and the daemons of the devcluster, and remove its folder.

    \b
    Example:
      hpc-rl devcluster down
    """
    from hpc_rl.cluster.devcluster import DevCluster, default_dir

    cluster = DevCluster(directory or default_dir())
    was = cluster.status().state
    cluster.down()
    typer.echo(
        f"no devcluster in {cluster.root}" if was == "none" else f"devcluster in {cluster.root} is gone"
    )


@app.command("status")
def status(directory: Path | None = _DIR, as_json: bool = _JSON) -> None:
    """Show the devcluster's daemons, nodes and jobs. Exit code 1 unless it is up.

    \b
    Example:
      hpc-rl devcluster status --json
    """
    from hpc_rl.cli._console import print_json, table
    from hpc_rl.cluster.devcluster import DevCluster, default_dir

    cluster = DevCluster(directory or default_dir())
    shown = cluster.status()
    if as_json:
        print_json({**asdict(shown), "slurm_conf": cluster.env["SLURM_CONF"], "site": cluster.site_profile})
    else:
        typer.echo(f"{shown.dir}: {shown.state}" + (f", {shown.jobs} jobs" if shown.nodes else ""))
        rows = [[name, "running" if alive else "gone"] for name, alive in shown.daemons.items()]
        rows += [[f"node {name}", state] for name, state in shown.nodes.items()]
        if rows:
            typer.echo(table(["daemon", "state"], rows))
    if shown.state != "up":
        raise typer.Exit(1)
