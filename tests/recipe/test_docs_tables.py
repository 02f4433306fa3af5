"""The key tables in the docs are those of the schemas."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location("schema_tables", ROOT / "tools" / "schema_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for page in tool.tables():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert tool.filled(page, text) == text, (
            f"docs/{page} is behind its schema: run python tools/schema_tables.py"
        )
