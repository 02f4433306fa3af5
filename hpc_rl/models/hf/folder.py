"""The folder of a Hugging Face model: where it is, its config, its tokenizer, its safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open

from hpc_rl.models.base import ModelError
from hpc_rl.recipe.schema import Model

_ENDS = 1 << 20  # bytes


def model_folder(path: str, revision: str | None = None) -> Path:
    """`path` itself if it is a folder, else the Hub snapshot in the local cache. Nothing is downloaded."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model {path!r} is neither a folder nor in the local Hub cache; "
            "run `hpc-rl fetch` on a node with internet"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises ModelError when there is none."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json")
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except ValueError as error:
        raise ModelError(f"{folder}/config.json: {error}") from error


def load_config(folder: Path, spec: Model) -> Any:
    """The transformers config of `folder`: of Transformers' own class if it has one for the model type,
    else of the folder's if the recipe allows it. Raises ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    native = read_config(folder).get("model_type") in CONFIG_MAPPING
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code and not native)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{folder}/config.json: {error}") from error


def load_tokenizer(spec: Model) -> Any:
    """The tokenizer of the recipe (`model.tokenizer`, else the model's own)."""
    from transformers import AutoTokenizer

    own = spec.tokenizer is None
    folder = model_folder(spec.path if own else str(spec.tokenizer), spec.revision if own else None)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer in {folder}: {str(error).splitlines()[0]}") from error


def load_processor(spec: Model) -> Any:
    """The processor for images of the model's folder; None for a model of text alone."""
    from transformers import AutoProcessor

    folder = model_folder(spec.path, spec.revision)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"no processor in {folder}: {str(error).splitlines()[0]}") from error


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name in file -> file, for all safetensors of `folder` (from the headers).

    Raises ModelError if there are none, with what to do about other formats.
    """
    names: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.update(dict.fromkeys(file.keys(), path))
    if not names:
        raise ModelError(
            f"{folder} has no *.safetensors; convert it once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return names


def fingerprint(folder: Path) -> bytes:
    """Sixteen bytes of a hash over the safetensors of `folder`: names, sizes, and the bytes at both ends
    (the beginning holds the header). Cheap, and other weights under the same names hardly pass."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.digest()
