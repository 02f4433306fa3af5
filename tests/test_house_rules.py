"""Rules of the house that a machine can check: links, sizes, hosts, pickles."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"```.*?```|`[^`\n]*`", re.S)


def _files(*patterns: str) -> list[Path]:
    """Tracked and new files that git does not ignore; without git (a wheel's sources), all files."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    found = set()
    for line in _FENCE.sub("", page.read_text(encoding="utf-8")).splitlines():
        if line.startswith("#"):
            words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(words.replace(" ", "-"))
    return found


def test_every_markdown_link_resolves() -> None:
    broken = []
    for page in _files("*.md"):
        for match in _LINK.finditer(_FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = match.group(1) or match.group(2)
            if "://" in target or target.startswith("mailto:"):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}: no such file")
            elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
                broken.append(f"{page.relative_to(ROOT)}: {target}: no such heading")
    assert not broken, "\n".join(broken)


def test_no_file_is_longer_than_600_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in _files("*.py", "*.sh", "*.j2", "*.md")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    ]
    assert not long, "\n".join(long)


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in _files("hpc_rl/**/*.py", "hpc_rl/*.py")
        if (text := path.read_text(encoding="utf-8")).strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert not silent, silent


def test_no_file_names_a_package_index() -> None:
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("files", "pythonhosted", "org"))]
    hosts.append(".".join(("download", "pytorch", "org")))
    named = [
        f"{path.relative_to(ROOT)}: {host}"
        for path in _files()
        if path.stat().st_size < 1_000_000 and path.suffix not in (".parquet", ".png")
        for host in hosts
        if host in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert not named, named


def test_nothing_unpickles() -> None:
    """submitit's own job file is read by submitit; we read no pickle at all. (One is written: DCP's
    metadata, for plain DCP to read.)"""
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    found = []
    for path in _files("hpc_rl/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                writes = node.module == "pickle" and [alias.name for alias in node.names] == ["dumps"]
                names = [] if writes else [node.module or ""]
            found += [f"{path.relative_to(ROOT)}:{node.lineno}" for n in names if n.split(".")[0] in banned]
    assert not found, found


def test_no_two_test_files_are_one_module_to_pytest() -> None:
    """In folders that are no packages a test file is a module of its bare name."""
    loose = [path for path in _files("tests/**/test_*.py") if not (path.parent / "__init__.py").exists()]
    names = [path.stem for path in loose]
    assert not (twice := sorted({name for name in names if names.count(name) > 1})), twice
