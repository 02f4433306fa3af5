"""`hpc-rl eval`: what is evaluated, what it becomes as a job, what it says of things that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hpc_rl.cli._checks import findings_of
from hpc_rl.cli._evaluated import find_target
from hpc_rl.cli._prepare import create_run, prepare
from hpc_rl.cli._resume_keys import refusals
from hpc_rl.cli.errors import UserError
from hpc_rl.cli.eval import prepare_evaluation
from hpc_rl.recipe.yaml_source import RecipeError
from hpc_rl.run.best import Best, write_best
from hpc_rl.run.paths import RunDir, RunError
from tests.cli.helpers import hpc_rl_forked, make_model, make_recipe

RL = {
    "kind": "rl",
    "algorithm": {"name": "grpo", "group_size": 2},
    "reward": [{"name": "exact"}],
    "rollout": {"engine": "hf", "replicas": 4, "max_tokens": 8},
}


def make_run(folder: Path, *overrides: str, site: str = "local", **changes: object) -> RunDir:
    recipe = make_recipe(folder, output_root=str(folder / "runs"), **changes)
    content = yaml.safe_load(recipe.read_text())
    content["data"]["eval"] = content["data"]["train"]
    recipe.write_text(yaml.safe_dump(content))
    run, _ = create_run(prepare(recipe, overrides, site=site))
    return run


def complete(run: RunDir, *steps: int) -> None:
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "COMPLETE").write_text("{}")


def test_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = make_run(tmp_path)
    root = str(run.root)
    with pytest.raises(UserError, match="nothing to evaluate: it has no complete checkpoint and no export"):
        find_target(root, None)
    complete(run, 10, 20, 30)
    newest = find_target(root, None)
    assert (newest.label, newest.checkpoint) == ("step_00000030", run.checkpoint(30))
    with pytest.raises(
        UserError, match=r"no complete checkpoint and no export of step 15; there is: step 10,"
    ):
        find_target(root, "15")
    with pytest.raises(UserError, match="has no final export; there is: step 10, step 20, step 30"):
        find_target(root, "final")
    with pytest.raises(UserError, match="has no best checkpoint"):
        find_target(root, "best")
    with pytest.raises(UserError, match="--step is 'last'; must be a number, best or final"):
        find_target(root, "last")
    write_best(run, Best(20, "eval/loss", 1.0))
    assert find_target(root, "best").checkpoint == run.checkpoint(20)
    exported = make_model(run.safetensors / "step_00000020")
    assert find_target(root, "best").model == exported, "what is exported is not exported again"
    assert find_target(str(exported), None) == find_target(root, "20")
    assert find_target(str(run.checkpoint(20)), None).checkpoint == run.checkpoint(20)
    adapter = run.safetensors / "final"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert find_target(root, None).checkpoint == run.checkpoint(30), "an adapter alone: merged by the job"
    adapter.joinpath("adapter_model.safetensors").unlink()
    adapter.rmdir()
    final = make_model(adapter)
    assert find_target(root, None).model == final
    foreign = find_target(str(make_model(tmp_path / "other")), None)
    assert (foreign.run, foreign.label) == (None, "other")
    with pytest.raises(UserError, match="--step belongs to a run"):
        find_target(str(tmp_path / "other"), "3")
    with pytest.raises(RunError, match="no run is named 'nobody'"):
        find_target("nobody", None)


def test_an_rl_evaluation_is_a_job_of_one_component_without_a_policy(tmp_path: Path) -> None:
    """A run over two partitions on a cluster; the site file it came from is gone."""
    site = tmp_path / "cluster.yaml"
    site.write_text(
        "name: cluster\nplacement: het\npartitions: {policy: big, rollout: small}\n"
        "gpus: {per_node: 8, style: gres}\ncpus: {per_node: 64}\n"
    )
    separate = {"site": str(site), "controller": {"separate": True}, "time": "24:00:00"}
    run = make_run(tmp_path, site=str(site), **RL, cluster=separate)
    assert [line["role"] for line in json.loads(run.plan.read_text())["groups"]] == [
        *("controller", "policy", "rollout")
    ]
    complete(run, 10)
    site.unlink()
    done = hpc_rl_forked(
        "eval", run.root, "--dry-run", "--json", "eval.samples=4", "eval.temperature=1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [(g["role"], g["component"], g["tasks"]) for g in answer["plan"]["groups"]] == [("rollout", 0, 1)]
    script = answer["script"]
    assert "#SBATCH --partition=small" in script
    assert "hetjob" not in script
    assert "#SBATCH --time=60" in script
    recipe = answer["recipe"]
    assert recipe["name"] == "tiny-step_00000010"
    assert recipe["output_root"] == str(run.root / "eval")
    assert recipe["eval"]["checkpoint"] == str(run.checkpoint(10))
    assert (recipe["eval"]["only"], recipe["eval"]["samples"]) == (True, 4)
    assert recipe["checkpoint"]["enabled"] is False
    assert findings_of(prepare(run.resolved, ["eval.only=true", "model.freeze=[embed]"], site="local"))
    more = prepare_evaluation(
        find_target(str(run.root), None), ["rollout.replicas=9", "cluster.rollout.nodes=2"],
        recipe=None, site=None, here=False,
    )  # fmt: skip
    assert [(g.nodes, g.tasks) for g in more.plan.groups] == [(2, 9)]


def test_an_sft_evaluation_has_a_policy_unless_answers_are_to_be_scored(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    complete(run, 10)
    target = find_target(str(run.root), None)

    def prepared(*words: str, of: RunDir = run) -> object:
        assert of is run
        return prepare_evaluation(target, list(words), recipe=None, site=None, here=False)

    loss = prepared()
    assert [group.role for group in loss.plan.groups] == ["policy"]  # type: ignore[attr-defined]
    scored = prepared("reward=[{name: exact}]", "rollout.max_tokens=16")
    assert [group.role for group in scored.plan.groups] == ["rollout"]  # type: ignore[attr-defined]
    assert scored.recipe.rollout.engine == "hf"  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"eval\.only: needs rows to evaluate on: give data\.eval"):
        prepared("data.eval=null")
    with pytest.raises(UserError, match="--recipe is for models of no run"):
        prepare_evaluation(target, [], recipe="gsm8k-sft", site=None, here=False)
    other = find_target(str(make_model(tmp_path / "other")), None)
    with pytest.raises(UserError, match="belongs to no run: name the recipe"):
        prepare_evaluation(other, [], recipe=None, site=None, here=False)
    foreign = prepare_evaluation(other, [], recipe=str(tmp_path / "recipe.yaml"), site=None, here=False)
    assert (foreign.recipe.model.path, foreign.recipe.name) == (str(tmp_path / "other"), "tiny-other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.checkpoint=/r/checkpoints/step_00000001"], "eval.checkpoint: belongs to eval.only"),
        (["eval.only=true", "eval.checkpoint=/r/step_1"], "must be a folder such as <run>/checkpoints/step_"),
        (
            ["eval.only=true", "eval.checkpoint=/r/checkpoints/step_00000001", "model.lora={r: 4}"],
            "model.lora: an evaluation takes whole weights",
        ),
    ],
)
def test_keys_of_an_evaluation_by_hand(tmp_path: Path, words: list[str], message: str) -> None:
    recipe = make_recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    content["data"]["eval"] = content["data"]["train"]
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError) as caught:
        prepare(recipe, words)
    assert any(message in str(problem) for problem in caught.value.problems)


def test_a_run_that_trains_cannot_become_one_that_evaluates(tmp_path: Path) -> None:
    old = {"eval": {"only": False, "every": 5}}
    assert set(refusals(old, {"eval": {"only": True, "every": 6}})) == {"eval.only"}
