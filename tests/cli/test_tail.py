"""Log files: their ends, and what they gain."""

from __future__ import annotations

from pathlib import Path

from hpc_rl.cli._tail import Follower, last_lines, log_files


def test_last_lines_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"line {n} {'x' * 50}\n" for n in range(5000)))
    lines, offset = last_lines(path, 2)
    assert [line.split()[1] for line in lines] == ["4998", "4999"]
    assert offset == path.stat().st_size
    assert last_lines(path, 0)[0] == []


def test_roles_are_chosen_by_name_or_process(tmp_path: Path) -> None:
    for name in ("controller", "policy_0", "policy_1", "rollout_0", "batch"):
        (tmp_path / f"{name}.log").touch()
    assert [path.stem for path in log_files(tmp_path, "policy")] == ["policy_0", "policy_1"]
    assert [path.stem for path in log_files(tmp_path, "policy_1")] == ["policy_1"]
    assert len(log_files(tmp_path, None)) == 5
    assert log_files(tmp_path / "absent", None) == []


def test_a_follower_gives_whole_lines_once(tmp_path: Path) -> None:
    path, follower = tmp_path / "a.log", Follower()
    path.write_text("one\ntw")
    assert [line for _, line in follower.new_lines([path])] == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert [line for _, line in follower.new_lines([path])] == ["two", "three"]
    assert list(follower.new_lines([path, tmp_path / "absent"])) == []
    path.write_text("new\n")  # truncated by a restart
    assert [line for _, line in follower.new_lines([path])] == ["new"]
