"""`hpc-rl convert` on the command line: files, exit codes, JSON; never half a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.helpers import hpc_rl_forked
from tests.convert.helpers import BASE, toml


def _config(folder: Path, **keys: object) -> Path:
    path = folder / "config.toml"
    path.write_text(toml({**BASE, **keys}))
    return path


def test_the_recipe_is_printed_or_written_and_then_checked(tmp_path: Path) -> None:
    config = _config(tmp_path)
    printed = hpc_rl_forked("convert", config.name, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.startswith("# Converted from cosmos-rl: hpc-rl convert")
    assert "train.train_batch_per_replica = 8 -> policy.batch_size" in printed.stderr
    assert "5 keys mapped, 0 dropped, 0 unknown to cosmos-rl" in printed.stderr
    done = hpc_rl_forked("convert", "config.toml", "-o", "made.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "made.yaml\n")
    assert (tmp_path / "made.yaml").read_text() == printed.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["config.toml", "made.yaml"]
    rendered = hpc_rl_forked("render", "made.yaml", "--site", "generic-gpu", cwd=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    assert "--gres=gpu:4" in rendered.stdout


def test_nothing_is_overwritten_unless_forced(tmp_path: Path) -> None:
    config, target = _config(tmp_path), tmp_path / "made.yaml"
    target.write_text("mine\n")
    done = hpc_rl_forked("convert", config, "-o", target, cwd=tmp_path)
    assert (done.returncode, target.read_text()) == (2, "mine\n")
    assert "exists already; choose another, or use --force" in done.stderr
    assert hpc_rl_forked("convert", config, "-o", target, "--force", cwd=tmp_path).returncode == 0
    assert target.read_text().startswith("# Converted")
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "gone" / "x.yaml", "there is no folder")):
        done = hpc_rl_forked("convert", config, "-o", out, cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (2, True)


def test_a_mistake_writes_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path, **{"train.epoch": 0})
    done = hpc_rl_forked("convert", config.name, "-o", "made.yaml", cwd=tmp_path)
    assert done.returncode == 2
    wrong = "makes policy.epochs of the recipe wrong: is 0; must be at least 1"
    assert done.stderr == f"error: config.toml:6: train.epoch: {wrong}\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["config.toml"]
    assert hpc_rl_forked("convert", "gone.toml", cwd=tmp_path).stderr == "error: gone.toml: no such file\n"


def test_a_configuration_of_rl_becomes_a_recipe_that_renders(tmp_path: Path) -> None:
    config = _config(tmp_path, **{"train.train_policy.type": "grpo", "rollout.n_generation": 4})
    done = hpc_rl_forked("convert", config, "-o", "made.yaml", "--script", "gsm8k_grpo.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "made.yaml\n"), done.stderr
    rendered = hpc_rl_forked("render", "made.yaml", "--site", "generic-gpu", cwd=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    assert "hetjob" in rendered.stdout


def test_json_has_every_key(tmp_path: Path) -> None:
    config = _config(tmp_path, **{"train.compile": True, "train.opmt_lr": 1e-5})
    answer = json.loads(hpc_rl_forked("convert", config, "--json", cwd=tmp_path).stdout)
    assert answer["recipe"] is None
    assert [item["key"] for item in answer["mapped"]] == list(BASE)
    assert [item["key"] for item in answer["dropped"]] == ["train.compile"]
    (unknown,) = answer["unknown"]
    assert (unknown["key"], unknown["note"]) == ("train.opmt_lr", "did you mean train.optm_lr?")
    assert answer["mapped"][3]["to"] == ["policy.parallel.tp"]
    assert any(item["to"] == "policy.max_length" for item in answer["assumed"])
    assert answer["text"].startswith("# Converted")
