"""`hpc-rl fetch RECIPE`: model, tokenizer and data into the site's cache, because jobs run offline.

Access and free space are looked at for everything before the first byte is downloaded. What is
fetched is pinned: the commit of every repository is returned, to be written into the recipe.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_rl.catalog.local_models import find_snapshot, hub_cache, is_local
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.plugins import plugin_source
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.recipe.yaml_source import KeyPath, dotted

# Weights in other formats than safetensors are not fetched where safetensors are there.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "onnx/*", "original/*")
_DATA_FILES = (".json", ".jsonl", ".parquet", ".arrow", ".csv")
_MARGIN = 1.1  # free space wanted, relative to what is downloaded


class FetchError(ValueError):
    """Something cannot be fetched; `problems` has one line for each thing: which and why."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class _NoHubError(FetchError):
    """The Hub did not answer: the other repositories need not be asked."""

    def __init__(self, repository: Repository, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{repository.at}: the Hugging Face Hub cannot be reached for {repository.name} ({reason}); "
            "run this on a node with internet, or set HF_ENDPOINT to your mirror"
        )


@dataclass(frozen=True)
class Repository:
    """One thing to fetch. `key` is the recipe's key that names it, `where` the file and line."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None
    key: str
    where: str

    @property
    def at(self) -> str:
        return f"{self.where}: {self.key}"


@dataclass(frozen=True)
class Fetched:
    """Where it is now; `commit` is null for a local path."""

    key: str
    name: str
    commit: str | None
    folder: Path
    was_here: bool


@dataclass(frozen=True)
class _Remote:
    repository: Repository
    commit: str
    files: list[str]
    nbytes: int


def fetch(
    loaded: LoadedRecipe, site: Site, *, say: Callable[[str], None] = lambda _: None, api: Any = None
) -> list[Fetched]:
    """Download what `loaded` names and is not here yet. Raises FetchError.

    `say` gets one line per step; `api` is a `huggingface_hub.HfApi` (made here when null).
    """
    done: list[Fetched] = []
    wanted: list[Repository] = []
    problems: list[str] = []
    for repository in repositories(loaded):
        try:
            found = _present(repository, site)
        except FetchError as error:
            problems += error.problems
            continue
        if found is not None:
            say(f"{repository.key}: {repository.name} is here: {found.folder}")
            done.append(found)
        else:
            wanted.append(repository)
    remotes, refused = _look_at_all(api, wanted)
    problems += refused
    if problems:
        raise FetchError(*problems)
    cache = hub_cache(site.paths.hf_home)
    _check_space(cache, sum(remote.nbytes for remote in remotes))
    for remote in remotes:
        repository = remote.repository
        size = f"{remote.nbytes / 2**30:.2f} GiB"
        say(f"{repository.key}: fetching {repository.name} at {remote.commit[:12]}, {size}")
        folder = _download(remote, cache)
        if repository.kind == "dataset":
            _prepare_dataset(loaded, repository, site)
        done.append(Fetched(repository.key, repository.name, remote.commit, folder, was_here=False))
    return done


def repositories(loaded: LoadedRecipe) -> list[Repository]:
    """What the recipe names, each once; local paths included."""
    model, data = loaded.recipe.model, loaded.recipe.data
    found = [Repository("model", model.path, model.revision, "model.path", loaded.where("model", "path"))]
    if model.tokenizer is not None and model.tokenizer != model.path:
        where = loaded.where("model", "tokenizer")
        found.append(Repository("model", model.tokenizer, None, "model.tokenizer", where))
    reference = loaded.recipe.policy.reference
    if reference.path is not None and reference.path != model.path:
        where = loaded.where("policy", "reference", "path")
        found.append(Repository("model", reference.path, reference.revision, "policy.reference.path", where))
    for name, revision, path in _served(loaded):
        if (name, revision) not in [(r.name, r.revision) for r in found]:
            found.append(Repository("model", name, revision, dotted(path), loaded.where(*path)))
    for key, spec in (("data.train.path", data.train), ("data.eval.path", data.eval)):
        if spec is None:
            continue
        source = plugin_source(spec.path)
        name = spec.path if source is None else source[1]  # a plugin may name a data set of the Hub
        if name and (name, spec.revision) not in [(r.name, r.revision) for r in found]:
            found.append(Repository("dataset", name, spec.revision, key, loaded.where(*key.split("."))))
    return found


def _served(loaded: LoadedRecipe) -> Iterator[tuple[str, str | None, KeyPath]]:
    """Of the models that the groups `reward` and `teacher` serve: name, revision, key."""
    for index, item in enumerate(loaded.recipe.reward):
        if item["name"] == "model":
            yield item["path"], item["revision"], ("reward", index, "path")
            if item["tokenizer"] is not None:
                yield item["tokenizer"], None, ("reward", index, "tokenizer")
    if loaded.recipe.teacher is not None:
        yield loaded.recipe.teacher.path, loaded.recipe.teacher.revision, ("teacher", "path")


def _present(repository: Repository, site: Site) -> Fetched | None:
    if is_local(repository.name) or repository.name.count("/") > 1:
        folder = Path(repository.name).expanduser()
        if not folder.exists():
            raise FetchError(f"{repository.at}: {repository.name} is a local path and does not exist")
        return Fetched(repository.key, repository.name, None, folder, was_here=True)
    snapshot = find_snapshot(repository.name, repository.revision, site.paths.hf_home, f"{repository.kind}s")
    if snapshot is None or not _complete(snapshot):
        return None
    return Fetched(repository.key, repository.name, snapshot.name, snapshot, was_here=True)


def _complete(snapshot: Path) -> bool:
    """A download that was broken off leaves links without their files, or no marker-worthy file at all."""
    files = [path for path in snapshot.rglob("*") if not path.is_dir()]
    return bool(files) and all(path.exists() for path in files)


def _look_at_all(api: Any, wanted: list[Repository]) -> tuple[list[_Remote], list[str]]:
    """Everything that is to be fetched, and one line for each thing that cannot be."""
    remotes: list[_Remote] = []
    problems: list[str] = []
    if wanted and api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    for number, repository in enumerate(wanted):
        try:
            remotes.append(_look(api, repository))
        except _NoHubError as error:  # each further question would wait for its own timeouts
            problems += [str(_NoHubError(other, error.reason)) for other in wanted[number:]]
            break
        except FetchError as error:
            problems += error.problems
    return remotes, problems


def _look(api: Any, repository: Repository) -> _Remote:
    """Commit, files and size of a repository; this is also where missing access shows."""
    from huggingface_hub import errors

    call = api.model_info if repository.kind == "model" else api.dataset_info
    name = repository.name
    try:
        info = call(name, revision=repository.revision, files_metadata=True)
        gated = getattr(info, "gated", False)
        if gated:
            api.auth_check(name, repo_type=repository.kind)
    except errors.GatedRepoError as error:
        raise FetchError(
            f"{repository.at}: {name} is gated and your account has no access; accept its terms on the "
            "Hub's page, then log in here (hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FetchError(f"{repository.at}: {name} has no revision {repository.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"{repository.at}: no {repository.kind} {name!r} on the Hub, or it is private and you are not "
            "logged in (hf auth login)"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise _no_hub(repository, error) from error
    except Exception as error:
        # huggingface_hub passes its HTTP library's connection errors on; which library depends on its version
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise _no_hub(repository, error) from error
    siblings = info.siblings or []
    files = [sibling.rfilename for sibling in siblings]
    chosen = set(_chosen(files, repository.kind))
    nbytes = sum(sibling.size or 0 for sibling in siblings if sibling.rfilename in chosen)
    return _Remote(repository, info.sha, sorted(chosen), nbytes)


def _no_hub(repository: Repository, error: Exception) -> _NoHubError:
    return _NoHubError(repository, (str(error).strip().splitlines() or [type(error).__name__])[0])


def _chosen(files: list[str], kind: str) -> list[str]:
    """The files to download: all, but no second copy of the weights in another format."""
    from fnmatch import fnmatch

    if kind == "model" and any(name.endswith(".safetensors") for name in files):
        return [name for name in files if not any(fnmatch(name, pattern) for pattern in _OTHER_WEIGHTS)]
    return files


def _check_space(cache: Path, nbytes: int) -> None:
    folder = cache
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes * _MARGIN:
        raise FetchError(
            f"{cache} has {free / 2**30:.1f} GiB free, but {nbytes / 2**30:.1f} GiB are to be fetched; "
            "free some space, or set paths.hf_home of the site to a larger filesystem"
        )


def _download(remote: _Remote, cache: Path) -> Path:
    from huggingface_hub import snapshot_download

    repository = remote.repository
    try:
        folder = snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision or "main",
            cache_dir=cache,
            allow_patterns=remote.files,
        )
    except OSError as error:
        raise _no_hub(repository, error) from error
    return Path(folder)


def _prepare_dataset(loaded: LoadedRecipe, repository: Repository, site: Site) -> None:
    """Let `datasets` build its own cache now: offline it finds only what it has prepared itself."""
    from hpc_rl.recipe.schema import DatasetSpec as Spec

    data = loaded.recipe.data
    specs: list[Spec] = [spec for spec in (data.train, data.eval) if spec is not None]
    for spec in specs:
        if spec.path == repository.name and spec.revision == repository.revision:
            _build(spec, site)


def _build(spec: DatasetSpec, site: Site) -> None:
    import importlib

    datasets = importlib.import_module("datasets")
    cache = None if site.paths.hf_home is None else str(Path(site.paths.hf_home).expanduser() / "datasets")
    try:
        datasets.load_dataset(
            spec.path, spec.subset, split=spec.split, revision=spec.revision, cache_dir=cache
        )
    except (ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(f"data set {spec.path} was fetched but cannot be opened: {reason}") from error
