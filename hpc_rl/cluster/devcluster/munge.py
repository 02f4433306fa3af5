"""munged: the credentials of this devcluster alone, beside any installed munge."""

from __future__ import annotations

from collections.abc import Mapping

from hpc_rl.cluster.devcluster.config import Layout


def munged(programs: Mapping[str, str], layout: Layout) -> list[str]:
    """`--force`: munged objects to sockets in folders that are private to a user, which is what is wanted."""
    run = layout.root / "run"
    return [
        programs["munged"],
        "--foreground",
        "--force",
        f"--socket={layout.munge_socket}",
        f"--key-file={layout.munge_key}",
        f"--pid-file={run / 'munged.pid'}",
        f"--log-file={layout.logs / 'munged.log'}",
        f"--seed-file={layout.munge_key.parent / 'seed'}",
        "--num-threads=2",
    ]
