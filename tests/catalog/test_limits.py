"""The limits of the catalog are those of the packages."""

from __future__ import annotations

import pytest

from hpc_rl.catalog.limits import ATTENTION, MAX_TEMPERATURE


@pytest.mark.torch
def test_attention_is_what_transformers_has() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Without the paged variants, and without ours, which is there once another test has loaded a model.
    ours = ("paged|", "hpc_rl_")
    known = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith(ours)}
    assert set(ATTENTION) == known | {"eager"}


@pytest.mark.vllm
def test_the_temperature_is_what_vllm_takes() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    SamplingParams(temperature=MAX_TEMPERATURE["vllm"])
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=MAX_TEMPERATURE["vllm"] + 0.01)
