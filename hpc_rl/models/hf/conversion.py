"""How the tensors of the files become those in memory, and back: Transformers' own transforms.

Checkpoints in four bits that Transformers can undo (MXFP4, as GPT-OSS is published) are read as what they
stand for, and written as plain tensors. Others are refused: their numbers mean nothing without their scales.
"""

from __future__ import annotations

from typing import Any

from hpc_rl.models.base import ModelError


def transforms_of(module: Any) -> list[Any]:
    """The transforms of `module`, not sharded yet (they go by class names). Raises ModelError."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(module, hf_quantizer=_quantizer(module.config))


def way_back(transforms: list[Any]) -> list[Any]:
    """Those that the files use (there may be several spellings), which decides which names we write."""
    from transformers.integrations.mxfp4 import Mxfp4Dequantize

    def undoes(transform: Any) -> bool:
        return any(isinstance(step, Mxfp4Dequantize) for step in getattr(transform, "operations", None) or [])

    return [t for t in transforms if t.was_used() and not undoes(t)]


def _quantizer(config: Any) -> Any:
    """What undoes the quantization of the files; None where they have none."""
    written = getattr(config, "quantization_config", None)
    if written is None:
        return None
    from transformers import Mxfp4Config
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    method = written.get("quant_method") if isinstance(written, dict) else written.quant_method
    if method != "mxfp4":
        raise ModelError(
            f"the checkpoint is quantised ({method}), which cannot be trained from; use one in bfloat16"
        )
    return Mxfp4HfQuantizer(Mxfp4Config(dequantize=True), pre_quantized=True)
