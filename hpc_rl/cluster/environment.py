"""Which variables go where: into sbatch (an allow-list, no secret), and into the processes of a role.

Secrets never travel in an environment that Slurm stores or shows: a role loads them from the run's
0600 file inside its own process.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.schema import Recipe


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names are words joined by "_": TOKENIZERS_PARALLELISM is no secret, HF_TOKEN is one.
_SECRET_WORDS = _words(
    "TOKEN TOKENS SECRET SECRETS PASSWORD PASSWD PASSPHRASE CREDENTIAL CREDENTIALS APIKEY PAT AUTH"
)
_SECRET_ENDINGS = ("API_KEY", "ACCESS_KEY", "ACCESS_KEY_ID", "PRIVATE_KEY", "SECRET_KEY", "ACCOUNT_KEY")
_CREDENTIALS_IN_URL = re.compile(r"://[^/@\s]*@")

# What a job may take along from the shell that submits. Anything else goes into `cluster.variables`.
_SUBMIT_NAMES = _words(
    """
    PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TERM PYTHONPATH VIRTUAL_ENV LD_LIBRARY_PATH CUDA_HOME
    CUDA_PATH ROCM_PATH BASH_ENV MANPATH MODULEPATH MODULEPATH_ROOT MODULESHOME MODULES_CMD LOADEDMODULES
    _LMFILES_ KRB5CCNAME SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE http_proxy https_proxy
    HTTP_PROXY HTTPS_PROXY no_proxy NO_PROXY all_proxy ALL_PROXY HF_HOME HF_ENDPOINT HF_HUB_CACHE
    HF_DATASETS_CACHE SLURM_CONF SLURM_CLUSTERS
    """
)
_SUBMIT_PREFIXES = _words(
    "LC_ CONDA_ LMOD_ __LMOD_ _ModuleTable BASH_FUNC_ SPACK_ NCCL_ UCX_ FI_ OMP_ MKL_ TORCH_ VLLM_ WANDB_"
)
# What srun needs to find the job. The rest of SLURM_* are defaults for srun's options, and they differ
# between versions: steps give every option themselves.
_STEP_SLURM = _words(
    """
    SLURM_CONF SLURM_JOB_ID SLURM_JOBID SLURM_HET_SIZE SLURM_CLUSTERS SLURM_CLUSTER_NAME
    SLURM_WORKING_CLUSTER SLURM_STEPMGR SLURM_RESTART_COUNT
    """
)
_SLURM_PREFIXES = _words("SLURM_ SRUN_ SBATCH_ SALLOC_ SLURMD_ SLURMSTEPD_ SUBMITIT_ PMI_ PMIX_")
# An image brings its own; the host's break it.
_HOST_ONLY = _words("LD_LIBRARY_PATH LD_PRELOAD CUDA_HOME CUDA_PATH PYTHONPATH PYTHONHOME VIRTUAL_ENV")

_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "VLLM_CACHE_ROOT": "vllm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
    "NUMBA_CACHE_DIR": "numba",
}


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret by convention (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`)."""
    upper = name.upper()
    return upper.endswith(_SECRET_ENDINGS) or not _SECRET_WORDS.isdisjoint(upper.split("_"))


def submission_environment(environ: Mapping[str, str], secrets: Collection[str] = ()) -> dict[str, str]:
    """The environment for sbatch, which `--export=ALL` makes the job's: an allow-list of `environ`.

    No `SBATCH_*` (they would override the script in every component), no `SLURM_*` of an outer job, no
    variable that is named in `secrets`, is called like a secret or carries the value of one.
    """
    hidden = _secret_values(environ, secrets)
    return {
        name: value
        for name, value in environ.items()
        if (name in _SUBMIT_NAMES or name.startswith(tuple(_SUBMIT_PREFIXES)))
        and not is_secret_name(name)
        and name not in secrets
        and not _CREDENTIALS_IN_URL.search(value)
        and not any(secret in value for secret in hidden)
    }


def step_environment(
    environ: Mapping[str, str],
    variables: Mapping[str, str],
    *,
    secrets: Collection[str] = (),
    runtime: str = "none",
) -> dict[str, str]:
    """The environment of one role step (or local role process): `environ` cleaned, with `variables` set.

    srun's own input variables are dropped, since every option is on its command line; so are secrets, and
    for a container (`runtime` pyxis or apptainer) the host's library and Python paths.
    """
    dropped = set(secrets) | (_HOST_ONLY if runtime != "none" else set())
    kept = {
        name: value
        for name, value in environ.items()
        if name not in dropped
        and not is_secret_name(name)
        and (name in _STEP_SLURM or not name.startswith(tuple(_SLURM_PREFIXES)))
    }
    kept.update(variables)
    if runtime == "apptainer":
        # An image's own environment wins over the host's unless it is said this way.
        kept.update({f"APPTAINERENV_{name}": value for name, value in variables.items()})
    return kept


def role_environment(plan: Plan, site: Site, recipe: Recipe, role: str) -> dict[str, str]:
    """The variables of a role's processes: caches on node-local disk, the Hub offline, the network, yours.

    Later wins: ours, `site.variables`, `cluster.variables`, the role's own `variables`.
    Raises ValueError if a secret is written among the variables.
    """
    group = plan.group(role)
    cache = cache_root(site)
    variables = {name: str(cache / folder) for name, folder in _CACHES.items()}
    variables |= {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if site.paths.hf_home:
        variables["HF_HOME"] = os.path.expandvars(site.paths.hf_home)
    if site.network.interface:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
            variables[name] = site.network.interface
    if plan.placement != "local":
        # Without it every rank starts as many threads as the node has cores.
        variables["OMP_NUM_THREADS"] = str(group.cpus_per_task)
    chosen = {**site.variables, **recipe.cluster.variables, **group.variables}
    for name in chosen:
        if name in recipe.cluster.secrets or is_secret_name(name):
            raise ValueError(
                f"variables must not hold the secret {name}: it would be written into the run directory; "
                f"name it in `cluster.secrets: [{name}]` and set it in the shell that submits"
            )
    return {**variables, **chosen}


def cache_root(site: Site) -> Path:
    """Where compile caches lie on each node: shared by this user's runs, on local disk."""
    return Path(os.path.expandvars(site.paths.local)) / f"hpc-rl-{os.getuid()}" / "cache"


def make_cache_folders(environ: Mapping[str, str]) -> None:
    """Make the cache folders that `role_environment` named, on this node, private to this user.

    Triton and Inductor load code from there, and local disk is often /tmp: a folder that another user
    made is an error (PermissionError), not a cache.
    """
    for name, last in _CACHES.items():
        value = environ.get(name)
        if not value or Path(value).name != last or not Path(value).parent.parent.name.startswith("hpc-rl-"):
            continue  # the user chose a place of his own
        folder = Path(value)
        for part in (folder.parent.parent, folder.parent, folder):
            part.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir(mode=0o700, exist_ok=True)
            _check_own(part)


def _check_own(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"{folder} is not a folder that only you can write (owner {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):04o}); remove it or set another `paths.local` in the site profile"
        )


def _secret_values(environ: Mapping[str, str], secrets: Collection[str]) -> list[str]:
    """The values to keep out wherever they stand; short ones would match by accident."""
    return [v for n, v in environ.items() if (n in secrets or is_secret_name(n)) and len(v) >= 8]
