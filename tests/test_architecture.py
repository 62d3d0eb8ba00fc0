"""Data flows one way: the import table of docs/layout.md, and that private torch stays in one folder."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fxpass"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "timing": set(),
    "_torch": {
        "errors",
        "ir.alias",
        "ir.marks",
        "ir.provenance",
        "ir.shards",
        "ir.slots",
        "ir.unbacked",
        "timing",
    },
    "ir": {"errors"},
    "capture": {"_torch", "errors", "ir"},
    "analysis": {"ir", "errors"},
    "scaling": {"errors", "ir"},
    "runtime": {"_torch", "errors", "ir.slots", "scaling"},
    "options": {"errors", "ir.dtypes", "scaling"},
    "passes": {"_torch", "analysis", "errors", "ir", "options", "runtime.watch", "scaling", "timing"},
    "lower": {"_torch", "analysis", "errors", "ir", "options", "timing"},
    # the hallway's rooms stand on both sides of the backend
    "hallway.graph_record": {"analysis", "passes"},
    "hallway.logs": {"hallway.graph_record"},
    "hallway.dry_run_hooks": {"analysis", "ir", "options"},
    "hallway.keep": {
        *("_torch", "analysis", "capture", "hallway.dry_run_hooks", "ir", "lower", "options", "passes")
    },
    "hallway.frame": {
        *("_torch", "analysis", "capture", "errors", "ir", "lower", "options", "passes", "runtime", "timing"),
        *("hallway.dry_run_hooks", "hallway.graph_record", "hallway.keep", "hallway.logs"),
    },
    "backend": {"_torch", "errors", "hallway.frame", "hallway.graph_record", "options", "runtime"},
    "integrations": {"backend", "errors"},
    "hallway.dry_run": {
        *("_torch", "analysis", "backend", "errors", "ir", "lower", "options"),
        *("hallway.dry_run_hooks", "hallway.frame", "hallway.graph_record"),
    },
    "hallway.ahead": {"_torch", "backend", "errors", "hallway.graph_record"},
    "report": {"__init__", "analysis", "hallway.dry_run", "ir", "passes"},
    "cli": {
        *("__init__", "analysis", "errors", "hallway.ahead", "hallway.dry_run", "hallway.graph_record"),
        *("options", "passes", "report", "scaling"),
    },
    "loop": {"backend", "errors"},
    "sharded": {"_torch", "errors"},
    "__init__": {
        *("backend", "errors", "hallway.graph_record", "integrations"),
        *("loop", "runtime", "scaling", "sharded"),
    },
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


def within(name: str, home: str) -> bool:
    """Whether a module, by its dotted name, is the one or in the folder that a line of the table is about."""
    return name == home or name.startswith(f"{home}.")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_what_is_above_it(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if module == "hallway.__init__":
        assert not imports(path)
        return
    (own,) = (home for home in ALLOWED if within(module, home))
    for name in imports(path):
        top = name.split(".")[0] or "__init__"
        if own in ("cli", "__init__") and not (ROOT / top).exists() | (ROOT / f"{top}.py").exists():
            continue  # `from . import MixedPrecision`
        assert any(within(name, home) for home in (own, *ALLOWED[own])), f"{own} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_is_only_in_torch_folder(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "_torch":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not [n for n in names if n.startswith(PRIVATE)], f"{path.name} imports {names}"


# What every backend uses, public in all but name: operators and their schemas, pytrees, a schema's types.
KNOWN = {"_ops", "_schema", "_pytree", "OptionalType", "JitType"}
# VIEWS is read off the schemas of all operators, in a folder that `_torch` itself imports.
EXCEPT = {("ir/alias.py", "_jit_get_all_schemas")}
NAMED_TUPLE = {"_fields", "_replace", "_asdict"}


def test_private_attributes_are_only_in_torch_folder() -> None:
    for path in OURS:
        where = str(path.relative_to(ROOT))
        found = {name for node in ast.walk(ast.parse(path.read_text())) for name in _private(node)}
        found -= KNOWN | NAMED_TUPLE | {name for file, name in EXCEPT if file == where}
        assert not found, f"{where} reads {found}"


def test_which_names_are_private() -> None:
    for text in (
        "torch._C._set_grad_enabled(False)",
        "optimizer._step_count",
        "torch._C.Graph()",
        "from torch.optim._functional import adam",
        "getattr(kind, '_init_group')",
        "tensor.untyped_storage()._cdata",
    ):
        assert [name for node in ast.walk(ast.parse(text)) for name in _private(node)], text
    for text in ("self._running", "aten._to_copy.default", "torch.ops.prims._make_token", "sys._getframe()"):
        assert not [name for node in ast.walk(ast.parse(text)) for name in _private(node)], text


def _private(node: ast.AST) -> Iterator[str]:
    """Private names of others that a node reads or imports."""
    if isinstance(node, ast.Attribute):
        parts = ast.unparse(node).split(".")
        if parts[0] in ("aten", "prims") or parts[:2] in (["torch", "ops"], ["self", "edit"]):
            return  # an operator's name
        inner = parts[-2] == "_C" and node.attr[0] != "_"  # of torch._C all is private
        own = node.attr in OWN or parts[0] == "sys" or node.attr == "_C" or node.attr.startswith("_fxpass")
        if inner or (node.attr.startswith("_") and not node.attr.startswith("__") and not own):
            yield node.attr
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
        if str(name).startswith("_") and not str(name).startswith(("__", "_fxpass")):
            yield str(name)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        parts = (node.module or "").split(".")
        yield from (p for p in parts if p.startswith("_") and not p.startswith("__"))


def _defined(tree: ast.AST) -> Iterator[str]:
    """Private names that a file of ours gives to what it defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


OURS = [p for p in FILES if p.relative_to(ROOT).parts[0] not in ("_torch", "integrations")]
OWN = {name for path in OURS for name in _defined(ast.parse(path.read_text())) if name.startswith("_")}


def test_a_pass_never_imports_another_pass() -> None:
    for path in (ROOT / "passes").glob("*.py"):
        if path.name == "__init__.py":
            continue
        # norms: what the clips have in common; across: numbers about what is spread over ranks
        allowed = {"passes.graph_pass", "passes.results", "passes.norms", "passes.across"}
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


def test_files_that_texts_name_are_there() -> None:
    top = ROOT.parent
    for path in (*top.glob("*.md"), *(top / "docs").glob("*.md"), *FILES):
        named = set(
            re.findall(r"(?:fxpass|tests|bench|docs|examples)/[\w/]+\.(?:py|md|json)\b", path.read_text())
        )
        missing = {name for name in named if not (top / name).exists()}
        assert not missing, f"{path.name} names {missing}"


def test_a_file_stem_has_one_meaning() -> None:
    """A word may stand for a fact, how it is shown and the command that shows it; else for one file."""
    stems = [p.stem for p in FILES if not p.stem.startswith("__") and p.parent.name not in ("cli", "report")]
    assert not {stem for stem in stems if stems.count(stem) > 1}


def test_files_and_functions_are_small() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.name} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{path.name}:{node.name} is too long"
