"""Which class a folder's model is of, and how its config is made ready: one place that decides.

Order: a model that a plugin registered; the class that config.json names, from Transformers; the folder's
own code (`auto_map`) if the recipe allows it; what Transformers' Auto classes choose, those with images
first. What comes first is taken: if it cannot be built, that is an error and never a reason to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hpc_rl.models.base import ModelError
from hpc_rl.models.hf import attention
from hpc_rl.models.hf.folder import load_config, read_config
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Model

LOG = logging.getLogger("hpc_rl.models")
_AUTO_VISION = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_AUTO_TEXT = ("AutoModelForCausalLM",)


def find_class(folder: Path, spec: Model) -> tuple[Any, Any, str]:
    """`(class, config, where the class is from)` of the model in `folder`.

    The class has `_from_config` (a `PreTrainedModel`) or `from_config` (an Auto class). Raises ModelError.
    """
    import transformers

    raw = read_config(folder)
    names = [*(raw.get("architectures") or []), raw.get("model_type")]
    for name in names:
        if name is not None and name in registry("models").names():
            return _registered(name, folder)
    config = load_config(folder, spec)
    for name in config.architectures or []:
        known = getattr(transformers, name, None)
        if known is not None and isinstance(config, known.config_class) and _has_head(known):
            return known, config, f"{name} of transformers"
    choices = [*(_AUTO_VISION if has_vision(config) else ()), *_AUTO_TEXT]
    remote = getattr(config, "auto_map", None) or {}
    if spec.trust_remote_code:
        for name in (*_AUTO_VISION, *_AUTO_TEXT):
            if name in remote:
                return getattr(transformers, name), config, f"{remote[name]} of the folder ({name})"
    for name in choices:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto, config, f"{auto._model_mapping[type(config)].__name__} by {name}"
    hint = "; its code is in the folder: set model.trust_remote_code to true to run it" if remote else ""
    raise ModelError(
        f"{folder} ({', '.join(config.architectures or []) or config.model_type}): Transformers has no "
        f"language model for model type {config.model_type!r}{hint}"
    )


def build_on_meta(folder: Path, spec: Model, *, plain: bool = False) -> tuple[Any, str]:
    """`(module on meta in fp32, where its class is from)`. Text attention is ours where the class takes it
    and the recipe names no other; with `plain` it is what Transformers would take. Raises ModelError."""
    cls, config, origin = find_class(folder, spec)
    _without_dropout(config)
    _warn_of_row_dependent_rotary(config)
    is_auto = not issubclass(cls, torch.nn.Module)
    final = cls._model_mapping[type(config)] if is_auto and type(config) in cls._model_mapping else cls
    implementation: Any = spec.attn_implementation
    ours = not plain and issubclass(final, torch.nn.Module) and final._supports_attention_backend
    if implementation is None and ours:
        # A vision tower must not get the layout of the text's row: only the text part has our attention.
        nested = config.get_text_config() is not config
        implementation = {"text_config": attention.NAME} if nested else attention.NAME
    options = {"dtype": torch.float32, "attn_implementation": implementation}
    try:
        with torch.device("meta"):
            if is_auto:
                return cls.from_config(config, trust_remote_code=spec.trust_remote_code, **options), origin
            return cls._from_config(config, **options), origin
    except (ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{folder} cannot be built as {origin}: {type(error).__name__}: {said}") from error


def has_vision(config: Any) -> bool:
    """Whether the model has a part that sees."""
    return "vision_config" in config.sub_configs


def _has_head(cls: Any) -> bool:
    """Not a bare backbone (`LlamaModel`), which architectures may name too."""
    return issubclass(cls, torch.nn.Module) and bool(cls.can_generate())


def _registered(name: str, folder: Path) -> tuple[Any, Any, str]:
    """A plugin's class takes precedence; if it fails, that is an error."""
    from transformers import PreTrainedModel

    reference = registry("models").member(name).implementation
    try:
        cls = registry("models").load(name)
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            raise TypeError(f"{reference} is not a transformers.PreTrainedModel class")
        config = cls.config_class.from_pretrained(folder)
    except Exception as error:
        raise ModelError(
            f"model {name!r} is registered as {reference}, which cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return cls, config, f"{reference} (registered as {name})"


def _configs(config: Any) -> Iterator[Any]:
    """The config and those of its parts."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _configs(part)


def _without_dropout(config: Any) -> None:
    """The sampler has no dropout, so the trainer's log-probs must have none."""
    for owner in {id(c): c for c in (*_configs(config), config.get_text_config())}.values():
        for key, value in owner.to_dict().items():
            if "drop" in key and isinstance(value, float) and value > 0:
                LOG.warning("%s %s set to 0 (config.json has %g)", owner.model_type, key, value)
                setattr(owner, key, 0.0)


def _warn_of_row_dependent_rotary(config: Any) -> None:
    """Some rotary embeddings scale by the longest sequence they are shown."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    # One set, or one for each kind of layer.
    sets = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    for one in sets:
        if one.get("rope_type") in ("longrope", "dynamic"):
            LOG.warning(
                "%s: rotary embeddings of type %s depend on the longest sequence of a row: keep every "
                "sequence at %d tokens or less, or its neighbours' log-probs change with it",
                config.model_type,
                one["rope_type"],
                one.get("original_max_position_embeddings") or text.max_position_embeddings,
            )
