"""Who made a node, from which nodes, and why it has its dtype: as data."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from ..analysis.view import INPUT, GraphView, NodeView
from ..analysis.why import why_dtype
from ..hallway.dry_run import DryRun


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


def explanations(run: DryRun, pattern: str) -> list[Explanation]:
    """Every node that ``pattern`` names, those that a later pass removed last."""
    final = run.final
    explained = [explain_node(final, n, "") for n in final.nodes if _matches(n, pattern)]
    seen = {n.name for n in final.nodes}
    views = list(run.views.values())
    for graph, following in reversed(list(pairwise(views))):
        for node in graph.nodes:
            if node.name not in seen and _matches(node, pattern):
                seen.add(node.name)
                explained.append(explain_node(graph, node, following.point))
    return explained


def _matches(node: NodeView, pattern: str) -> bool:
    return pattern in (node.name, node.node) or fnmatchcase(node.name, pattern)


def explain_node(graph: GraphView, node: NodeView, removed_by: str = "") -> Explanation:
    """What is known of one node; ``removed_by``: the pass that removed it, if one did."""
    made_by = node.made_by or (
        "the caller" if node.op == INPUT else "autograd" if node.phase == "backward" else "the user's code"
    )
    sources = tuple(f"{n}: {graph.by_name[n].type}" for n in node.inputs if n in graph.by_name)
    why = why_dtype(graph, node)
    text = node.line().partition("  # ")[0]
    return Explanation(
        node=node.name,
        text=text,
        phase=node.phase,
        made_by=made_by,
        reason=node.reason,
        sources=sources,
        readers=tuple(graph.readers.get(node.name, ())),
        dtype=node.dtype,
        why_dtype=why,
        where=node.where,
        module=node.module,
        removed_by=removed_by,
    )
