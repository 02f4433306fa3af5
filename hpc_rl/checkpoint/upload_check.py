"""The rung of the preflight ladder for uploads: secrets named, tokens that may write, before anything queues.

Asked from where the run is submitted, over its network. That a compute node reaches the same hosts cannot
be known there; `status` says what became of each upload, and `hpc-rl upload` makes up for it.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial

from hpc_rl.checkpoint.hub import EXIT_REFUSED, TOKEN
from hpc_rl.checkpoint.s3 import KEYS, Location, S3Store, UploadError, missing_keys
from hpc_rl.cluster.findings import Finding, place
from hpc_rl.recipe.load import LoadedRecipe

HUB_LIMIT_S = 60.0


def secret_findings(loaded: LoadedRecipe) -> list[Finding]:
    """What an upload needs is named under cluster.secrets, and there is something to upload. No network."""
    recipe = loaded.recipe
    options, named = recipe.checkpoint, set(recipe.cluster.secrets)
    needs: dict[str, list[str]] = {}
    if options.upload_hub is not None:
        needs["upload_hub"] = [TOKEN]
    if options.upload_s3 is not None:
        needs["upload_s3"] = list(KEYS)
    findings = []
    for key, names in needs.items():
        if missing := [name for name in names if name not in named]:
            fix = f"add to cluster.secrets: [{', '.join(missing)}], and export them before submitting"
            message = f"{', '.join(missing)} not among cluster.secrets, so the job could not upload"
            findings.append(Finding("error", place(loaded, "checkpoint", key), message, fix))
    if options.upload_hub is not None and options.export == "off":
        where = place(loaded, "checkpoint", "upload_hub")
        findings.append(
            Finding("error", where, "there is no export to upload", "set checkpoint.export: final")
        )
    return findings


def access_findings(loaded: LoadedRecipe, environ: Mapping[str, str]) -> list[Finding]:
    """Really asks: who the token's owner is and whether it may write; writes and removes a tiny object.

    A refusal is an error; a network that is not there a warning. Nothing where secrets are missing
    (`secret_findings` says so).
    """
    hub, s3 = loaded.recipe.checkpoint.upload_hub, loaded.recipe.checkpoint.upload_s3
    findings = []
    if hub is not None and environ.get(TOKEN):
        findings.append(
            _asked(
                place(loaded, "checkpoint", "upload_hub"), partial(_ask_hub, hub.repo, hub.private, environ)
            )
        )
    if s3 is not None and not missing_keys(environ):
        location = Location(s3.bucket, s3.prefix.strip("/"))
        where = place(loaded, "checkpoint", "upload_s3")
        findings.append(_asked(where, partial(_ask_s3, location, environ)))
    return findings


def _asked(where: str, ask: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", where, ask())
    except UploadError as error:
        if error.permanent:
            return Finding("error", where, str(error))
        fix = "the upload is tried in the job; hpc-rl upload makes up for it from where there is a network"
        return Finding("warning", where, str(error), fix)


def _ask_hub(repo: str, private: bool, environ: Mapping[str, str]) -> str:
    """In a process of its own: the Hub's library, imported before to look at data offline, stays offline."""
    command = [sys.executable, "-m", "hpc_rl.checkpoint.hub", repo, "private" if private else "public"]
    online = {name: value for name, value in environ.items() if name != "HF_HUB_OFFLINE"}
    try:
        done = subprocess.run(
            command, env=online, capture_output=True, text=True, timeout=HUB_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UploadError(f"the Hub did not answer within {HUB_LIMIT_S:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return f"{TOKEN} may write to {lines[-1]}"
    said = lines[-1] if lines else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise UploadError(said, permanent=done.returncode == EXIT_REFUSED)


def _ask_s3(location: Location, environ: Mapping[str, str]) -> str:
    S3Store(location, environ, tries=2).prove_access(f".hpc-rl-check-{secrets.token_hex(4)}")
    return f"{location} is writable"
