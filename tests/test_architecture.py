"""Data flows one way: the import table of docs/layout.md, and that private torch stays in one folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fxpass"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "clock": set(),
    "progress": {"clock"},
    "_torch": {"clock", "errors", "ir.alias", "ir.marks", "ir.slots", "ir.unbacked", "progress"},
    "ir": {"errors"},
    "capture": {"_torch", "errors", "ir"},
    "analysis": {"ir", "errors"},
    "runtime": {"_torch", "errors", "ir.slots"},
    "options": {"errors", "runtime"},
    "passes": {"_torch", "clock", "ir", "analysis", "errors", "options", "runtime.scale", "runtime.watch"},
    "lower": {"_torch", "analysis", "clock", "errors", "ir", "options"},
    "record": {"analysis", "passes"},
    "logs": {"record"},
    "look": {"analysis", "ir", "options"},
    "keep": {"_torch", "analysis", "capture", "ir", "look", "lower", "options", "passes"},
    "compile": {
        *(
            "_torch",
            "analysis",
            "capture",
            "clock",
            "errors",
            "ir",
            "keep",
            "logs",
            "look",
            "lower",
            "options",
            "passes",
            "record",
            "runtime",
        )
    },
    "backend": {"_torch", "compile", "errors", "options", "record", "runtime"},
    "integrations": {"backend", "errors"},
    "dry_run": {
        *("_torch", "analysis", "backend", "compile", "errors", "ir", "look", "lower", "options", "record")
    },
    "ahead": {"_torch", "backend", "errors", "record"},
    "report": {"__init__", "analysis", "dry_run", "ir", "passes"},
    "cli": {
        *("__init__", "ahead", "analysis", "dry_run", "errors"),
        *("options", "passes", "record", "report", "runtime"),
    },
    "loop": {"backend", "errors"},
    "__init__": {"backend", "errors", "integrations", "loop", "record", "runtime"},
}
FILES = sorted(p for p in ROOT.rglob("*.py"))
PRIVATE = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch._guards", "torch._subclasses")


def imports(path: Path) -> list[str]:
    """Modules of fxpass that a file imports, function-local imports too, as dotted names below fxpass."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            inner = [*base, *(node.module.split(".") if node.module else [])]
            found += [".".join(inner if node.module else [*inner, a.name]) for a in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_what_is_above_it(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[0]
    for name in imports(path):
        top = name.split(".")[0] or "__init__"
        if own in ("cli", "__init__") and not (ROOT / top).exists() | (ROOT / f"{top}.py").exists():
            continue  # `from . import MixedPrecision`
        if top == own:
            continue
        assert any(name == a or name.startswith(f"{a}.") for a in ALLOWED[own]), (
            f"{own} must not import {name}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_is_only_in_torch_folder(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "_torch":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not [n for n in names if n.startswith(PRIVATE)], f"{path.name} imports {names}"


def test_a_pass_never_imports_another_pass() -> None:
    for path in (ROOT / "passes").glob("*.py"):
        if path.name == "__init__.py":
            continue
        allowed = {"passes.base", "passes.norms"}  # norms: what the clip passes have in common
        found = [n for n in imports(path) if n.startswith("passes.") and n not in allowed]
        assert not found, f"{path.name} imports {found}"


def test_the_layout_names_what_there_is() -> None:
    text = (ROOT.parent / "docs" / "layout.md").read_text()
    named = set(re.findall(r"(?<![\w*])\w+\.py", text))
    one_each = ("passes", "cli", "integrations")  # a file per pass, command and library: described as such
    there = {p.name for p in FILES if not p.name.startswith("__") and p.parent.name not in one_each}
    assert not there - named, "not in docs/layout.md"
    found = {p.name for folder in (ROOT, ROOT.parent / "tests") for p in folder.rglob("*.py")}
    assert not named - found, "in docs/layout.md alone"


def test_files_and_functions_are_small() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.name} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{path.name}:{node.name} is too long"
