"""Files that are broken, strange or hostile: one clear message, or a recipe that loads; never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hpc_rl.recipe import RecipeError, load_recipe
from hpc_rl.recipe.cosmos import convert_file
from hpc_rl.recipe.cosmos.toml_source import key_lines, parse_toml

SFT = '[train.train_policy]\ntype = "sft"\ndataset.name = "org/rows"\n'


def sft(text: str) -> bytes:
    """The least file of SFT with more behind it."""
    return (SFT + text).encode()


REFUSED: list[tuple[str, bytes, str]] = [
    ("empty", b"", r"odd.toml: is empty"),
    ("only a comment", b"# nothing\n", r"odd.toml: is empty"),
    ("not UTF-8", b'redis = "1"\nname = "\xff\xfe"\n', r"odd.toml:2: is not UTF-8 text"),
    ("UTF-16", '[train]\nepoch = 1\n'.encode("utf-16"), r"odd.toml:1: is not UTF-8 text"),
    ("syntax", b"[train]\nepoch = = 3\n", r"odd.toml:2: not valid TOML: Invalid value"),
    ("unfinished", b"[train\nepoch = 3\n", r"odd.toml:1: not valid TOML"),
    ("twice", b"[train]\nepoch = 1\nepoch = 2\n", r"odd.toml:3: not valid TOML: Cannot overwrite a value"),
    ("YAML", b"train:\n  epoch: 1\n", r"odd.toml:1: not valid TOML"),
    ("another tool's", b"[tool.black]\nline-length = 100\n", r"odd.toml: tool: is no cosmos-rl conf"),
    ("nested lists", b"a = " + b"[" * 5000 + b"]" * 5000, r"odd.toml: is nested too deeply"),
    ("an endless integer", b"[train]\nepoch = " + b"9" * 5000, r"odd.toml: not readable as TOML"),
    ("a table as a value", b"train = 3\n", r"odd.toml:1: train: must be a table"),
    ("a list of tables", b"[[train]]\nepoch = 1\n", r"odd.toml:1: train: must be a table"),
    ("a value as a table", sft("[train.epoch]\na = 1\n"), r":4: train.epoch: .*must be an integer"),
    ("text for a number", sft('[train]\nepoch = "many"\n'), r':5: train.epoch: is "many"; must be an'),
    ("true for a number", sft("[train]\nepoch = true\n"), r":5: train.epoch: is true; must be an"),
    ("half an integer", sft("[train]\nepoch = 1.5\n"), r":5: train.epoch: is 1.5; must be an integer"),
    ("infinity", sft("[train]\noptm_lr = inf\n"), r":5: train.optm_lr: .*must be a finite number"),
    ("not a number", sft("[train]\nepsilon = nan\n"), r":5: train.epsilon: .* a finite number"),
    ("a date", sft("[train]\nepoch = 2026-01-01\n"), r":5: train.epoch: is \"2026-01-01\""),
    ("65 bits", sft(f"[train]\nepoch = {2**64}\n"), r":5: train.epoch: .*must be an integer"),
    ("32 bits", sft(f"[train]\nepoch = {2**40}\n"),
     r":5: train.epoch: makes policy.epochs .* is 1099511627776; must be at most 2147483647"),
    ("negative", sft("[train]\nepoch = -1\n"), r":5: train.epoch: makes policy.epochs .* at least 1"),
    ("an unknown type", sft('[train]\nparam_dtype = "fp8"\n'),
     r':5: train.param_dtype: makes model.dtype of the recipe wrong: is "fp8"; allowed: .*bfloat16'),
    ("an unknown mode", sft('[train.ckpt]\nenable_checkpoint = true\nsave_mode = "asink"\n'),
     r":6: train.ckpt.save_mode: makes checkpoint.mode .* Did you mean 'async'"),
    ("no regular expression", sft('[policy]\nfreeze_pattern = ["("]\n'), r":5: policy.freeze_pattern"),
    ("a list of mixed rates", sft('[train]\noptm_lr = [1e-5, "x"]\n'), r":5: train.optm_lr: is \["),
    ("no rates", sft("[train]\noptm_lr = []\n"), r":5: train.optm_lr: is an empty list"),
    ("rates without a global one", sft('[train.optm_lr]\n"a.b" = 1e-5\n'), r"train.optm_lr: .*'global'"),
    ("unquoted module", sft("[policy.trainable_map]\nmodel.visual = false\n"), r"quote names with dots"),
    ("zero ranks", sft("[policy.parallelism]\ntp_size = 0\n"),
     r":5: policy.parallelism.tp_size: makes policy.parallel.tp .* at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_wrong_is_said_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        convert_file(Path("odd.toml"))


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(SFT + '[train]\nepoch = "x"\nseed = "y"\n[policy]\nmodel_max_length = []\n')
    with pytest.raises(RecipeError) as caught:
        convert_file(path)
    assert [problem.key for problem in caught.value.problems] == [
        "train.epoch",
        "train.seed",
        "policy.model_max_length",
    ]


ACCEPTED: list[tuple[str, str]] = [
    ("byte order mark", "\ufeff" + SFT),
    ("Windows lines", SFT.replace("\n", "\r\n")),
    ("inline tables", 'train = {train_policy = {type = "sft", dataset = {name = "org/rows"}}}\n'),
    ("numbers as text", SFT + '[train]\nepoch = "2"\nseed = 3.0\noptm_lr = "1e-5"\n'),
    ("dotted keys", 'train.train_policy.type = "sft"\ntrain.train_policy.dataset.name = "org/rows"\n'),
    ("quoted keys", '["train"."train_policy"]\n"type" = "sft"\n\'dataset\'.name = "org/rows"\n'),
    ("empty tables", SFT + "[policy]\n[policy.lora]\n[validation]\n[rollout]\n[custom]\n"),
    ("a negative seed", SFT + "[train]\nseed = -1\n"),
    (
        "lines in texts",
        SFT + '[custom]\nx = """\n[policy]\nmodel = 1\n"""\n[policy]\nmodel_max_length = 512\n',
    ),
    ("texts that end a comment", SFT + '[custom]\nx = "a\\nname: other\\u2028kind: rl\\u0085b\\u0000c"\n'),
    ("keys that end a comment", SFT + '[custom]\n"a\\nname: other" = 1\n"b.c" = 2\n'),
    ("texts that YAML would misread", SFT.replace("org/rows", "on: [x, y] # {no}")),
    ("a name of nothing but signs", SFT + '[logging]\nexperiment_name = "///"\n'),
    ("a long name", SFT + f'[logging]\nexperiment_name = "{"x" * 300}"\n'),
]


@pytest.mark.parametrize("text", [row[1] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_odd_and_valid_files_become_recipes_that_load(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text, encoding="utf-8", newline="")
    made = convert_file(path)
    file = tmp_path / "made.yaml"
    file.write_text(made.text, encoding="utf-8")
    loaded = load_recipe(file).recipe
    assert (loaded.kind, yaml.safe_load(made.text)["kind"]) == ("sft", "sft")
    assert loaded.name != "other"


def test_numbers_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(SFT + '[train]\nepoch = "2"\nseed = 3.0\noptm_lr = "1e-5"\n')
    recipe = convert_file(path).recipe
    assert (recipe["policy"]["epochs"], recipe["seed"], recipe["policy"]["optimizer"]["lr"]) == (2, 3, 1e-5)


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(SFT + '[custom]\nhf_token = "hf_verysecret"\n[logging]\napi_key = "alsosecret"\n')
    made = convert_file(path)
    said = made.text + "\n".join(made.lines()) + str([entry.as_json() for entry in made.entries])
    assert "custom.hf_token = (hidden)" in said
    assert "verysecret" not in said and "alsosecret" not in said


def test_lines_of_keys() -> None:
    text = (
        "# a comment with = and [brackets]\n"
        'top = "x # no comment"  # [not.a.table]\n'
        "[train]\n"
        "epoch = 1\n"
        "betas = [\n  0.9,  # = [\n  0.999,\n]\n"
        'text = """\n[policy]\nfoo = 1 \\""" still inside\n"""\n'
        "literal = '''\nbar = ''\n'''\n"
        "[ policy . \"lo.ra\" ]\n"
        "'r' = 8\n"
        "dataset.name = {a = 1, b = [1, 2]}\n"
        "last = 'C:\\'\n"
        "end = true"
    )  # fmt: skip
    lines = key_lines(text)
    assert lines == {
        ("top",): 2, ("train",): 3, ("train", "epoch"): 4, ("train", "betas"): 5, ("train", "text"): 9,
        ("train", "literal"): 13, ("policy",): 16, ("policy", "lo.ra"): 16, ("policy", "lo.ra", "r"): 17,
        ("policy", "lo.ra", "dataset"): 18, ("policy", "lo.ra", "dataset", "name"): 18,
        ("policy", "lo.ra", "last"): 19, ("policy", "lo.ra", "end"): 20,
    }  # fmt: skip
    source = parse_toml(text, "x.toml")
    assert source.where("train.epoch") == "x.toml:4"
    assert source.where("train.nothing") == "x.toml:3"
    assert source.where("nothing") == "x.toml"


def test_a_wrong_number_of_profiled_steps_is_named_by_its_own_key(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(
        sft(
            "[profiler]\nenable_profiler = true\n"
            "sub_profiler_config = {do_profile = true, active_steps = 0}\n"
        )
    )
    with pytest.raises(RecipeError, match=r"sub_profiler_config.active_steps: makes policy.profile.steps"):
        convert_file(path)
