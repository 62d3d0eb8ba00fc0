"""`python -m bench.programs`: every program, compiled, with torch.amp and in float32, for 8 steps.

Rows are kept in the JSON file as they are done; a run that was interrupted goes on with `--resume`.
`python docs/update_programs.py` makes docs/programs.md of it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import measure
from bench.programs.pool import run_all
from bench.programs.program import Program, programs

OUT = Path("out/programs.json")


def main() -> None:
    args = _arguments()
    logging.disable(logging.WARNING)
    console = Console()
    known = programs()
    chosen = [p for p in known if (not args.quick or p.quick) and _wanted(p, args.only)]
    options = dict(args.option)
    commit = measure.machine(torch.device("cpu"))["commit"]
    rows = _rows(args.json) if args.resume or args.again else {}
    done = {name for name, row in rows.items() if row["options"] == options}
    if args.again:
        done = {name for name in done if rows[name]["verdict"] == "ok"}
    chosen = [p for p in chosen if p.name not in done]
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("programs", total=len(chosen))
        for row in run_all(chosen, args.jobs, options, args.timeout):
            trace = row.pop("trace")
            rows[row["name"]] = {**row, "commit": commit}
            bar.update(task, advance=1, description=row["name"])
            if row["verdict"] != "ok" or args.verbose:
                console.print(f"{row['name']}: {row['verdict']}", highlight=False, markup=False)
            if trace and args.verbose:
                console.print(trace, highlight=False, markup=False)
            _write(args.json, [rows[p.name] for p in known if p.name in rows])
    good = sum(rows[p.name]["verdict"] == "ok" for p in known if p.name in rows)
    console.print(f"{good} of {len(rows)} programs train as torch.amp or float32 does: {args.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the 40 that CI runs")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names or families, as fnmatch has them")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one (600)")
    parser.add_argument("--json", type=Path, default=OUT, help=f"where the rows go ({OUT})")
    parser.add_argument("--resume", action="store_true", help="leave out what the JSON file has")
    parser.add_argument("--again", action="store_true", help="leave out what went well in the JSON file")
    parser.add_argument("--verbose", action="store_true", help="say what went well too")
    parser.add_argument(
        "--option",
        type=lambda text: tuple(text.split("=", 1)),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of fxpass, as codegen=eager; the table is made without",
    )
    return parser.parse_args()


def _wanted(program: Program, patterns: list[str] | None) -> bool:
    names = program.name, program.family
    return patterns is None or any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text())["results"]} if path.exists() else {}


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": measure.machine(torch.device("cpu")), "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
