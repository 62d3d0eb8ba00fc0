"""Which module of the user's model a node belongs to, and which nodes must stay in float32."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from torch.fx import Node

from ..errors import OptionError, nearest
from ..ir.graph import FP32, Phase, StepGraph, is_tagged, phase

_ACCESS = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
Path = tuple[str, ...]


def module_names(step: StepGraph) -> dict[Node, tuple[str, ...]]:
    """Names of the modules around each forward node, outermost first, as ``named_modules()`` gives them.

    The graph does not know what the user calls the root. If the step calls one
    module, names are relative to it. If it calls several (``self.model`` and
    ``self.loss``, or ``model.blocks[0]`` and ``model.head``), each may be a root
    or a part of one, and a node answers to its name relative to either.
    """
    stacks = {n: paths for n in step.nodes() if (paths := _paths(n))}
    several = len({paths[0] for paths in stacks.values()}) > 1
    names = {}
    for node, paths in stacks.items():
        depth = len(paths[0])
        roots = range(1, depth + 1) if several else (depth,)
        names[node] = tuple(".".join(path[root:]) for path in paths for root in roots if path[root:])
    return names


def _paths(node: Node) -> list[Path]:
    """Attribute paths from the local or global variable on: ``L['self'].model.blocks.0`` in parts."""
    stack = node.meta.get("nn_module_stack") or {}
    texts = (path.replace("._modules[", "[") for path, _ in stack.values())
    return [
        tuple(next(g for g in m.groups() if g is not None) for m in _ACCESS.finditer(text)) for text in texts
    ]


def check_patterns(step: StepGraph, patterns: tuple[str, ...]) -> None:
    """Raise ``OptionError`` for a pattern of ``keep_fp32`` that no module of the step matches."""
    if not patterns or not step.trains:
        return
    names = sorted({name for names in module_names(step).values() for name in names})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = nearest(pattern, names) or f"the modules are {', '.join(names) or 'none'}"
            raise OptionError(
                f"option keep_fp32: {pattern!r} matches no module that the step runs", hint=hint
            )


def nodes_kept(step: StepGraph, patterns: tuple[str, ...]) -> set[Node]:
    """Nodes of modules that match a pattern or of regions with autocast off, and their backward nodes."""
    names = module_names(step) if patterns else {}
    kept = {
        node
        for node in step.nodes()
        if is_tagged(node, FP32)
        or any(fnmatchcase(name, pattern) for name in names.get(node, ()) for pattern in patterns)
    }
    sequence = {n.meta["seq_nr"] for n in kept if "seq_nr" in n.meta}
    return kept | {n for n in step.nodes() if phase(n) is Phase.BACKWARD and n.meta.get("seq_nr") in sequence}
