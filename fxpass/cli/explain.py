"""``fxpass explain NODE``: who made a node, from which nodes, and why it has its dtype."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console

from ..report.explanation import Explanation, explanations
from .dry_run import dry_run_of
from .flags import across_ranks, backend_options, capture_options, common_options
from .output import console, print_json
from .usage import UsageProblem


@dataclass(frozen=True)
class ExplainResult:
    """The answer of ``fxpass explain``."""

    target: str
    nodes: tuple[Explanation, ...]


@click.argument("words", nargs=-1, metavar="[TARGET] NODE", required=True)
@click.option("--inserted", is_flag=True, help="only nodes that a pass inserted")
@backend_options
@across_ranks
@capture_options
@common_options
def explain(
    words: tuple[str, ...],
    *,
    inserted: bool,
    options: dict[str, Any],
    device: str | None,
    tensors: str,
    as_json: bool,
    traceback: bool,
) -> None:
    """Say who made NODE of TARGET's step (default: gpt), from which nodes, and why it has its dtype.

    NODE may be a pattern with * and ?.

    \b
    Example: fxpass explain addmm_3
             fxpass explain train.py:example '*softmax*'
             fxpass explain gpt '*' --inserted
    """
    if len(words) > 2:
        raise UsageProblem(f"got {len(words)} words", "give TARGET and one NODE, or a quoted pattern")
    target, pattern = ("gpt", *words)[-2:]
    run = dry_run_of(target, options, device, tensors)
    explained = tuple(e for e in explanations(run, pattern) if not inserted or e.reason)
    if not explained:
        names = [n.name for n in run.final.nodes]
        near = difflib.get_close_matches(pattern, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"list names with: fxpass graph {target}"
        raise UsageProblem(f"there is no node {pattern!r} in {target}", hint)
    if as_json:
        print_json("explain", ExplainResult(target, explained))
        return
    out = console()
    for explanation in explained:
        show(explanation, out)


def show(explanation: Explanation, out: Console) -> None:
    """Print one explanation for a person."""
    out.print(explanation.text, style="bold", markup=False, soft_wrap=True)
    rows = {
        "made by": f"pass {explanation.made_by}: {explanation.reason}"
        if explanation.reason
        else explanation.made_by,
        "phase": explanation.phase,
        "reads": ", ".join(explanation.sources),
        "read by": ", ".join(explanation.readers),
        "dtype": f"{explanation.dtype}: {explanation.why_dtype}"
        if explanation.dtype
        else explanation.why_dtype,
        "module": explanation.module,
        "where": explanation.where,
        "removed": f"by pass {explanation.removed_by}: it is not in the compiled graph"
        if explanation.removed_by
        else "",
    }
    for name, value in rows.items():
        if value:
            out.print(f"  {name:<8} {value}", markup=False, soft_wrap=True)
