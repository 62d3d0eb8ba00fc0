"""A graph as dot, SVG or one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..analysis.view import NodeView
from ..report.diff import Change
from .usage import UsageProblem

FILL = {"input": "#e8e8e8", "forward": "#dbeafe", "backward": "#ede9fe", "update": "#dcfce7"}
INSERTED = "#fde68a"

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>:root{{color-scheme:light dark}}
body{{font:13px/1.5 ui-monospace,monospace;margin:1.5em;white-space:pre}}
.plus{{color:light-dark(#15803d,#4ade80)}}.minus{{color:light-dark(#b91c1c,#f87171)}}</style>
<b>{title}</b>
{body}
"""


def to_dot(nodes: Sequence[NodeView], title: str) -> str:
    """Graphviz source: one box per node, inserted ones yellow."""
    return _graph(nodes, title).to_string()


def to_svg(nodes: Sequence[NodeView], title: str) -> str:
    """An SVG by graphviz's ``dot``.

    Raises:
        UsageProblem: graphviz is not installed.
    """
    try:
        return _graph(nodes, title).create_svg().decode()  # pyrefly: ignore[missing-attribute]
    except FileNotFoundError:
        hint = "install graphviz (its `dot` draws the picture), or use --format dot"
        raise UsageProblem("SVG needs graphviz, which is not installed", hint) from None


def to_html(nodes: Sequence[NodeView], title: str) -> str:
    """A page with the text, inserted nodes in green."""
    return _page(title, ((n.line(), "plus" if n.made_by else "") for n in nodes))


def diff_to_html(changes: Iterable[Change], title: str) -> str:
    """A page with the changes, coloured."""
    return _page(title, ((f"{c.kind} {c.text}", "plus" if c.kind == "+" else "minus") for c in changes))


def _page(title: str, lines: Iterable[tuple[str, str]]) -> str:
    body = "\n".join(f'<span class="{kind}">{escape(text)}</span>' for text, kind in lines)
    return PAGE.format(title=escape(title), body=body)


def _graph(nodes: Sequence[NodeView], title: str):
    try:
        import pydot
    except ImportError:
        raise UsageProblem("dot and SVG need pydot", "pip install 'fxpass[cli]'") from None

    graph = pydot.Dot("step", graph_type="digraph", label=_quoted(title), rankdir="TB")
    shown = {n.name for n in nodes}
    for n in nodes:
        colour = INSERTED if n.made_by else FILL.get(n.phase, "#ffffff")
        label = _quoted(f"{n.name}\\n{n.op.removeprefix('aten.')}\\n{n.type}")
        graph.add_node(
            pydot.Node(_quoted(n.name), label=label, shape="box", style="filled", fillcolor=_quoted(colour))
        )
    for n in nodes:
        for source in n.inputs:
            if source in shown:
                graph.add_edge(pydot.Edge(_quoted(source), _quoted(n.name)))
    return graph


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
