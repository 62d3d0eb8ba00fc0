"""The tables in docs/memory.md and docs/programs.md are those of the committed JSON files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_tables_are_current() -> None:
    text = (DOCS / "memory.md").read_text()
    assert text.count("<!-- end -->") == 4
    assert script("update_memory").filled(text) == text


def test_the_table_of_programs_is_current() -> None:
    text = (DOCS / "programs.md").read_text()
    assert script("update_programs").filled(text) == text, "run python docs/update_programs.py"
