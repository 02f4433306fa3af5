"""The families that are proven, one line each: adding a family is adding one line to `FAMILIES`.

A family is a tiny random configuration and what is expected of it; `tests/models/test_families.py` and
`tests/rollout/test_vllm_families.py` run every line through the same contract. Windows are 16 tokens, so
that sequences of the tests exceed them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as T

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Vision-language models share one vocabulary (`tiny_vlms.tokenizer`): these are its first ids.
PAD, EOS, BOS, IMAGE, VIDEO, VISION_START, VISION_END, IMAGE_START, IMAGE_END = range(9)
TEXT = {**SIZES, "vocab_size": 128, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


@dataclass(frozen=True)
class Family:
    """`config` makes the tiny configuration. `packed`: our path packs its rows (with images, too); `tp`:
    Transformers has a plan to split it; `vllm`: vLLM serves it; `vllm_lora`: also with adapters."""

    name: str
    config: Callable[..., Any]
    vision: bool = False
    packed: bool = True
    tp: bool = True
    vllm: bool = True
    vllm_lora: bool = False


def _text(cls: Any, **options: Any) -> Callable[..., Any]:
    return lambda **changes: cls(**{**SIZES, **options, **changes})


def _gemma3(**changes: Any) -> Any:
    return T.Gemma3Config(
        text_config=T.Gemma3TextConfig(**{**TEXT, "sliding_window": 16, **changes}),
        vision_config=T.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
        eos_token_id=EOS,
    )


def _llava(**changes: Any) -> Any:
    return T.LlavaConfig(
        text_config=T.LlamaConfig(**{**TEXT, **changes}),
        vision_config=T.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def _mllama(**changes: Any) -> Any:
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], **changes}
    text.pop("head_dim")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return T.MllamaConfig(
        text_config=T.models.mllama.configuration_mllama.MllamaTextConfig(**text, rope_parameters=rope),
        vision_config=T.models.mllama.configuration_mllama.MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=28,
            patch_size=7,
            max_num_tiles=2,
            vision_output_dim=64,
            intermediate_layers_indices=[1],
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        image_token_index=IMAGE,
    )


def _qwen_vl(cls: Any, vision: dict[str, Any]) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        # Qwen3-VL interleaves the three dimensions; Transformers always does, vLLM asks the config.
        rope = {**ROPE, "mrope_interleaved": cls is T.Qwen3VLConfig}
        text = {**TEXT, "rope_parameters": rope, **changes}
        return cls(
            text_config=text,
            vision_config={"depth": 2, "num_heads": 2, "patch_size": 7, "temporal_patch_size": 2, **vision},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            tie_word_embeddings=False,
        )

    return make


_QWEN2_5_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128, "window_size": 28,
    "fullatt_block_indexes": [1],
}  # fmt: skip
_QWEN3_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", _text(T.LlamaConfig, tie_word_embeddings=False), vllm_lora=True),
        Family("llama_tied", _text(T.LlamaConfig, tie_word_embeddings=True), vllm_lora=True),
        Family("mistral", _text(T.MistralConfig, sliding_window=16), vllm_lora=True),
        Family("qwen2", _text(T.Qwen2Config, tie_word_embeddings=True), vllm_lora=True),
        Family("qwen3", _text(T.Qwen3Config), vllm_lora=True),
        Family("gemma2", _text(T.Gemma2Config, sliding_window=16), vllm_lora=True),
        Family("gemma3", _text(T.Gemma3TextConfig, sliding_window=16), vllm_lora=True),
        Family("phi3", _text(T.Phi3Config, pad_token_id=0), vllm_lora=True),
        Family("qwen3_moe", _text(T.Qwen3MoeConfig, **MOE)),
        Family("mixtral", _text(T.MixtralConfig, num_local_experts=4)),
        Family(
            "gpt_oss",
            _text(T.GptOssConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
            tp=False,
        ),
        Family("gemma3_vlm", _gemma3, vision=True),
        Family("llava", _llava, vision=True),
        Family("mllama", _mllama, vision=True, packed=False, tp=False, vllm=False),
        Family("qwen2_vl", _qwen_vl(T.Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 128}), vision=True),
        Family("qwen2_5_vl", _qwen_vl(T.Qwen2_5_VLConfig, _QWEN2_5_VISION), vision=True),
        Family("qwen3_vl", _qwen_vl(T.Qwen3VLConfig, _QWEN3_VISION), vision=True),
    )
}
