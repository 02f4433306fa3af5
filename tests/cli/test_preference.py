"""`check` and `submit --dry-run` of preference recipes: pairs are rendered before anything is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import hpc_rl_forked, line_of, make_recipe

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "1+1="), ("assistant", "2"), ("assistant", "11"))
)
CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def pair_recipe(folder: Path, *rows: dict[str, Any], template: str | None = CHAT, **changes: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"path": str(path), "format": "preference"}}
    recipe = make_recipe(folder, kind="preference", data=data, **changes)
    if template is not None:
        (folder / "model" / "chat_template.jinja").write_text(template)
    return recipe


def test_a_preference_recipe_is_one_component(tmp_path: Path) -> None:
    recipe = pair_recipe(tmp_path, *[{"chosen": [USER, GOOD], "rejected": [USER, BAD]}] * 8)
    done = hpc_rl_forked("submit", recipe, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["ok"]
    checked = hpc_rl_forked("check", recipe, cwd=tmp_path)
    assert "tiny: preference on site local" in checked.stdout
    assert "reference" in checked.stdout  # its memory is counted
    assert f"8 rows of {tmp_path / 'pairs.jsonl'}" in checked.stdout
    assert "rollout" not in checked.stdout


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [USER, GOOD]}, "has no column 'rejected'"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER]},
            "the messages of 'rejected' must end with an assistant",
        ),
    ],
)
def test_a_bad_pair_is_named_with_file_and_row(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    recipe = pair_recipe(tmp_path, {"prompt": "1+1=", "chosen": "2", "rejected": "3"}, row)
    done = hpc_rl_forked("check", recipe, cwd=tmp_path)
    assert done.returncode == 2
    where = f"recipe.yaml:{line_of(recipe, 'train')}: data.train: {tmp_path / 'pairs.jsonl'}: row 1"
    assert where in done.stderr
    assert said in done.stderr


def test_chats_need_a_template(tmp_path: Path) -> None:
    recipe = pair_recipe(tmp_path, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, template=None)
    done = hpc_rl_forked("check", recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "row 0 has chat messages, and" in done.stderr
    assert "has no chat template; set model.tokenizer" in done.stderr
