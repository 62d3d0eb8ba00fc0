"""Rewrite docs/cli.md and docs/distributed.md: the output of every command in them, and the JSON schema.

In a ``console`` block each line ``$ fxpass ...`` is run and what it prints
replaces the lines after it; ``# first 20 lines`` or ``# last 10 lines`` behind
a command keeps only these. Run it as ``python docs/update_cli.py``; it takes a few minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

PAGE = Path(__file__).parent / "cli.md"
PAGES = (PAGE, PAGE.with_name("distributed.md"))
BLOCK = re.compile(r"(?m)^```console\n(.*?)^```$", re.DOTALL)
COMMAND = re.compile(r"^\$ fxpass (?P<args>.*?)(?:  # (?P<end>first|last) (?P<lines>\d+) lines)?$")
SCHEMA = re.compile(r"(<!-- schema -->\n).*?(<!-- end of schema -->)", re.DOTALL)


def output(args: str, lines: int | None = None, end: str | None = None) -> str:
    """What ``fxpass ARGS`` prints, or its first or last ``lines`` lines."""
    import shlex
    import warnings

    import torch

    from fxpass.cli.app import run

    torch.compiler.reset()
    printed = io.StringIO()
    # what torch warns of names a path of this machine
    with warnings.catch_warnings(), mock.patch.dict(os.environ):
        os.environ.pop("COLUMNS", None)
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            run(shlex.split(args))
    text = printed.getvalue().rstrip("\n")
    if lines and end == "last":
        return "\n".join(["...", *text.splitlines()[-lines:]]) + "\n"
    kept = text.splitlines()[:lines]
    return "\n".join([*kept, "..."] if len(kept) < len(text.splitlines()) else kept) + "\n"


def updated_block(match: re.Match[str]) -> str:
    """A console block with the output of its commands as it is now."""
    parts = []
    for line in match[1].splitlines():
        if command := COMMAND.match(line):
            print(line, file=sys.stderr)
            lines = int(command["lines"]) if command["lines"] else None
            parts.append(f"{line}\n{output(command['args'], lines, command['end'])}")
    return f"```console\n{''.join(parts)}```"


def schema() -> str:
    """One table per answer, from the dataclasses that are printed as JSON."""
    from fxpass.analysis.view import NodeView
    from fxpass.analysis.wire import Transfer
    from fxpass.cli import compile as compile_command
    from fxpass.cli import doctor, explain, graph, memory, passes, report
    from fxpass.passes.pipeline import PassRecord
    from fxpass.report import diff, explanation, inspection, launches
    from fxpass.report import memory as memory_data

    answers = {
        "inspect": inspection.Inspection,
        "graph": graph.GraphResult,
        "graph-diff": graph.DiffResult,
        "memory": memory.MemoryResult,
        "report": report.ReportResult,
        "compile": compile_command.CompileResult,
        "explain": explain.ExplainResult,
        "passes": passes.PassesResult,
        "doctor": doctor.DoctorResult,
    }
    parts = (
        *(inspection.Region, PassRecord, inspection.Precision, inspection.Float32, NodeView),
        *(diff.Change, memory.Mode, memory_data.MemorySummary, memory_data.PhaseMemory, memory_data.Alive),
        *(explanation.Explanation, passes.PassInfo, doctor.Check, Transfer),
        *(compile_command.CompiledGraph, launches.Launches, launches.PhaseLaunches),
        *(launches.PassLaunches, launches.KernelResources),
    )
    tables = [_table(f'`"schema": "fxpass.{name}/1"`', cls) for name, cls in answers.items()]
    return "\n".join(tables + [_table(f"`{cls.__name__}`", cls) for cls in parts])


def _table(title: str, cls: Any) -> str:
    source = inspect.getsource(cls)
    rows = []
    for field in dataclasses.fields(cls):
        comment = re.search(rf"(?m)^ +{field.name}: [^#\n]*#(.*)$", source)
        kind = str(field.type).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{kind}` | {comment[1].strip() if comment else ''} |")
    said = (cls.__doc__ or "").strip().splitlines()[0]
    return "\n".join([f"**{title}**: {said}", "", "| field | type | |", "|---|---|---|", *rows, ""])


def main() -> None:
    """Rewrite the pages in place."""
    for page in PAGES:
        text = BLOCK.sub(updated_block, page.read_text())
        page.write_text(SCHEMA.sub(lambda m: f"{m[1]}\n{schema()}\n{m[2]}", text))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
