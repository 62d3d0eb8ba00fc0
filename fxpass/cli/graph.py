"""``fxpass graph TARGET``: the step as text, JSON, dot, SVG or HTML, at any pass, or what two differ in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from ..analysis.view import GraphView, NodeView
from ..hallway.dry_run import CAPTURED, DryRun
from ..passes import PASSES
from ..report.diff import Change, diff
from .dry_run import dry_run_of
from .flags import across_ranks, backend_options, capture_options, common_options
from .output import console, print_json
from .usage import UsageProblem

FORMATS = ("text", "json", "dot", "svg", "html")
COLOURS = {"+": "green", "-": "red", "~": "yellow", "@": "dim"}


@dataclass(frozen=True)
class GraphResult:
    """The answer of ``fxpass graph``: nodes in order."""

    target: str
    point: str  # "captured", or the pass that has just run
    nodes: tuple[NodeView, ...]


@dataclass(frozen=True)
class DiffResult:
    """The answer of ``fxpass graph --diff A B``: nodes that appear, disappear or change."""

    target: str
    before: str
    after: str
    changes: tuple[Change, ...]


@click.argument("target")
@click.option(
    "--at", metavar="PASS", default="finish", help="the graph after PASS; captured: before the first"
)
@click.option("--diff", "between", nargs=2, metavar="A B", help="what changed between two points")
@click.option("--grep", metavar="REGEX", help="only lines that match")
@click.option("--around", metavar="NODE", help="only what is two edges around NODE")
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", help="[default: text]")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="write to a file")
@backend_options
@across_ranks
@capture_options
@common_options
def graph(
    target: str,
    *,
    at: str,
    between: tuple[str, str] | None,
    grep: str | None,
    around: str | None,
    form: str,
    output: Path | None,
    options: dict[str, Any],
    device: str | None,
    tensors: str,
    as_json: bool,
    traceback: bool,
) -> None:
    """Print the graph of TARGET's step.

    \b
    Example: fxpass graph gpt --at cast --grep softmax
             fxpass graph gpt --diff captured cast
             fxpass graph gpt --around addmm --format svg -o addmm.svg
    """
    points = between or (at,)
    for point in points:
        _check_point(point)
    pattern = _pattern(grep)
    run = dry_run_of(target, options, device, tensors, points=points)
    form = "json" if as_json else form
    if between:
        changes = diff(run.views[between[0]], run.views[between[1]])
        changes = tuple(c for c in changes if pattern is None or pattern.search(c.text))
        _write_diff(DiffResult(target, *between, changes), form, output)
        return
    shown = _select(run, at, pattern, around)
    _write(GraphResult(target, at, shown), run.views[at], form, output)


def _check_point(point: str) -> None:
    names = [CAPTURED, *(cls.name for cls in PASSES)]
    if point not in names:
        raise UsageProblem(f"there is no pass {point!r}", f"the points are {', '.join(names)}")


def _pattern(grep: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(grep) if grep is not None else None
    except re.error as error:
        raise UsageProblem(f"--grep {grep!r} is not a regular expression: {error}") from None


def _select(
    run: DryRun, at: str, pattern: re.Pattern[str] | None, around: str | None
) -> tuple[NodeView, ...]:
    view = run.views[at]
    nodes = view.nodes
    if around is not None:
        centre = view.find(around)
        if centre is None:
            raise UsageProblem(f"there is no node {around!r} at {at!r}", "find names with --grep")
        nodes = view.around(centre.name)
    return tuple(n for n in nodes if pattern is None or pattern.search(n.line()))


def _write(result: GraphResult, view: GraphView, form: str, output: Path | None) -> None:
    if form == "json":
        with _stream(output):
            print_json("graph", result)
    elif form == "text":
        lines = [(n.line(), "green" if n.made_by else "") for n in result.nodes]
        _print_lines(lines, output)
    else:
        from .drawing import to_dot, to_html, to_svg

        made = {"dot": to_dot, "svg": to_svg, "html": to_html}[form](
            result.nodes, f"{result.target} at {result.point}"
        )
        _put(made, output)


def _write_diff(result: DiffResult, form: str, output: Path | None) -> None:
    if form == "json":
        with _stream(output):
            print_json("graph-diff", result)
    elif form == "html":
        from .drawing import diff_to_html

        _put(diff_to_html(result.changes, f"{result.target}: {result.before} to {result.after}"), output)
    elif form != "text":
        raise UsageProblem(f"a diff has no format {form}", "use --format text, json or html")
    else:
        _print_lines(((f"{c.kind} {c.text}", COLOURS[c.kind]) for c in result.changes), output)


def _print_lines(lines: Iterable[tuple[str, str]], output: Path | None) -> None:
    if output is not None:
        output.write_text("".join(f"{text}\n" for text, _ in lines))
        return
    out = console()
    for text, style in lines:
        if out.is_terminal:
            out.print(Text(text, style=style), soft_wrap=True)
        else:
            print(text)


def _put(text: str, output: Path | None) -> None:
    if output is None:
        print(text)
    else:
        output.write_text(text)


def _stream(output: Path | None) -> Any:
    import contextlib

    if output is None:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(stack.enter_context(output.open("w"))))
    return stack
