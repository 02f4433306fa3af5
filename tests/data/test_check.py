"""`check` finds what is wrong with the data: roles, templates, media; without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hpc_rl.cli._data_check import data_findings
from hpc_rl.cluster.findings import Finding
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import load_recipe
from tests.data.chat_templates import ALL, make_tokenizer


def findings(folder: Path, template: str | None, rows: list[dict[str, Any]], **data: Any) -> list[Finding]:
    """What check says of `rows` and a model with this template."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    make_tokenizer(template).save_pretrained(model)
    (model / "config.json").write_text(json.dumps(data.pop("config", {})))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = {"steps": 1, "batch_size": 1, **data.pop("policy", {})}
    spec = {"path": "rows.jsonl", "format": "chat", **data}
    recipe = {
        "name": "x",
        "kind": "sft",
        "model": {"path": "./model"},
        "data": {"train": spec},
        "policy": policy,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return data_findings(load_recipe(str(folder / "recipe.yaml")), Site.model_validate({"name": "x"}))


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "a"), ("assistant", "b"))


def test_roles_and_templates_are_checked_with_file_row_and_role(tmp_path: Path) -> None:
    bad = [GOOD, chat(("system", "S"), ("user", "a"), ("assistant", "b"))]
    (found,) = findings(tmp_path, ALL["mistral"], bad)
    assert found.level == "error"
    assert "recipe.yaml" in found.where
    assert f"{tmp_path}/rows.jsonl: row 1: message 0 has role system; repair: [move_system]" in found.message
    (found,) = findings(tmp_path, ALL["mistral"], bad, repair=["move_system"])
    assert (found.level, found.message) == ("ok", f"2 rows of {tmp_path}/rows.jsonl")
    (found,) = findings(tmp_path, ALL["mistral"], [chat(("user", "a"), ("user", "b"), ("assistant", "c"))])
    assert "row 0: message 1 has role user as the one before; repair: [merge_roles]" in found.message
    (found,) = findings(tmp_path, ALL["gemma"], [chat(("user", "a"))])
    assert "row 0: the messages must end with an assistant message" in found.message
    (found,) = findings(tmp_path, None, [GOOD])
    assert "need a chat template" in found.message


def test_media_are_checked(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": name, "conversations": turns} for name in ("a.png", "b.png")]
    (found,) = findings(tmp_path, ALL["phi4"], rows[:1], format="llava")
    assert "row 0 has images or videos, and" in found.message
    assert "no processor" in found.message
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    parts = ALL["phi4"].replace("m['content'] +", "(m['content'] if m['content'] is string else 'x') +")
    (found,) = findings(tmp_path, parts, rows[:1], format="llava")
    assert found.level == "ok"
    (found,) = findings(tmp_path, parts, rows, format="llava")
    assert f"row 1: {tmp_path}/b.png does not exist" in found.message
    (found,) = findings(tmp_path, parts, rows[:1], format="llava", policy={"batch_tokens": 64})
    assert found.level == "ok"
    mllama = {"config": {"model_type": "mllama"}}
    (found,) = findings(tmp_path, parts, rows[:1], format="llava", policy={"batch_tokens": 64}, **mllama)
    assert "packs rows with images, which Llama 3.2 Vision cannot: use policy.batch_size" in found.message
    (found,) = findings(tmp_path, parts, rows[:1], format="llava", **mllama)
    assert found.level == "ok"
    (found,) = findings(tmp_path, parts, rows[:1], format="llava", media_path="nowhere")
    assert f"row 0: {tmp_path}/nowhere/a.png does not exist" in found.message
    (found,) = findings(tmp_path, parts, rows[:1], format="llava", media_path="")
    assert found.level == "ok"


def test_clips_are_looked_for_without_unpacking(tmp_path: Path) -> None:
    row = {"video": "clips/v.mp4", "conversations": GOOD["messages"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "media").mkdir()
    parts = ALL["phi4"].replace("m['content'] +", "(m['content'] if m['content'] is string else 'x') +")
    spec = {"format": "cosmos_reason1", "media_path": "media"}
    (found,) = findings(tmp_path, parts, [row], **spec)
    assert "row 0: no file called v.mp4 under" in found.message
    (tmp_path / "media" / "v.mp4").write_bytes(b"")
    (found,) = findings(tmp_path, parts, [row], **spec)
    assert found.level == "ok"


def test_the_check_of_rows_needs_no_torch(tmp_path: Path) -> None:
    findings(tmp_path, ALL["qwen3"], [GOOD])
    code = (
        "import sys\n"
        "from hpc_rl.cli._data_check import data_findings\n"
        "from hpc_rl.plan.site import Site\n"
        "from hpc_rl.recipe.load import load_recipe\n"
        f"recipe = load_recipe({str(tmp_path / 'recipe.yaml')!r})\n"
        "found = data_findings(recipe, Site.model_validate({'name': 'x'}))\n"
        "assert [f.level for f in found] == ['ok'], found\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("amount", [3, 0.0001])
def test_a_holdout_that_leaves_nothing_is_an_error(tmp_path: Path, amount: float) -> None:
    findings(tmp_path, ALL["phi4"], [GOOD] * 3)
    text = json.loads((tmp_path / "recipe.yaml").read_text())
    text["data"]["holdout"] = amount
    (tmp_path / "recipe.yaml").write_text(json.dumps(text))
    found = data_findings(load_recipe(str(tmp_path / "recipe.yaml")), Site.model_validate({"name": "x"}))
    assert "data.holdout" in found[0].message
