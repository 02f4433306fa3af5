"""Low-rank adapters (LoRA, 2106.09685) through PEFT, inside the sharded model.

PEFT puts its layers into the module on meta, before it is sharded, so FSDP shards adapters like all else.
What PEFT does not do for a sharded module is done here: names of the plain model for loading and for the
way out, an initialisation that is the same on any number of ranks, W + scale * B A without touching what
is trained, and the files of the adapter in PEFT's own format.
"""

from __future__ import annotations

import logging
import math
import re
import textwrap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_rl.models.base import ModelError
from hpc_rl.models.blocks import held_blocks
from hpc_rl.models.hf.adapter_names import (
    ADAPTER,
    is_factor,
    is_original,
    is_saved_whole,
    plain_name,
)
from hpc_rl.models.hf.freeze import near
from hpc_rl.recipe.schema import Lora

LOG = logging.getLogger("hpc_rl.models")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # of the names in an adapter file


def inject(module: Any, spec: Lora, base: str) -> None:
    """Put adapters into `module` (on meta, not sharded yet) and freeze the rest. `base` is the recipe's
    model path, for the adapter's config. Raises ModelError naming the key when the targets do not fit."""
    _check_names(spec, module)
    try:
        config = _config(spec, base, module)
        inject_adapter_in_model(config, module, ADAPTER)
    except ValueError as error:
        raise ModelError(f"model.lora: {textwrap.shorten(str(error), 300)}") from error
    if spec.adapter is None and set(config.target_parameters or []) != set(spec.target_parameters):
        named = ", ".join(sorted(set(config.target_parameters or []) - set(spec.target_parameters)))
        raise ModelError(
            f"model.lora.target_modules: PEFT takes some of them for experts in one tensor ({named}): name "
            "the layers of the attention there, and experts in model.lora.target_parameters"
        )
    for name, layer in _layers(module):
        if not isinstance(layer, ParamWrapper) and not isinstance(layer.get_base_layer(), nn.Linear):
            kind = type(layer.get_base_layer()).__name__
            raise ModelError(
                f"model.lora.target_modules: {name} is a {kind}; only linear layers can have adapters "
                "(experts in one tensor: model.lora.target_parameters)"
            )
    if spec.adapter is not None:
        _check_saved(module, Path(spec.adapter).expanduser())
    tied = {plain_name(name) for pair in module.all_tied_weights_keys.items() for name in pair}
    changed = {plain_name(name) for name, p in module.named_parameters() if p.requires_grad}
    changed |= set(Deltas(module).weights)
    if tied & changed:
        raise ModelError(
            f"model.lora: {', '.join(sorted(tied & changed))} is tied to another weight; "
            "take it out of target_modules and modules_to_save"
        )


def _check_names(spec: Lora, module: nn.Module) -> None:
    """Every name of the recipe is that of something (PEFT passes over those that are not). By PEFT's rules:
    a name is whole or the end of one; patterns are of whole names or the end."""
    if spec.adapter is not None:
        return  # its own names count, and its files are compared with what they make (`_check_saved`)
    modules = [name for name, _ in module.named_modules() if name]
    parameters = [name for name, _ in module.named_parameters()]
    fused = any(p.dim() == 3 and "experts" in name for name, p in module.named_parameters())
    targets = [] if spec.target_modules == "all-linear" else spec.target_modules
    for key, names, known in (
        ("target_modules", targets, modules),
        ("exclude_modules", spec.exclude_modules, modules),
        ("target_parameters", spec.target_parameters, parameters),
        ("modules_to_save", spec.modules_to_save, modules),
    ):
        for name in names:
            if not any(other == name or other.endswith(f".{name}") for other in known):
                hint = "; experts in one tensor: target_parameters" if fused and known is modules else ""
                raise ModelError(f"model.lora.{key}: {name!r} names nothing; {near(name, known)}{hint}")
    for key, patterns in (("r_pattern", spec.r_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for pattern in patterns:
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise ModelError(
                    f"model.lora.{key}: {pattern!r} is no regular expression: {error}"
                ) from error
            if not any(compiled.match(other) for other in modules + parameters):
                raise ModelError(f"model.lora.{key}: {pattern!r} names nothing; {near(pattern, modules)}")


def _check_saved(module: nn.Module, folder: Path) -> None:
    """The file of a saved adapter has every factor of `module`, in its shape. Reads the header only."""
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"model.lora.adapter: {folder} has no {WEIGHTS}")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for key, parameter in adapter_parameters(module).items():
        shape = list(parameter.shape)
        found = shapes.pop(key, None)
        if found != shape and (found is not None or ".lora_" in key):
            raise ModelError(f"model.lora.adapter: {key} of shape {shape} is not in {WEIGHTS}")
    if shapes:
        names = ", ".join(sorted(shapes)[:5])
        LOG.warning("%d tensors of %s are not used: %s", len(shapes), folder / WEIGHTS, names)


def _config(spec: Lora, base: str, module: Any) -> LoraConfig:
    if spec.adapter is not None:
        folder = Path(spec.adapter).expanduser()
        if not (folder / CONFIG).is_file():
            raise ModelError(f"model.lora.adapter: {folder} has no {CONFIG}")
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        config.lora_dropout = spec.dropout  # of the training, not of the adapter; the recipe says it
        return config
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # a fraction is as good
        lora_dropout=spec.dropout,
        target_modules=_all_linear(module) if spec.target_modules == "all-linear" else spec.target_modules,
        exclude_modules=spec.exclude_modules or None,
        target_parameters=spec.target_parameters or None,
        modules_to_save=spec.modules_to_save or None,
        use_rslora=spec.use_rslora,
        rank_pattern=dict(spec.r_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        base_model_name_or_path=base,
        # what AutoPeftModelForCausalLM.from_pretrained asks the adapter's folder for
        task_type="CAUSAL_LM" if type(module).__name__.endswith("ForCausalLM") else None,
    )


def _all_linear(module: Any) -> list[str]:
    """Every linear layer but the output head. (PEFT's own "all-linear" takes in experts as well, whose
    tensors of three dimensions are not linear layers any more.)"""
    head = module.get_output_embeddings()
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and part is not head]


# --- names -------------------------------------------------------------------------------------------
def plain_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of the adapted module under the plain model's names: no factors; of a module that is
    saved whole, the trained copy."""
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if is_factor(name) or is_original(name):
            continue
        plain[plain_name(name)] = value
    return plain


def _layers(module: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, LoraLayer))


# --- values --------------------------------------------------------------------------------------------
@torch.no_grad()
def initialise(module: nn.Module, spec: Lora, seed: int) -> None:
    """Give the materialised adapters their first values: A uniform as PEFT makes it, B zero, or those of
    `spec.adapter`. The values are a function of (seed, name): the same on any number of ranks.

    Modules that are saved whole begin with the loaded weights, so this comes after those.
    """
    saved = load_file(Path(spec.adapter).expanduser() / WEIGHTS) if spec.adapter is not None else None
    for name, parameter in module.named_parameters():
        if not is_factor(name):
            continue
        if saved is not None:
            full = saved[file_name(name)]
        elif ".lora_B." in name:
            full = torch.zeros(parameter.shape)
        else:
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
            full = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
        _fill(parameter, full)
    for name, wrapper in module.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            _copy_module(name, wrapper, saved)


def _copy_module(name: str, wrapper: ModulesToSaveWrapper, saved: dict[str, Tensor] | None) -> None:
    """The copy has been loaded (`plain_tensors`); the original gets its values, the copy the saved ones."""
    originals = dict(wrapper.original_module.named_parameters())
    for key, parameter in wrapper.modules_to_save[ADAPTER].named_parameters():
        _local(originals[key]).copy_(_local(parameter))
        if saved is not None and f"{_PREFIX}{name}.{key}" in saved:
            _fill(parameter, saved[f"{_PREFIX}{name}.{key}"])


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value.data


def _fill(parameter: Tensor, full: Tensor) -> None:
    local = _local(parameter)
    for block in held_blocks(parameter):
        local[block.of_local()].copy_(full[block.of_full()])


class Deltas:
    """What adapters add to weights, by the plain name of the weight: scale * B A."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = {_weight_of(name, layer): (name, layer) for name, layer in _layers(module)}

    def __contains__(self, name: str) -> bool:
        return name in self._layers

    @property
    def weights(self) -> list[str]:
        """The plain names of the adapted weights."""
        return list(self._layers)

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """`(A [r, in], B [out, r], scale)` of the weight `name` [out, in]; see `matrices` for experts."""
        a, b = self.names(name).values()
        return a, b, self.scale(name)

    def names(self, name: str) -> dict[str, Tensor]:
        """A and B of the weight `name`, by their names in memory."""
        path, layer = self._layers[name]
        return {
            f"{path}.lora_A.{ADAPTER}.weight": layer.lora_A[ADAPTER].weight,
            f"{path}.lora_B.{ADAPTER}.weight": layer.lora_B[ADAPTER].weight,
        }

    def scale(self, name: str) -> float:
        return float(self._layers[name][1].scaling[ADAPTER])

    def matrices(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors `a` and `b` (whole, plain tensors) of the weight `name` as those whose product b @ a
        has its shape. Only experts in one tensor need it: PEFT has theirs as A [experts * r, in] and
        B [out, r * experts], and the weight is [experts, out, in] or [experts, in, out]."""
        layer = self._layers[name][1]
        if not _of_experts(layer):
            return a, b
        a = a.reshape(layer.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
        # The layout is a fact of the class, which PEFT reads there, too; shapes may be square.
        if getattr(layer.get_base_layer(), "is_transposed", False):
            return b.transpose(1, 2), a.transpose(1, 2)
        return a, b


def _weight_of(name: str, layer: LoraLayer) -> str:
    own = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return f"{plain_name(name)}.{own}"


def _of_experts(layer: LoraLayer) -> bool:
    return isinstance(layer, ParamWrapper) and layer.get_param().dim() == 3


def has_experts(module: nn.Module) -> bool:
    """Whether experts in one tensor have adapters."""
    return any(_of_experts(layer) for _, layer in _layers(module))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, `module` computes without its adapters (modules saved whole stay as they are trained).

    By their scale, not by PEFT's `enable_adapters`: that also changes what has gradients, under FSDP's feet.
    """
    layers = [layer for _, layer in _layers(module)]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A in fp32, as PEFT's `merge_and_unload` computes it; of experts, all in one."""
    return weight.float() + (b.float() @ a.float()) * scale


# --- the adapter's own files -----------------------------------------------------------------------------
def file_name(name: str) -> str:
    """The name in an adapter file of a factor, or of a weight of a module that is saved whole."""
    return _PREFIX + name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(
        f".{ADAPTER}.weight", ".weight"
    )


def adapter_parameters(module: nn.Module) -> dict[str, Tensor]:
    """What an adapter file holds, by the names in it; references to the (sharded) parameters."""
    return {
        file_name(name): p for name, p in module.named_parameters() if is_factor(name) or is_saved_whole(name)
    }


def write_adapter(folder: Path, module: Any, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` (full, by the names of the file) and the config into `folder`, as PEFT loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    config = module.peft_config[ADAPTER]
    kept, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = kept
