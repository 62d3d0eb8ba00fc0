"""``torch.utils.checkpoint`` in the step: what is marked for recomputation is computed again in backward.

AOTAutograd's own pass for graphs that contain their backward stops at random
numbers and at a second ``backward()``. Here each backward gets its own copies,
and random operations are not repeated: their results are kept.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

_RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def recompute_checkpoints(graph: Graph) -> None:
    """Let each run of backward nodes read its own copies of the checkpointed nodes it needs."""
    again = {n for n in graph.nodes if _is_marked(n)}
    again -= {n for n in again if _leaves_region(n)}
    copies: dict[Node, Node] = {}
    for node in list(graph.nodes) if again else ():
        if not _is_backward(node):
            copies.clear()
            continue
        with graph.inserting_before(node):
            for needed in _needed(node, again - copies.keys()):
                copy = graph.node_copy(needed, lambda n: copies.get(n, n))
                copy.meta["autograd_backward"] = True
                copies[needed] = copy
        for old in [n for n in node.all_input_nodes if n in copies]:
            node.replace_input_with(old, copies[old])
    if again:
        graph.eliminate_dead_code()


def _needed(node: Node, again: set[Node]) -> list[Node]:
    """The nodes of ``again`` that ``node`` reads, directly or through others of them, inputs first."""
    needed: dict[Node, None] = {}
    stack = [(n, False) for n in node.all_input_nodes if n in again]
    while stack:
        current, inputs_done = stack.pop()
        if inputs_done:
            needed.setdefault(current)
        elif current not in needed:
            stack.append((current, True))
            stack += [(n, False) for n in current.all_input_nodes if n in again]
    return list(needed)


def _is_backward(node: Node) -> bool:
    return bool(node.meta.get("autograd_backward"))


def _is_marked(node: Node) -> bool:
    if node.op != "call_function" or node.meta.get("recompute") not in _RECOMPUTE or _is_backward(node):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _leaves_region(node: Node) -> bool:
    """Whether another checkpoint reads the value: it is that one's input, kept like any input."""
    region = node.meta.get("ac_graph_id")
    return any(
        n.meta.get("ac_graph_id") != region for n in node.users if not _is_backward(n) and _is_marked(n)
    )
