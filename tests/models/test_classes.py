"""Which class a folder is built as: plugins, config.architectures, the folder's own code, Auto classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from hpc_rl.checkpoint.export import Export, write_now
from hpc_rl.models.base import ModelError
from hpc_rl.recipe.extensions import register
from tests.models import contract as c

pytestmark = pytest.mark.torch
torch.set_num_threads(1)

REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


class TheirQwen2(T.Qwen2ForCausalLM):
    """What a plugin registers."""


class Broken(T.PreTrainedModel):
    config_class = T.Qwen2Config

    def __init__(self, config: Any) -> None:
        raise KeyError("its_own_key")


def change(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def test_architectures_then_auto(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hpc_rl.models")
    folder = c.save(tmp_path / "a", "qwen3")
    assert type(c.build_model(folder).module) is T.Qwen3ForCausalLM
    assert "Qwen3ForCausalLM of transformers: rows packed, attention hpc_rl_packed" in caplog.text
    # A backbone without head, a name that is not known: what the Auto class says.
    for names in (["Qwen3Model"], ["NoSuchClass"], None):
        assert type(c.build_model(change(folder, architectures=names)).module) is T.Qwen3ForCausalLM
    # With images, the whole model and not its text half.
    vlm = change(c.save(tmp_path / "b", "mllama"), architectures=None)
    assert type(c.build_model(vlm).module) is T.MllamaForConditionalGeneration


def test_code_of_the_folder_only_if_allowed(tmp_path: Path) -> None:
    folder = c.save(tmp_path / "own", "llama")
    (folder / "modeling_own.py").write_text(REMOTE)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder, model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=auto)
    with pytest.raises(ModelError, match="trust_remote_code"):
        c.build_model(folder)
    assert type(c.build_model(folder, trust_remote_code=True).module).__name__ == "OwnForCausalLM"
    # A class that Transformers has goes before the folder's, allowed or not.
    change(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert type(c.build_model(folder, trust_remote_code=True).module) is T.LlamaForCausalLM


def test_a_registered_model_goes_first_and_never_falls_back(tmp_path: Path) -> None:
    folder = change(c.save(tmp_path, "qwen2"), architectures=["TheirOwn"])
    register("models", "TheirOwn", implementation="tests.models.test_classes:TheirQwen2")
    assert type(c.build_model(folder).module) is TheirQwen2
    for name, reference, said in [
        ("Gone", "tests.models.no_such_module:Model", "ModuleNotFoundError"),
        ("NotAModel", "tests.models.test_classes:change", "is not a transformers.PreTrainedModel class"),
        ("BreaksWhenMade", "tests.models.test_classes:Broken", "KeyError: 'its_own_key'"),
    ]:
        register("models", name, implementation=reference)
        with pytest.raises(ModelError, match=said):
            c.build_model(change(folder, architectures=[name]))


def save_in_four_bits(folder: Path) -> Path:
    """GPT-OSS as it is published: experts in MXFP4, blocks of 32 numbers with a scale each."""
    c.save(folder, "gpt_oss")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        shape = (experts, outer, inner // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, shape[:-1], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return change(folder, quantization_config={"quant_method": "mxfp4"})


def test_mxfp4_is_read_as_what_it_stands_for(tmp_path: Path) -> None:
    folder = save_in_four_bits(tmp_path / "four")
    plain = T.GptOssForCausalLM.from_pretrained(
        folder, quantization_config=T.Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    model = c.build_model(folder)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    write_now(model, Export(tmp_path / "out", folder, None, torch.float32), tmp_path / "partial")
    again = c.build_model(tmp_path / "out")
    ids = torch.arange(5, 30)
    logits = [m.logits(ids, torch.arange(25), torch.arange(25)) for m in (model, again)]
    assert torch.equal(*logits)
    assert (
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        .get_parameter("lm_head.weight")
        .isfinite()
        .all()
    )


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    """Their numbers without their scales would load, and mean nothing."""
    folder = change(c.save(tmp_path, "qwen3"), quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"is quantised \(fp8\), which cannot be trained from"):
        c.build_model(folder)
