"""``fxpass explain NODE``: who made a node, from which nodes, and why it has its dtype."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import click
from rich.console import Console

from ..analysis.view import INPUT, GraphView, NodeView
from ..analysis.why import why_dtype
from ..dry_run import DryRun
from .errors import UsageProblem
from .flags import backend_options, capture_options, common_options
from .look import look_at
from .output import console, print_json


@dataclass(frozen=True)
class Explanation:
    """What is known of one node."""

    node: str
    text: str  # name: type = op(arguments)
    phase: str
    made_by: str  # a pass, "the user's code", "autograd" or "the caller" (an input)
    reason: str  # why the pass inserted it
    sources: tuple[str, ...]  # name: type of each node it reads
    readers: tuple[str, ...]
    dtype: str
    why_dtype: str
    where: str  # the user's line it comes from
    module: str
    removed_by: str  # the pass that removed it again; "" if it is compiled


@dataclass(frozen=True)
class ExplainResult:
    """The answer of ``fxpass explain``."""

    target: str
    nodes: tuple[Explanation, ...]


@click.argument("words", nargs=-1, metavar="[TARGET] NODE", required=True)
@click.option("--inserted", is_flag=True, help="only nodes that a pass inserted")
@backend_options
@capture_options
@common_options
def explain(
    words: tuple[str, ...],
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
    run = look_at(target, options, device, tensors)
    found = tuple(e for e in explanations(run, pattern) if not inserted or e.reason)
    if not found:
        names = [n.name for n in run.final.nodes]
        near = difflib.get_close_matches(pattern, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"list names with: fxpass graph {target}"
        raise UsageProblem(f"there is no node {pattern!r} in {target}", hint)
    if as_json:
        print_json("explain", ExplainResult(target, found))
        return
    out = console()
    for explanation in found:
        show(explanation, out)


def explanations(run: DryRun, pattern: str) -> list[Explanation]:
    """Every node that ``pattern`` names, those that a later pass removed last."""
    final = run.final
    found = [_explain(final, n, "") for n in final.nodes if _matches(n, pattern)]
    seen = {n.name for n in final.nodes}
    views = list(run.views.values())
    for graph, following in reversed(list(pairwise(views))):
        for node in graph.nodes:
            if node.name not in seen and _matches(node, pattern):
                seen.add(node.name)
                found.append(_explain(graph, node, following.point))
    return found


def _matches(node: NodeView, pattern: str) -> bool:
    return pattern in (node.name, node.node) or fnmatchcase(node.name, pattern)


def _explain(graph: GraphView, node: NodeView, removed_by: str) -> Explanation:
    made_by = node.made_by or (
        "the caller" if node.op == INPUT else "autograd" if node.phase == "backward" else "the user's code"
    )
    readers = tuple(n.name for n in graph.nodes if node.name in n.inputs)
    sources = tuple(f"{n}: {graph.by_name[n].type}" for n in node.inputs if n in graph.by_name)
    why = why_dtype(graph, node)
    text = node.line().partition("  # ")[0]
    return Explanation(
        node.name,
        text,
        node.phase,
        made_by,
        node.reason,
        sources,
        readers,
        node.dtype,
        why,
        node.where,
        node.module,
        removed_by,
    )


def show(found: Explanation, out: Console) -> None:
    """Print one explanation for a person."""
    out.print(found.text, style="bold", markup=False, soft_wrap=True)
    rows = {
        "made by": f"pass {found.made_by}: {found.reason}" if found.reason else found.made_by,
        "phase": found.phase,
        "reads": ", ".join(found.sources),
        "read by": ", ".join(found.readers),
        "dtype": f"{found.dtype}: {found.why_dtype}" if found.dtype else found.why_dtype,
        "module": found.module,
        "where": found.where,
        "removed": f"by pass {found.removed_by}: it is not in the compiled graph" if found.removed_by else "",
    }
    for name, value in rows.items():
        if value:
            out.print(f"  {name:<8} {value}", markup=False, soft_wrap=True)
