"""The tables in docs/memory.md are those of the committed JSON files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_memory_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location("update_memory", DOCS / "update_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (DOCS / "memory.md").read_text()
    assert text.count("<!-- end -->") == 4
    assert module.filled(text) == text
