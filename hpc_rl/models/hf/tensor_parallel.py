"""Tensor parallelism by the model's own plan in Transformers, on the innermost dimension of the mesh.

`module.tp_plan` says for each layer how it is split (columns, rows, packed halves of an MLP or of experts,
norms of single heads); the styles of Transformers carry it out. What we add: weights that are tied stay tied,
Qwen3-VL's text has the plan of Qwen3, adapters are split with their layers, and families without a plan are
refused.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.adapter_names import factor_module, plain_name

# Text parts without a plan whose layers are, name for name, those of a model that has one.
_SAME_LAYERS = {"qwen3_vl_text": "Qwen3Config"}
_HEAD, _EMBEDDING = "colwise_gather_output", "embedding_rowwise"  # both split the vocabulary


def plan_of(module: Any, tp: int) -> dict[str, str]:
    """The plan to apply for `tp` ranks. Raises ModelError if the family has none or heads do not divide."""
    text = module.config.get_text_config()
    name = type(module).__name__
    plan = dict(module.tp_plan) | _borrowed(module, text)
    if not any(".layers." in key or key.startswith("layers.") for key in plan):
        raise ModelError(
            f"policy.parallel.tp = {tp}: Transformers has no tensor-parallel plan for {name}; use dp_shard"
        )
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if text.num_attention_heads % tp or kv_heads % tp:
        raise ModelError(
            f"policy.parallel.tp = {tp} does not divide the {text.num_attention_heads} attention heads and "
            f"{kv_heads} key/value heads of {name}"
        )
    names = {id(part): path for path, part in module.named_modules()}
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    ends = {_EMBEDDING: names[id(embedding)]} | ({_HEAD: names[id(head)]} if head is not None else {})
    tied = bool(module.all_tied_weights_keys) and head is not None
    splits = text.vocab_size % tp == 0 and embedding.weight.shape[0] == text.vocab_size
    for style, path in ends.items():
        if tied and splits:
            plan[path] = style  # one tensor, split in one way for both
        elif tied or not splits:
            plan.pop(path, None)
    return plan


def _borrowed(module: Any, text: Any) -> dict[str, str]:
    import transformers

    if text.model_type not in _SAME_LAYERS:
        return {}
    plan = getattr(transformers, _SAME_LAYERS[text.model_type]).base_model_tp_plan
    (prefix,) = [path for path, part in module.named_modules() if part is module.get_decoder()]
    return {f"{prefix}.{key}": style for key, style in plan.items()}


def split(module: Any, mesh: DeviceMesh) -> None:
    """Split `module` (on meta), with adapters or without, over the one-dimensional `mesh`.

    Where there are none, this is `apply_tensor_parallelism` of Transformers, which finds layers by names that
    adapters change. Raises ModelError for a layer whose adapter cannot be split with it.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    plan = plan_of(module, mesh.size())
    names = {name for name, _ in module.named_modules()}
    for name, part in list(module.named_modules()):
        for own, _ in list(part.named_parameters(recurse=False)):
            if style := _parameter_style(f"{name}.{own}", plan):
                ALL_PARALLEL_STYLES[style].validate_param(part, own, mesh, parameter_name=f"{name}.{own}")
                ALL_PARALLEL_STYLES[style].shard_param(part, own, mesh)
        if style := _module_style(name, names, plan):
            if style == _LATENT:
                part.config = module.config.get_text_config()
            ALL_PARALLEL_STYLES[style].install_forward(part, mesh)
        part._is_hooked = True
    module.tie_weights()


def check(module: Any, tp: int) -> None:
    """Raise the ModelError that `split` over `tp` ranks would, without ranks."""
    plan = plan_of(module, tp)
    for name, _ in module.named_modules():
        factor = factor_module(name)
        if factor is not None:
            _factor_style(*factor, plan)


# Of an adapted layer: the factor that is split with it, as the layer itself is. By columns (of the output)
# that is B, by rows A, whose product is summed over the ranks before B. The other factor is whole on each
# rank and gets its whole gradient there: what is between the factors is replicated, and its gradient summed.
_SPLIT_FACTOR = {"colwise": "lora_B", "packed_colwise": "lora_B", "rowwise": "lora_A"}
_LATENT = "mla_kv_a_proj"  # not split; acts on the output, so on that of the layer with its adapter
# Input and output are the same on each rank, so both factors are whole and need no communication.
_WHOLE = {"colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", _LATENT}


def _parameter_style(name: str, plan: dict[str, str]) -> str | None:
    path, _, own = name.rpartition(".")
    factor = factor_module(path)
    if factor is not None:
        return _factor_style(*factor, plan)
    path = _generic(plain_name(path))
    return plan.get(f"{path}.{own}", plan.get(path))


def _module_style(name: str, names: set[str], plan: dict[str, str]) -> str | None:
    factor = factor_module(name)
    if factor is not None:
        return _factor_style(*factor, plan)
    style = plan.get(_generic(plain_name(name)))
    if {f"{name}.base_layer", f"{name}.original_module"} & names:
        return style if style == _LATENT else None
    return None if style == _LATENT and name.endswith(".base_layer") else style


def _factor_style(layer: str, factor: str, plan: dict[str, str]) -> str | None:
    style = plan.get(_generic(plain_name(layer)))
    if style is None or style in _WHOLE:
        return None
    if style not in _SPLIT_FACTOR:
        raise ModelError(
            f"model.lora: {layer} is split over policy.parallel.tp as {style!r}, which adapters cannot "
            "follow; take it out with model.lora.exclude_modules"
        )
    return style if _SPLIT_FACTOR[style] == factor else None


def _generic(name: str) -> str:
    """As plans name it: numbers of layers are `*`."""
    from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

    return replace_layer_number_by_wildcard(name)
