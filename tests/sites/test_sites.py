"""Site profiles: found by path, name or `auto`; strict; the shipped ones are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl.cluster.sites import detect_site, load_site, read_site, readable_sites, site_files
from hpc_rl.recipe import RecipeError
from hpc_rl.recipe.share import share_dir

MINE = "name: mine\ndetect: {hostname: 'login[0-9]+[.]mine'}\ngpus: {style: gres, per_node: 4}\n"


def has_slurm(name: str) -> str | None:
    return f"/usr/bin/{name}" if name == "sbatch" else None


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "mine.yaml").write_text(MINE)
    return tmp_path


@pytest.mark.parametrize("file", sorted(share_dir("site").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_profiles_are_valid_and_called_like_their_file(file: Path) -> None:
    assert read_site(file).name == file.stem


def test_the_example_shows_every_key() -> None:
    from hpc_rl.plan.site import Site

    text = (share_dir("site") / "example.yaml").read_text()
    assert [name for name in Site.model_fields if f"{name}:" not in text] == []


def test_by_name_by_path_and_the_users_own_win(config: Path) -> None:
    assert load_site("mine", config_dir=config).gpus.per_node == 4
    assert load_site(str(config / "sites" / "mine.yaml")).name == "mine"
    (config / "sites" / "local.yaml").write_text("name: local\nplacement: local\ndescription: own\n")
    assert load_site("local", config_dir=config).description == "own"
    assert {"local", "generic-gpu", "mine"} <= set(site_files(config))


def test_an_unknown_name_lists_what_there_is(config: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_site("mnie", config_dir=config)
    text = str(caught.value)
    assert text.startswith(
        "cluster.site: no site profile is called 'mnie'. Did you mean 'mine'? Known: example, "
    )
    assert "hpc-rl site init" in text


def test_detection(config: Path) -> None:
    def detect(which: object = has_slurm, host: str = "login1.mine.org") -> str:
        return detect_site(config_dir=config, which=which, hostname=host)  # type: ignore[arg-type]

    assert detect() == "mine"
    assert detect(host="node7.elsewhere") == "generic-gpu"
    assert detect(which=lambda name: None) == "local"
    (config / "config.yaml").write_text("site: example\n")
    assert detect() == "example"
    assert load_site("auto", placement="local", config_dir=config).name == "local"


def test_detection_by_the_name_of_the_cluster(config: Path, tmp_path: Path) -> None:
    """The real lookup, by a scontrol of our own that prints what Slurm prints."""
    (config / "sites" / "mine.yaml").write_text("name: mine\ndetect: {cluster_name: alps}\n")
    program = tmp_path / "scontrol"
    program.write_text(
        "#!/bin/sh\necho 'Configuration data as of now'\necho 'ClusterName             = alps'\n"
    )
    program.chmod(0o755)
    tools = {"sbatch": "/usr/bin/sbatch", "scontrol": str(program)}
    assert detect_site(config_dir=config, which=tools.get, hostname="x") == "mine"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert detect_site(config_dir=config, which=tools.get, hostname="x") == "generic-gpu"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("partition: gpu", "s.yaml:2: partition: unknown key (value \"gpu\"). Did you mean 'partitions'?"),
        ("gpus: {stile: gres}", "s.yaml:2: gpus.stile: unknown key (value \"gres\"). Did you mean 'style'?"),
        ("gpus: {style: grez}", "s.yaml:2: gpus.style: is \"grez\"; allowed: 'gres', 'gpus_per_node'"),
        ("gpus: {style: gres}", "s.yaml:2: gpus.per_node: is required when gpus.style is 'gres'"),
        ("gpus: {per_node: 4}", "s.yaml:2: gpus.style: is 'none' but gpus.per_node is 4; use gres"),
        ("mem: {per_node: lots}", 's.yaml:2: mem.per_node: is "lots"; must be a size as sbatch takes it'),
        ("time_max: long", "s.yaml:2: time_max: is 'long'; must be a Slurm time"),
        ("detect: {hostname: '('}", "s.yaml:2: detect.hostname: is not a regular expression"),
        ("partitions: {trainer: x}", "s.yaml:2: partitions.trainer"),
    ],
)
def test_bad_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(f"name: s\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        load_site("./s.yaml")
    assert str(caught.value).startswith(message)


def test_a_broken_profile_is_a_warning_to_all_others(config: Path) -> None:
    (config / "sites" / "broken.yaml").write_text("name: broken\npartitons: {}\n")
    (config / "sites" / "ajar.yaml").write_bytes(b"\xff")
    said: list[str] = []
    found = [name for name, _, _ in readable_sites(config, said.append)]
    assert {"mine", "local"} <= set(found)
    assert not {"broken", "ajar"} & set(found)
    assert sorted(text.partition("sites/")[2][:25] for text in said) == [
        "ajar.yaml: is not UTF-8 t",
        "broken.yaml:2: partitons:",
    ]
    said.clear()
    host = "login1.mine.org"
    name = detect_site(config_dir=config, which=has_slurm, hostname=host, warn=said.append)
    assert (name, len(said)) == ("mine", 2)
    with pytest.raises(RecipeError, match="partitons"):
        load_site("broken", config_dir=config, warn=said.append)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "r.yaml:3: cluster.site: . is a folder, not a site profile; there are other.yaml"),
        ("./empty", "r.yaml:3: cluster.site: ./empty is a folder, not a site profile; known names: example,"),
        ("./othr.yaml", "r.yaml:3: cluster.site: ./othr.yaml does not exist; known names: example, "),
        ("nope", "r.yaml:3: cluster.site: no site profile is called 'nope'. Known: example, "),
    ],
)
def test_what_is_no_profile_is_said_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text(MINE)
    Path("empty").mkdir()
    with pytest.raises(RecipeError) as caught:
        load_site(name, where="r.yaml:3", config_dir=tmp_path)
    assert str(caught.value).startswith(message)


def test_bad_user_config(config: Path) -> None:
    (config / "config.yaml").write_text("sight: x\n")
    with pytest.raises(RecipeError, match=r"config.yaml:1: sight: unknown key. Allowed here: site"):
        detect_site(config_dir=config)


def test_share_dir_names_what_is_missing() -> None:
    assert (share_dir("recipes") / "gsm8k-grpo.yaml").is_file()
    with pytest.raises(FileNotFoundError, match="reinstall"):
        share_dir("nothing")  # type: ignore[arg-type]
