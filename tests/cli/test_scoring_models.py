"""`check` and `fetch` know the models beside the policy: reward models, judges, teachers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.cli._fetch import repositories
from hpc_rl.cluster.scoring_check import check_scoring
from hpc_rl.plan import Site
from hpc_rl.recipe import load_recipe

SITE = Site(name="here")
WORDS = {"a": 0, "b": 1, "c": 2}


def model(folder: Path, architecture: str, words: dict[str, int] = WORDS, **config: Any) -> Path:
    """A folder that looks like a model to whoever reads headers and JSON only."""
    folder.mkdir(parents=True)
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2}
    settings = {"model_type": "qwen2", "architectures": [architecture], **sizes, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    added = [{"id": 9, "content": "<eos>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": added}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return folder


def errors(*overrides: str) -> list[str]:
    found = check_scoring(load_recipe("gsm8k-grpo", overrides), SITE)
    return [f"{finding.message}; {finding.fix}" for finding in found if finding.level == "error"]


@pytest.mark.parametrize(
    ("architecture", "config", "options", "message"),
    [
        ("Qwen2ForSequenceClassification", {"id2label": {"0": "r"}}, "", ""),
        ("Qwen2ForCausalLM", {}, "kind: judge", ""),
        ("Qwen2ForCausalLM", {}, "", "holds Qwen2ForCausalLM, which has no head for a score; take a reward"),
        ("BertForSequenceClassification", {}, "kind: judge", "which writes no text; take a causal model"),
        ("BertForSequenceClassification", {}, "", "has 2 outputs, and reward.0.label does not say which"),
        ("BertForSequenceClassification", {}, "label: 1", ""),
        ("BertForSequenceClassification", {}, "label: 2", "is 2; "),
    ],
)
def test_a_reward_model_has_what_its_kind_needs(
    tmp_path: Path, architecture: str, config: dict[str, Any], options: str, message: str
) -> None:
    folder = model(tmp_path / "rm", architecture, **config)
    found = errors(f"reward=[{{name: model, path: {folder}, {options}}}]")
    assert len(found) == (1 if message else 0)
    assert message in "".join(found)


def test_a_model_that_is_not_here_is_said_with_its_key(tmp_path: Path) -> None:
    gone = f"{tmp_path}/gone"
    (finding,) = [
        finding
        for finding in check_scoring(
            load_recipe("gsm8k-grpo", [f"reward=[{{name: model, path: {gone}}}]"]), SITE
        )
        if finding.level == "error"
    ]
    assert "reward.0.path" in finding.where
    assert finding.message == f"{gone} does not exist"


def test_a_teacher_has_the_policys_tokens(tmp_path: Path) -> None:
    student = model(tmp_path / "student", "Qwen2ForCausalLM")
    like = model(tmp_path / "like", "Qwen2ForCausalLM", {**WORDS, "d": 3})
    other = model(tmp_path / "other", "Qwen2ForCausalLM", {"a": 0, "b": 2, "c": 1})
    base = [f"model.path={student}", "algorithm={name: distill, group_size: 8}"]
    assert errors(*base, f"teacher.path={like}") == []
    (error,) = errors(*base, f"teacher.path={other}")
    assert "2 of them differ, token 1 is 'b' and the teacher has it as 2; distillation needs" in error


def test_fetch_gets_them_too() -> None:
    loaded = load_recipe(
        "gsm8k-grpo",
        [
            "reward=[{name: model, path: org/rm, revision: abc, tokenizer: org/words}, {name: gsm8k}]",
            "algorithm={name: distill, group_size: 8}",
            "teacher.path=org/large",
        ],
    )
    found = {item.key: (item.kind, item.name, item.revision) for item in repositories(loaded)}
    assert found["reward.0.path"] == ("model", "org/rm", "abc")
    assert found["reward.0.tokenizer"] == ("model", "org/words", None)
    assert found["teacher.path"] == ("model", "org/large", None)
