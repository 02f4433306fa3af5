"""Facts about model families that are not in a `config.json`: tensor-parallel plan, vLLM support.

Kept true by the models' contract test. A family that is not here is a warning, never an error.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """`model_types` are the `model_type` values of config.json; `vllm` says whether vLLM serves it, `tp`
    whether Transformers has a plan to split its layers, `vision` whether it sees images, `vllm_lora` whether
    vLLM's adapters are proven to give the adapted model's numbers, `packed` whether its rows of sequences are
    trained as they are, without padding."""

    name: str
    model_types: tuple[str, ...]
    vllm: bool = True
    moe: bool = False
    tp: bool = True
    vision: bool = False
    vllm_lora: bool = False
    packed: bool = True


FAMILIES: tuple[Family, ...] = (
    Family("Llama", ("llama",), vllm_lora=True),
    Family("Qwen2", ("qwen2",), vllm_lora=True),
    Family("Qwen3", ("qwen3",), vllm_lora=True),
    Family("Qwen3-MoE", ("qwen3_moe",), moe=True),
    Family("Qwen2-MoE", ("qwen2_moe",), moe=True),
    Family("Mistral", ("mistral",), vllm_lora=True),
    Family("Mixtral", ("mixtral",), moe=True),
    Family("Gemma", ("gemma", "gemma2", "gemma3_text"), vllm_lora=True),
    Family("Phi-3", ("phi3",), vllm_lora=True),
    Family("GPT-OSS", ("gpt_oss",), moe=True, tp=False),
    Family("GPT-2", ("gpt2",), tp=False),
    Family("GPT-NeoX", ("gpt_neox",)),
    Family("OLMo", ("olmo", "olmo2")),
    Family("SmolLM3", ("smollm3",)),
    Family("Gemma 3 with images", ("gemma3",), vision=True),
    Family("LLaVA", ("llava",), vision=True),
    Family("Llama 3.2 Vision", ("mllama",), vllm=False, tp=False, vision=True, packed=False),
    Family("Qwen2-VL", ("qwen2_vl", "qwen2_5_vl"), vision=True),
    Family("Qwen3-VL", ("qwen3_vl",), vision=True),
)

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: str) -> Family | None:
    """The family of a `model_type`, or None."""
    return _BY_TYPE.get(model_type)


def rollout_tp_error(heads: int, kv_heads: int, tp: int) -> str | None:
    """Why an engine cannot split `heads` over `tp` GPUs, or None.

    vLLM's rule: query heads divide evenly; key/value heads divide evenly or are replicated evenly.
    """
    allowed = [n for n in divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
    if heads % tp:
        return f"tp {tp} does not divide the model's {heads} attention heads; use one of {allowed}"
    if kv_heads % tp and tp % kv_heads:
        return (
            f"tp {tp} neither divides nor is a multiple of the model's {kv_heads} key/value heads; "
            f"use one of {allowed}"
        )
    return None


def policy_tp_error(heads: int, kv_heads: int, tp: int) -> str | None:
    """Why the trainer cannot split over `tp` ranks, or None: both kinds of heads divide evenly."""
    if heads % tp or kv_heads % tp:
        allowed = [n for n in divisors(heads) if kv_heads % n == 0]
        return (
            f"tp {tp} does not divide the model's {heads} attention heads and {kv_heads} key/value heads; "
            f"use one of {allowed}"
        )
    return None


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
