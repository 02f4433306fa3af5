"""Registries and plugins: built-in, from a plugin file, from an installed package; copied into a run."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.recipe import RecipeError, load_recipe, save_plugins
from hpc_rl.recipe.extensions import UnknownExtension, register, registry
from hpc_rl.recipe.plugins import PluginError, import_plugins

Write = Callable[..., Path]
Wrong = Callable[..., str]

PLUGIN = """\
from pydantic import Field
from hpc_rl.recipe.extensions import register
from hpc_rl.recipe.schema import Section

class Config(Section):
    scale: float = Field(default=1.0, gt=0)

class Reward:
    def __init__(self, config): self.config = config

register("rewards", "{name}", config="{module}:Config", implementation="{module}:Reward")
"""


def plugin(name: str) -> str:
    return PLUGIN.format(name=f"{name}_reward", module=name)


@pytest.mark.parametrize("kind", ["algorithms", "rewards", "engines", "trainers"])
def test_every_built_in_has_a_torch_free_config(kind: str) -> None:
    for name in registry(kind).names():
        registry(kind).config_class(name)


def test_config_is_validated_with_messages() -> None:
    config = registry("algorithms").config("grpo", {"name": "grpo", "group_size": 4})
    assert config.group_size == 4
    with pytest.raises(RecipeError, match=r"group_sice: unknown key .* Did you mean 'group_size'"):
        registry("algorithms").config("grpo", {"group_sice": 4})


def test_what_a_plugin_prints_goes_to_stderr(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("print('from the config')\n" + plugin("talks_config"), "talks_config.py")
    write("print('hello')\n" + plugin("talks"), "talks.py")
    load_recipe("small.yaml", ["plugins=[talks.py]", "reward=[{name: talks_reward}]"])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(UnknownExtension, match=r"Did you mean 'grpo'\? Known: aipo, cispo, dapo, "):
        registry("algorithms").member("grop")
    with pytest.raises(ValueError, match="no extensions of kind 'x'"):
        registry("x")


def test_register_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="must look like 'module:attribute'"):
        register("rewards", "bad", implementation="nowhere")
    with pytest.raises(ValueError, match="already"):
        register("rewards", "exact", implementation="other:Exact")


def test_a_plugin_file_adds_a_reward(write: Write, wrong: Wrong, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "plug_one.py").write_text(plugin("plug_one"))
    path = write(
        "extends: small.yaml\nplugins: [sub/plug_one.py]\n"
        "reward: [{name: plug_one_reward, weight: 2, scale: 3}]\n"
    )
    loaded = load_recipe(path)
    assert loaded.recipe.reward == [{"name": "plug_one_reward", "weight": 2, "scale": 3.0}]
    assert loaded.recipe.plugins == ["plug_one.py"]
    assert registry("rewards").load("plug_one_reward").__name__ == "Reward"
    assert "reward.0.scale: is -1; must be greater than 0" in wrong(path, "reward.0.scale=-1")


def test_a_run_has_its_own_copy_in_every_process(write: Write, tmp_path: Path) -> None:
    """What counts is the copy of the day of submission, not the file as edited since."""
    write(plugin("plug_two"), "plug_two.py")
    loaded = load_recipe(
        write("extends: small.yaml\nplugins: [plug_two.py]\nreward: [{name: plug_two_reward}]\n")
    )
    code = tmp_path / "run" / "code"
    save_plugins(loaded, code)
    (tmp_path / "plug_two.py").write_text("raise SystemExit('the original was imported')")
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from hpc_rl.recipe import import_plugins
        from hpc_rl.recipe.extensions import registry
        import_plugins({loaded.recipe.plugins!r}, Path({str(code)!r}))
        print(registry("rewards").load("plug_two_reward"))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "<class 'plug_two.Reward'>", done.stderr


def test_the_resolved_recipe_of_a_run_finds_its_plugins(write: Write, tmp_path: Path) -> None:
    from hpc_rl.recipe import dump_resolved

    write(plugin("plug_three"), "plug_three.py")
    loaded = load_recipe(
        write("extends: small.yaml\nplugins: [plug_three.py]\nreward: [{name: plug_three_reward}]\n")
    )
    run = tmp_path / "run"
    save_plugins(loaded, run / "code")
    (run / "resolved.yaml").write_text(dump_resolved(loaded.recipe))
    again = load_recipe(run / "resolved.yaml", ["reward.0.scale=2"])
    assert again.recipe.reward[0]["scale"] == 2
    assert again.plugins == [run / "code" / "plug_three.py"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.py", None, "does not exist"),
        ("json.py", "", "has the name of an existing module"),
        ("numpy.py", "", "has the name of an installed module"),
        ("bad-name.py", "", "must be named like a Python module"),
        ("plug_broken.py", "1/0", "cannot be imported: ZeroDivisionError"),
        ("plug_syntax.py", "def", "cannot be imported: SyntaxError"),
        ("no_such_module_x", None, "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_bad_plugins_are_one_clear_error(
    write: Write, wrong: Wrong, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        write(text, name)
    got = wrong(write(f"extends: small.yaml\nplugins:\n  - {name}\n"))
    assert got.startswith("r.yaml:3: plugins.0: plugin")
    assert message in got


def test_import_plugins_of_a_module_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="does not exist"):
        import_plugins(["gone.py"], tmp_path)


def test_an_installed_package_adds_members(tmp_path: Path) -> None:
    """A real distribution on the path, in a fresh process: its entry point is found, and only when needed."""
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hpc_rl.rewards]\ntheirs = their_package:MEMBER\n")
    (tmp_path / "their_package.py").write_text(
        "from hpc_rl.recipe.extensions import Member\n"
        "MEMBER = Member('their_package:Theirs')\n"
        "class Theirs: pass\n"
    )
    script = textwrap.dedent(
        """
        import sys
        from hpc_rl.recipe.extensions import registry
        registry("rewards").member("exact")
        assert "importlib.metadata" not in sys.modules or not registry("rewards")._scanned
        print(registry("rewards").load("theirs"))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "<class 'their_package.Theirs'>", done.stderr
