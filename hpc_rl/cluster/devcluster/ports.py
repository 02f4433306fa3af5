"""Free TCP ports for the daemons, taken below the range the kernel hands out by itself."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from hpc_rl.cluster.devcluster.errors import DevClusterError

_LOWEST = 15_000


def free_ports(count: int) -> list[int]:
    """`count` distinct ports that nothing on this machine is bound to.

    They lie below `ip_local_port_range`, so that no outgoing connection takes one between this probe and the
    daemon's own bind. Two devclusters that start in the same instant could still draw the same port; the
    daemon's bind then fails and `up` says so.
    """
    first, last = _LOWEST, _first_ephemeral() - 1
    candidates = random.SystemRandom().sample(range(first, last), min(last - first, 20 * count + 200))
    ports: list[int] = []
    for port in candidates:
        if len(ports) == count:
            break
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
    if len(ports) < count:
        raise DevClusterError(f"found only {len(ports)} of {count} free ports between {first} and {last}")
    return ports


def _first_ephemeral() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        first = 32_768
    return first if first > _LOWEST + 2_000 else 32_768
