"""The preflight ladder on a small model folder and real rows: each mistake is named; and `fetch`."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest

from hpc_rl.cli._fetch import FetchError, fetch
from hpc_rl.cli._preflight import preflight, require
from hpc_rl.cluster.findings import Finding, PreflightError
from hpc_rl.cluster.preflight import check_output_root, check_programs
from hpc_rl.cluster.sites import load_site
from hpc_rl.plan import Site, make_plan, resolve_recipe
from hpc_rl.recipe import load_recipe

CONFIG = {"model_type": "qwen2", "num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder, two rows and a redis-server, all right."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    rows = [{"question": "1+1?", "answer": "#### 2"}, {"question": "2+2?", "answer": "#### 4"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    redis = tmp_path / "redis-server"
    redis.write_text("#!/bin/sh\n")
    redis.chmod(0o755)
    return tmp_path


def run(folder: Path, *overrides: str, site: Site | None = None) -> list[Finding]:
    loaded = load_recipe(
        "gsm8k-grpo",
        [
            f"model.path={folder}/model", f"data.train.path={folder}/rows.jsonl", "data.eval=null",
            f"output_root={folder}/runs", "cluster.placement=local", "policy.parallel.dp_shard=1",
            "rollout={replicas: 1, engine: hf}", f"cluster.controller.redis_server={folder}/redis-server",
            "cluster.policy.gpus_per_node=0", "cluster.rollout.gpus_per_node=0", *overrides,
        ],
    )  # fmt: skip
    site = site or load_site("local")
    plan = make_plan(loaded, site)
    return preflight(loaded, site, plan, resolve_recipe(loaded, site, plan))


def errors(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.level == "error"]


def test_all_right(folder: Path) -> None:
    findings = run(folder)
    assert errors(findings) == []
    require(findings)
    assert f"2 rows of {folder}/rows.jsonl" in [f.message for f in findings]
    assert sorted(path.name for path in folder.iterdir()) == ["model", "redis-server", "rows.jsonl"]


@pytest.mark.torch
def test_names_of_layers_that_are_not_there(folder: Path) -> None:
    """The module is built to know (on meta, in another process), where the rest is right."""
    lora = "model.lora={target_modules: [q_proj, qproj]}"
    (error,) = errors(run(folder, lora, "policy.trainer=fsdp2"))
    assert "model.lora.target_modules: 'qproj' names nothing; near it: " in error
    (error,) = errors(run(folder, lora, "policy.trainer=fsdp2", "data.train.prompt=quest"))
    assert "quest" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.prompt=quest"], "row 0 has no column 'quest'; its columns are 'question', 'answer'"),
        (["reward=[{name: code}]"], "row 0: reward 'code' needs the row's column 'tests'"),
        (["reward=[{name: python, function: no_such_module_x:f}]"], "there is no module 'no_such_module_x'"),
        (["reward=[{name: python, function: json:lods}]"], "module 'json' has no 'lods' (did you mean"),
        (["data.train.path=./gone.jsonl"], "gone.jsonl does not exist"),
        (["model.path=./gone"], "gone does not exist"),
        (["model.path=org/not-here"], "org/not-here is neither a folder nor in the Hub cache, and jobs"),
        (["model.tokenizer=org/not-here"], "model.tokenizer: org/not-here is neither a folder nor"),
        (["cluster.controller.redis_server=/nowhere/redis-server"], "is no executable file"),
        (["cluster.secrets=[SURELY_NOT_SET_X]"], "SURELY_NOT_SET_X is not set in your environment"),
        (["cluster.template=./gone.j2"], "gone.j2 does not exist"),
        (["cluster.policy.image=/x.sif"], "an image is given (/x.sif), but site local has no"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "empty-cache"))
    findings = run(folder, *overrides)
    assert any(message in text for text in errors(findings)), errors(findings)
    with pytest.raises(PreflightError):
        require(findings)


def test_missing_model_names_fetch(folder: Path) -> None:
    site = Site(name="s", placement="local", paths={"hf_home": str(folder / "hf")})  # type: ignore[arg-type]
    found = run(folder, "model.path=org/not-here", "model.revision=v1", site=site)
    assert "org/not-here at revision v1 is neither" in errors(found)[0]
    assert "run 'hpc-rl fetch" in errors(found)[0]


def test_incomplete_models(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "model.safetensors is cut short" in errors(run(folder))[0]
    weights.unlink()
    assert "has no weights" in errors(run(folder))[0]
    weights.write_bytes(whole)
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors" in errors(run(folder))[0]
    (folder / "model" / "model.safetensors.index.json").unlink()
    (folder / "model" / "tokenizer.json").unlink()
    assert "has no tokenizer files" in errors(run(folder))[0]


def test_fewer_rows_than_a_step_takes(folder: Path) -> None:
    def warnings(*overrides: str) -> list[str]:
        found = run(folder, "algorithm.group_size=4", *overrides)
        return [
            str(finding) for finding in found if finding.level == "warning" and "data.train" in finding.where
        ]

    assert warnings("policy.batch_size=8") == []  # two rows, two prompts
    (warning,) = warnings("policy.batch_size=12")
    assert "data.train: 2 rows, and one step takes 3" in warning
    (warning,) = warnings("policy.batch_size=8", "data.train.limit=1")
    assert warning.endswith("raise data.train.limit, or lower policy.batch_size")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json: has no model_type"),
        ({**CONFIG, "num_attention_heads": None}, "names no attention heads (num_attention_heads or n_head)"),
        ({**CONFIG, "num_attention_heads": -4}, "num_attention_heads is -4; must be a positive integer"),
        ({**CONFIG, "num_hidden_layers": "two"}, 'num_hidden_layers is "two"; must be a positive integer'),
        ({**CONFIG, "num_key_value_heads": 3}, "heads 4 is not a multiple of num_key_value_heads 3"),
        ({**CONFIG, "num_attention_heads": 5}, "hidden size 64 is not a multiple of the 5 attention heads"),
    ],
)  # fmt: skip
def test_a_config_that_is_no_model(folder: Path, config: dict[str, object], message: str) -> None:
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (found,) = errors(run(folder))
    assert message in found


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2},
        {"model_type": "someones", "num_attention_heads": [4, 8], "hidden_size": 64},
        {
            "model_type": "qwen3_vl",
            "text_config": {"vocab_size": 9},
        },  # sizes may be differences from a default
        {**CONFIG, "num_attention_heads": 5, "head_dim": 16},
    ],
)
def test_a_config_that_may_be_a_model(folder: Path, config: dict[str, object]) -> None:
    (folder / "model" / "config.json").write_text(json.dumps(config))
    assert errors(run(folder)) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", '{"model": ', "tokenizer.json cannot be read: Expecting value"),
        ("tokenizer.json", "{}", "tokenizer.json has no 'model': it is no tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("generation_config.json", "{,}", "generation_config.json cannot be read"),
    ],
)
def test_a_damaged_tokenizer(folder: Path, name: str, text: str, message: str) -> None:
    (folder / "model" / name).write_text(text)
    (found,) = errors(run(folder))
    assert message in found
    assert found.endswith("copy or fetch it again")


PLUGIN = """\
from hpc_rl.recipe.extensions import register
register("rewards", "{name}", implementation="{reference}")
if True:
    class Mine: ...
"""


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{module}:Mine", None),
        ("{module}:Mone", "has no 'Mone' (did you mean 'Mine'?)"),
        ("no_such_module.deep:Reward", "there is no module 'no_such_module.deep'"),
        ("json.nothing:Reward", "there is no module 'json.nothing'"),
        ("email.mime.text:MIMEText", None),  # not imported, read
        ("email.mime.text:MIMETex", "has no 'MIMETex'"),
        ("torch.optim.adamw:AdamW", None),  # imports nothing of torch
    ],
)  # fmt: skip
def test_the_implementation_of_a_plugin(folder: Path, reference: str, message: str | None) -> None:
    module = "plugin_" + re.sub(r"\W", "_", reference)
    reference = reference.format(module=module)
    (folder / f"{module}.py").write_text(PLUGIN.format(name=module, reference=reference))
    found = errors(run(folder, f"plugins=[{folder}/{module}.py]", f"reward=[{{name: {module}}}]"))
    if message is None:
        assert found == []
    else:
        assert "reward.0.name: " in found[0]
        assert message.format(module=module) in found[0]


def test_output_root_that_cannot_be_written(tmp_path: Path) -> None:
    assert [f.level for f in check_output_root(str(tmp_path / "a" / "b"))] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "is not a folder" in check_output_root(str(tmp_path / "file" / "runs"))[0].message
    assert "is not writable" in check_output_root("/proc/nowhere")[0].message
    if os.getuid() != 0:
        tmp_path.chmod(0o500)
        assert "is not writable" in check_output_root(str(tmp_path / "runs"))[0].message


def test_slurm_programs_that_are_missing() -> None:
    have = {"sbatch": "/usr/bin/sbatch", "srun": "/usr/bin/srun"}
    (finding,) = check_programs(have.get)
    assert finding.message.startswith("scontrol, squeue, sinfo not found on PATH")


def test_fetch_of_local_paths_downloads_nothing(folder: Path) -> None:
    loaded = load_recipe(
        "gsm8k-grpo", [f"model.path={folder}/model", f"data.train.path={folder}/rows.jsonl", "data.eval=null"]
    )
    lines: list[str] = []
    fetched = fetch(loaded, load_site("local"), say=lines.append, api=object())
    assert [(f.key, f.commit, f.was_here) for f in fetched] == [
        ("model.path", None, True),
        ("data.train.path", None, True),
    ]
    assert len(lines) == 2
    loaded.recipe.model.path = str(folder / "gone")
    with pytest.raises(FetchError, match=r"model.path: .*gone is a local path and does not exist"):
        fetch(loaded, load_site("local"), api=object())


def test_fetch_without_a_route_is_one_clear_line_each(folder: Path) -> None:
    """The real client against a port where nobody listens; model and data are named, with their lines."""
    from huggingface_hub import HfApi

    loaded = load_recipe("gsm8k-grpo")
    site = Site(name="s", paths={"hf_home": str(folder / "hf")})  # type: ignore[arg-type]
    with pytest.raises(FetchError) as caught:
        fetch(loaded, site, api=HfApi(endpoint="http://127.0.0.1:9"))
    model, data = caught.value.problems
    says = "the Hugging Face Hub cannot be reached for"
    assert re.match(rf".*gsm8k-grpo\.yaml:\d+: model\.path: {says} Qwen/Qwen2.5-1.5B-Instruct \(", model)
    assert re.match(rf".*gsm8k-grpo\.yaml:\d+: data\.train\.path: {says} openai/gsm8k \(", data)
    for text in (model, data):
        assert text.endswith("run this on a node with internet, or set HF_ENDPOINT to your mirror")
        assert "\n" not in text
    assert not (folder / "hf").exists()
