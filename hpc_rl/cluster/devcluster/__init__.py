"""A private real Slurm on this machine, for tests and for trying a recipe before it is queued anywhere.

`DevCluster(dir, spec)` starts munged, slurmctld and one slurmd per fake node (optionally slurmdbd and
MariaDB) under one folder, as root or as a normal user, beside any installed Slurm and without touching it.
"""

from hpc_rl.cluster.devcluster.cluster import DevCluster, Status, default_dir
from hpc_rl.cluster.devcluster.errors import DevClusterError, MissingPackages
from hpc_rl.cluster.devcluster.packages import missing_packages
from hpc_rl.cluster.devcluster.spec import PartitionSpec, ProfileSpec, default_spec, parse_partition, spec_of

__all__ = [
    "DevCluster",
    "DevClusterError",
    "MissingPackages",
    "PartitionSpec",
    "ProfileSpec",
    "Status",
    "default_dir",
    "default_spec",
    "missing_packages",
    "parse_partition",
    "spec_of",
]
