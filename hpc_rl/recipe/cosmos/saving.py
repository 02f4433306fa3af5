"""Checkpoints, exports and uploads, where runs go and what they are called, W&B."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from hpc_rl.recipe.cosmos.draft import Draft

_CKPT = "train.ckpt"
_NO_NAMES = ("", ".", "..", "output", "outputs", "results", "runs")
_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


def translate_checkpoints(draft: Draft) -> None:
    if not draft.get(f"{_CKPT}.enable_checkpoint"):
        return _none_saved(draft)
    draft.put("checkpoint.enabled", True, f"{_CKPT}.enable_checkpoint")
    draft.put("checkpoint.save_every", draft.get(f"{_CKPT}.save_freq"), f"{_CKPT}.save_freq")
    draft.put("checkpoint.max_keep", draft.get(f"{_CKPT}.max_keep"), f"{_CKPT}.max_keep")
    draft.put("checkpoint.mode", draft.get(f"{_CKPT}.save_mode"), f"{_CKPT}.save_mode")
    every = draft.get(f"{_CKPT}.export_safetensors")
    note = (
        "every checkpoint is exported too; `final` saves room" if every else "the last one is always exported"
    )
    draft.put("checkpoint.export", "all" if every else "final", f"{_CKPT}.export_safetensors", note=note)
    epochs = draft.get(f"{_CKPT}.save_freq_in_epoch")
    if epochs > 0:
        why = (
            f"checkpoints are counted in steps; {epochs} epochs are {epochs} x rows / policy.batch_size steps"
        )
        draft.drop(
            f"{_CKPT}.save_freq_in_epoch", f"{why}: set checkpoint.save_every (it came before save_freq)"
        )
    _uploads(draft)


def _none_saved(draft: Draft) -> None:
    note = "cosmos-rl saves and exports nothing without it, so neither does this; remove both keys to save"
    for to, value in (("checkpoint.enabled", False), ("checkpoint.export", "off")):
        draft.put(to, value, f"{_CKPT}.enable_checkpoint", note=note)
    names = ("save_freq", "save_freq_in_epoch", "save_mode", "max_keep", "export_safetensors")
    for name in (*names, "upload_hf", "hf_repo_name", "upload_s3", "s3_bucket", "s3_prefix"):
        draft.drop(
            f"{_CKPT}.{name}", "checkpoints are off in this file (enable_checkpoint), so nothing was saved"
        )


def _uploads(draft: Draft) -> None:
    if draft.get(f"{_CKPT}.upload_hf"):
        keys = (f"{_CKPT}.hf_repo_name", f"{_CKPT}.upload_hf")
        repo = draft.get(keys[0])
        note = "private; a bare name is one of the token's owner"
        draft.put("checkpoint.upload_hub", {"repo": repo}, *keys, note=note)
        _secrets(draft, "HF_TOKEN")
    else:
        draft.same(f"{_CKPT}.upload_hf")
        draft.drop(f"{_CKPT}.hf_repo_name", "upload_hf is off")
    what, key = draft.get(f"{_CKPT}.upload_s3"), f"{_CKPT}.upload_s3"
    if what is False:
        draft.same(key)
        for name in ("s3_bucket", "s3_prefix"):
            draft.drop(f"{_CKPT}.{name}", "upload_s3 is off")
        return
    note = ""
    if what is True:
        what, note = (
            "final",
            "true is no value of cosmos-rl's own (false, final, all); the last ones are meant",
        )
    bucket = draft.get(f"{_CKPT}.s3_bucket")
    if bucket is None:
        return draft.bad(key, f"is {json.dumps(draft.get(key))}, and s3_bucket is missing")
    draft.put("checkpoint.upload_s3.bucket", bucket, f"{_CKPT}.s3_bucket")
    draft.put("checkpoint.upload_s3.prefix", draft.get(f"{_CKPT}.s3_prefix"), f"{_CKPT}.s3_prefix")
    draft.put("checkpoint.upload_s3.what", what, key, note=note)
    _secrets(draft, *_AWS)
    draft.notes.append("cluster.secrets: add AWS_ENDPOINT_URL where the bucket is not Amazon's")


def _secrets(draft: Draft, *names: str) -> None:
    before = draft.recipe.get("cluster", {}).get("secrets", [])
    draft.put("cluster.secrets", [*before, *(name for name in names if name not in before)])


def translate_resume(draft: Draft) -> None:
    value, key = draft.get("train.resume"), "train.resume"
    if value is True:
        draft.drop(key, "a run is continued with: hpc-rl resume RUN (after a requeue it resumes by itself)")
    elif value:
        draft.drop(
            key,
            "checkpoints of cosmos-rl are pickles of one world size and are not read; begin from its export: "
            "model.path=…/safetensors/step_N",
        )
    else:
        draft.same(key)


def translate_logging(draft: Draft) -> None:
    loggers = [name.lower() for name in draft.get("logging.logger")]
    online = "wandb" in loggers
    note = "becomes offline by itself without a route or a key" if online else ""
    draft.put("logging.wandb.mode", "online" if online else "off", "logging.logger", note=note)
    if online:
        draft.put("logging.wandb.project", draft.get("logging.project_name"), "logging.project_name")
        _secrets(draft, "WANDB_API_KEY")
    else:
        draft.drop("logging.project_name", "W&B is not among logging.logger")


def translate_names(draft: Draft, stem: str) -> None:
    """`name` and `output_root`: <output_dir>/<time> there, <output_root>/<name>/<run id> here."""
    wanted = draft.get("logging.experiment_name")
    wanted = "" if wanted in (None, "None") else wanted
    folder = draft.get("train.output_dir").rstrip("/")
    last = os.path.basename(folder)
    if _as_name(wanted):
        name, keys = _as_name(wanted), ["logging.experiment_name"]
        note = f"{wanted!r} as a name" if name != wanted else ""
    else:
        draft.same("logging.experiment_name", "nothing in particular")
        of_folder = draft.written("train.output_dir") and last not in _NO_NAMES and _as_name(last)
        name, keys, note = (
            (_as_name(last), ["train.output_dir"], "") if of_folder else (_as_name(stem), [], "")
        )
    draft.put("name", name or "from-cosmos-rl", *keys, note=note)
    if draft.written("train.output_dir"):
        root = os.path.dirname(folder) or "." if last == name else folder
        note = "runs go to <output_root>/<name>/<run id>"
        draft.put("output_root", root or "/", "train.output_dir", note=note)


def _as_name(text: str) -> str:
    """`text` with what a recipe's name must not have replaced, or "" if nothing is left."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-_.")[:64]


def stem_of(path: Path) -> str:
    return path.name.rsplit(".", 1)[0]
