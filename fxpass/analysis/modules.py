"""Which module of the user's model a node belongs to."""

from __future__ import annotations

import re

from torch.fx import Node

_ACCESS = re.compile(r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)")


def module_names(node: Node) -> tuple[str, ...]:
    """Qualified names of the modules around the node, outermost first, as ``named_modules()`` gives them.

    The root's own name (a local, a global, an attribute of a trainer) is unknown
    to the graph: names are relative to the outermost module on the stack.
    """
    stack = node.meta.get("nn_module_stack") or {}
    paths = [_parts(path) for path, _ in stack.values()]
    if not paths:
        return ()
    root = len(paths[0])
    return tuple(".".join(path[root:]) for path in paths[1:])


def _parts(path: str) -> list[str]:
    return [next(g for g in match.groups() if g is not None) for match in _ACCESS.finditer(path)]
