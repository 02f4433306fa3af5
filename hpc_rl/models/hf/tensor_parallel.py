"""Tensor parallelism by the model's own plan in Transformers, on the innermost dimension of the mesh.

`module.tp_plan` says for each layer how it is split (columns, rows, packed halves of an MLP or of experts,
norms of single heads); `apply_tensor_parallelism` of Transformers carries it out. What we add: weights that
are tied stay tied, Qwen3-VL's text has the plan of Qwen3, and families without a plan are refused.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from hpc_rl.models.base import ModelError

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
    """Split `module` (on meta) over the one-dimensional `mesh`."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    apply_tensor_parallelism(module, mesh, plan_of(module, mesh.size()))
    module.tie_weights()
