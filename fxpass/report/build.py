"""One self-contained HTML file about one step: its data as JSON, and a page that shows it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from importlib.resources import files
from itertools import pairwise
from string import Template
from typing import Any

import torch

from ..analysis.memory import MemoryProfile
from ..analysis.view import GraphView
from ..hallway.dry_run import DryRun
from ..passes import PASSES
from .diff import diff
from .explanation import explain_node
from .inspection import inspection
from .memory import page_data


def build(target: str, run: DryRun, profile: MemoryProfile | None = None, *, only: str = "") -> str:
    """The page for ``run``, which must have kept the graph at every point.

    Args:
        profile: the memory to show, ``run``'s own by default; at other sizes, for instance.
        only: the one section to show, "memory" for instance; "" shows all.

    Raises:
        ImportError: plotly, which draws the timeline, is not installed.
    """
    from plotly.offline import get_plotlyjs

    page, style, script = (
        files("fxpass.report").joinpath(f"page.{kind}").read_text() for kind in ("html", "css", "js")
    )
    text = json.dumps(report_data(target, run, profile or run.memory), separators=(",", ":"))
    return Template(page).substitute(
        title=escape(f"fxpass: {target}"),
        style=style,
        script=script,
        plotly=get_plotlyjs(),
        data=text.replace("</", "<\\/"),  # a "</script>" inside a string would end the element
        only=only,
        version=importlib.metadata.version("fxpass"),
        torch=torch.__version__,
    )


def report_data(target: str, run: DryRun, profile: MemoryProfile) -> dict[str, Any]:
    """What the page shows, as plain values."""
    inspected = inspection(target, run)
    summaries = {cls.name: (cls.__doc__ or "").strip().splitlines()[0].replace("`", "") for cls in PASSES}
    before, after = next(iter(run.views.values())), run.final
    return {
        "inspection": asdict(inspected),
        "cards": list(_cards(run, profile)),
        "summaries": summaries,
        "nodes": list(_nodes(after)),
        "diffs": [{"point": b.point, **_diff(a, b)} for a, b in pairwise(run.views.values())],
        "whole": _diff(before, after),
        "memory": page_data(profile, run.memory_of),
    }


def _cards(run: DryRun, profile: MemoryProfile) -> Iterator[tuple[str, str]]:
    before, after = next(iter(run.views.values())), run.final
    yield "parameters updated", f"{run.parameters:,}"
    yield "nodes captured", f"{len(before.nodes):,}"
    yield "nodes compiled", f"{len(after.nodes):,}"
    yield "of these inserted", f"{sum(bool(n.made_by) for n in after.nodes):,}"
    yield "bytes at the peak", f"{profile.peak.bytes:,}"
    yield "bytes per parameter", f"{profile.peak.bytes / max(run.parameters, 1):.2f}"
    if run.ranks > 1:
        yield f"bytes sent by each of {run.ranks} ranks", f"{sum(t.sent for t in run.transfers):,}"
    yield "captured on", f"{run.device}, {run.tensors} tensors"


def _nodes(graph: GraphView) -> Iterator[dict[str, Any]]:
    for node in graph.nodes:
        explained = explain_node(graph, node)
        yield {
            **asdict(node),
            "line": node.line(),
            "explained": {"made_by": explained.made_by, "why_dtype": explained.why_dtype},
        }


def _diff(before: GraphView, after: GraphView) -> dict[str, Any]:
    return {"changes": [(c.kind, c.text) for c in diff(before, after)]}
