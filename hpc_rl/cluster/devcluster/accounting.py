"""Commands for a private MariaDB on a socket, and what slurmdbd must know before slurmctld starts."""

from __future__ import annotations

from collections.abc import Mapping

from hpc_rl.cluster.devcluster.config import CLUSTER_NAME, Layout
from hpc_rl.cluster.devcluster.spec import ProfileSpec


def install_db(programs: Mapping[str, str], layout: Layout) -> list[str]:
    """Make the system tables. `normal` authentication gives its root an empty password: the socket
    lies in a 0700 folder and there is no TCP port."""
    return [
        programs["mariadb-install-db"],
        "--no-defaults",
        f"--datadir={layout.mysql_data}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
        "--skip-name-resolve",
        f"--user={layout.user}",
        *_QUICK,
    ]


# Durability is of no use to a database that lives for one test session.
_QUICK = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--innodb-doublewrite=0",
    "--innodb-log-file-size=8M",
    "--innodb-buffer-pool-size=32M",
    "--skip-log-bin",
)


def mariadbd(programs: Mapping[str, str], layout: Layout) -> list[str]:
    return [
        programs["mariadbd"],
        "--no-defaults",
        f"--user={layout.user}",
        f"--datadir={layout.mysql_data}",
        f"--socket={layout.mysql_socket}",
        f"--pid-file={layout.root / 'run' / 'mariadbd.pid'}",
        "--skip-networking",
        "--performance-schema=OFF",
        *_QUICK,
    ]


def ping(programs: Mapping[str, str], layout: Layout) -> list[str]:
    return [
        programs["mariadb-admin"],
        "--no-defaults",
        f"--socket={layout.mysql_socket}",
        "--user=root",
        "ping",
    ]


def registrations(programs: Mapping[str, str], layout: Layout, spec: ProfileSpec) -> list[list[str]]:
    """sacctmgr commands: the cluster (slurmctld refuses to start without), then accounts, QOS, the user."""
    sacctmgr = [programs["sacctmgr"], "--immediate", "--quiet", "add"]
    commands = [[*sacctmgr, "cluster", CLUSTER_NAME]]
    if spec.qos:
        commands.append([*sacctmgr, "qos", ",".join(spec.qos)])
    accounts = spec.accounts or (("default",) if spec.qos else ())
    if accounts:
        qos = [f"qos={','.join(('normal', *spec.qos))}"]
        commands.append([*sacctmgr, "account", ",".join(accounts), f"cluster={CLUSTER_NAME}", *qos])
        # root has an association from the start, under the account of the same name.
        commands.append([*sacctmgr, "user", layout.user, f"account={','.join(accounts)}", *qos])
    return commands
