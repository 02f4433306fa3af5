"""Scripts written to cosmos-rl's `launch_worker` contract are plugins: unchanged, in `check` and in a run."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hpc_rl.data.errors import DataError
from hpc_rl.data.rows import load_rows
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.launch import ScriptError, launch_worker
from hpc_rl.recipe.launch.script import bind
from hpc_rl.recipe.plugins import PluginError, import_plugin, plugin_source
from hpc_rl.recipe.schema import DatasetSpec, Recipe
from tests.cli.helpers import hpc_rl_forked, make_model
from tests.e2e import tiny
from tests.e2e.harness import Run
from tests.tiny_models import character_tokenizer

SCRIPT = Path(__file__).with_name("gsm_like.py")


def with_words(folder: Path) -> Path:
    """A folder with a real tokenizer, which packers ask for."""
    character_tokenizer(tiny.CHARACTERS, "<pad>", "<bos>", "<eos>", "<unk>").save_pretrained(folder)
    return folder


def recipe_for(data: str, model: Path | str = "none") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "kind": "rl",
            "model": {"path": str(model)},
            "data": {"train": {"path": data}},
            "algorithm": {"name": "grpo", "group_size": 4},
            "rollout": {"max_tokens": 8},
        }
    )


def imported(tmp_path: Path, name: str, text: str) -> str:
    """The script `text` as the plugin `name`; the warnings of importing it."""
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import_plugin(path)
    return "\n".join(str(warning.message) for warning in caught)


def test_paths_of_plugins() -> None:
    assert plugin_source("plugin:mine") == ("mine", "")
    assert plugin_source("plugin:mine:openai/gsm8k") == ("mine", "openai/gsm8k")
    assert plugin_source("openai/gsm8k") is None


def test_an_unchanged_script_brings_rows_and_rewards(tmp_path: Path) -> None:
    rows = tiny.make_data(tmp_path / "train.jsonl", rows=4, seed=0)
    said = imported(tmp_path, "unchanged", SCRIPT.read_text())
    assert "get_policy_input of the data packer are not used" in said
    assert "launch_worker(val_reward_fns=…) is passed over: evaluations have the recipe's rewards" in said
    path = f"plugin:unchanged:{rows}"
    bind(recipe_for(path, with_words(tmp_path / "words")))
    spec = DatasetSpec(path=path, chat=False)
    loaded = load_rows(spec)
    first = json.loads(rows.read_text().splitlines()[0])
    assert len(loaded) == 4
    assert loaded[0] == {"prompt": first["question"], "answer": first["answer"]}
    assert load_rows(spec).fingerprint == loaded.fingerprint
    validation = load_rows(DatasetSpec(path=f"plugin:unchanged.val:{rows}", chat=False, limit=2))
    assert [row["answer"] for row in validation] == [loaded[0]["answer"], loaded[1]["answer"]]
    both, one = (registry("rewards").load(name) for name in ("unchanged_rewards", "unchanged.digits_reward"))
    assert asyncio.run(both("sort 1=", "12ab", "1", {})) == pytest.approx(0.54)
    assert asyncio.run(one("sort 1=", "12ab", "1", {})) == 0.5
    with pytest.raises(DataError, match=r"whole texts, .*: set format=prompt_answer and chat=false"):
        load_rows(DatasetSpec(path=path))
    with pytest.raises(DataError, match=r"plugin:nobody: no data extension is called 'nobody'"):
        load_rows(DatasetSpec(path="plugin:nobody"))


MESSAGES = """
from hpc_rl.recipe.launch import launch_worker
class Chats:
    def __len__(self): return 2
    def __getitem__(self, i): return [dict(role="user", content=f"question {i}")]
    def get_reference_answer(self, i): return {"choices": [i]}
def reward(to_be_evaluated, reference=None):
    return float(reference["choices"] == [1])
launch_worker(dataset=Chats(), reward_fns=reward)
"""


def test_conversations_and_references_that_are_no_text(tmp_path: Path) -> None:
    assert imported(tmp_path, "chats", MESSAGES) == ""
    bind(recipe_for("plugin:chats"))
    rows = load_rows(DatasetSpec(path="plugin:chats", format="chat"))
    assert rows[1]["messages"] == [{"role": "user", "content": "question 1"}]
    score = registry("rewards").load("chats_rewards")
    fields = {"reference_answer": rows[1]["reference_answer"]}
    assert asyncio.run(score("question 1", "x", rows[1]["answer"], fields)) == 1.0
    with pytest.raises(DataError, match="conversations: set format=chat"):
        load_rows(DatasetSpec(path="plugin:chats"))


PLAIN = """
from hpc_rl.recipe.extensions import register
def rows(spec):
    return [{spec.prompt: f"row {i}", "answer": "b"} for i in range(3)]
def odd(spec):
    return [{}, 7]
register("data", "plain", implementation="plain:rows")
register("data", "odd_rows", implementation="plain:odd")
"""


def test_any_plugin_may_make_rows(tmp_path: Path) -> None:
    assert imported(tmp_path, "plain", PLAIN) == ""
    rows = load_rows(DatasetSpec(path="plugin:plain", limit=2, prompt="text"))
    assert [row["text"] for row in rows] == ["row 0", "row 1"]
    with pytest.raises(DataError, match="row 1 must be a mapping, this is int"):
        load_rows(DatasetSpec(path="plugin:odd_rows"))


LAUNCH = "from cosmos_rl.launcher.worker_entry import main as launch_worker\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUNCH + "launch_worker(sampler=3)", r"sampler=…\) cannot be kept: the order of the rows follows"),
        (LAUNCH + "launch_worker(hook_fns=[1])", r"hook_fns=…\) cannot be kept: there are no hooks"),
        (LAUNCH, "calls launch_worker neither at its top level nor under"),
        ("from cosmos_rl.policy.model import Qwen3", "cosmos_rl.policy.model.Qwen3 is not in hpc-rl; launch"),
    ],
)
def test_what_cannot_be_kept_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        imported(tmp_path, f"refused_{abs(hash(text))}", text)


def test_unknown_arguments_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    said = imported(tmp_path, "odd", LAUNCH + "launch_worker(dataset=[], speed=11)\n")
    assert "odd: launch_worker(speed=…) is passed over: cosmos-rl does not know it either" in said


def test_a_script_that_is_started_by_hand_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="list it under `plugins:` of a recipe"):
        launch_worker(dataset=[])
    script = tmp_path / "chats.py"
    script.write_text(MESSAGES)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert "is a plugin of hpc-rl" in done.stderr


def script_recipe(folder: Path) -> Path:
    shutil.copyfile(SCRIPT, folder / "mine.py")
    train = {"path": f"plugin:mine:{folder / 'train.jsonl'}", "chat": False}
    held = {"path": f"plugin:mine.val:{folder / 'eval.jsonl'}", "chat": False}
    recipe = tiny.rl_recipe(
        folder, policy={"steps": 2, "optimizer": {"lr": 1e-3}}, eval={"every": 1, "before": False},
        checkpoint={"enabled": False, "export": "off"},
    )  # fmt: skip
    import yaml

    content = yaml.safe_load(recipe.read_text())
    content |= {"data": {"train": train, "eval": held}, "plugins": ["mine.py"]}
    content["reward"] = [{"name": "mine_rewards"}, {"name": "mine.digits_reward", "weight": 0.0}]
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def test_check_reads_the_scripts_rows(tmp_path: Path) -> None:
    with_words(make_model(tmp_path / "model"))
    tiny.make_data(tmp_path / "train.jsonl", rows=24, seed=0)
    tiny.make_data(tmp_path / "eval.jsonl", rows=3, seed=1)
    done = hpc_rl_forked("check", script_recipe(tmp_path), "model.attn_implementation=null", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"24 rows of plugin:mine:{tmp_path}/train.jsonl" in done.stdout
    wrong = hpc_rl_forked("check", tmp_path / "grpo.yaml", "data.train.chat=true", cwd=tmp_path)
    assert "set format=prompt_answer and chat=false" in wrong.stderr


@pytest.mark.torch
@pytest.mark.redis
@pytest.mark.slow
def test_a_run_trains_on_the_script_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tiny.make_model(tmp_path / "model")
    tiny.make_data(tmp_path / "train.jsonl", rows=24, seed=0)
    tiny.make_data(tmp_path / "eval.jsonl", rows=3, seed=1)
    run = Run.submit(script_recipe(tmp_path))
    run.complete()
    rows = [row for row in run.metrics() if row["step"]]
    assert all(row["reward/mine_rewards_unscored"] == 0 for row in rows)
    assert all(0 < row["reward/mine_rewards"] != row["reward/mine.digits_reward"] for row in rows)
    assert rows[-1]["eval/prompts"] == 3
