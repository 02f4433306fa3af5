"""The catalog's facts are those of Transformers, of vLLM, and of the families' table."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from hpc_rl.catalog.families import FAMILIES as CATALOG
from hpc_rl.catalog.families import family_of
from hpc_rl.models.base import ModelError
from hpc_rl.models.hf import tensor_parallel
from hpc_rl.models.hf.classes import has_vision
from tests.families import FAMILIES

pytestmark = pytest.mark.torch
TYPES = [model_type for family in CATALOG for model_type in family.model_types]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_catalog_says_what_the_table_says(name: str) -> None:
    config, line = FAMILIES[name].config(), FAMILIES[name]
    family = family_of(config.model_type)
    assert family is not None
    assert (family.tp, family.vllm, family.vision) == (line.tp, line.vllm, line.vision)
    assert (family.packed, family.vllm_lora) == (line.packed, line.vllm_lora)
    assert family.moe == (name in ("qwen3_moe", "mixtral", "gpt_oss"))
    assert has_vision(config) == line.vision


@pytest.mark.parametrize("model_type", TYPES)
def test_plans_to_split_are_there_or_not(model_type: str) -> None:
    """Of the real default config, on meta and with one layer."""
    config = T.CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    if model_type == "mllama":
        text.cross_attention_layers = []
    family = family_of(model_type)
    assert family is not None
    auto = T.AutoModelForImageTextToText if family.vision else T.AutoModelForCausalLM
    with torch.device("meta"):
        module = auto.from_config(config)
    if family.tp:
        assert any(".layers." in key for key in tensor_parallel.plan_of(module, 1))
    else:
        with pytest.raises(ModelError, match="no tensor-parallel plan"):
            tensor_parallel.plan_of(module, 1)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_serves_what_the_catalog_says() -> None:
    from vllm import ModelRegistry

    served = ModelRegistry.get_supported_archs()
    for family in CATALOG:
        for model_type in family.model_types:
            auto = T.AutoModelForImageTextToText if family.vision else T.AutoModelForCausalLM
            name = auto._model_mapping[type(T.CONFIG_MAPPING[model_type]())].__name__
            assert (name in served) == family.vllm, name
