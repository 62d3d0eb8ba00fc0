"""What changed between two points of the pipeline, node by node."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..analysis.view import GraphView


@dataclass(frozen=True)
class Change:
    """One line of a diff."""

    kind: str  # "+" appears, "-" is gone; a node that changed is a "-" and a "+"
    node: str
    text: str


def diff(before: GraphView, after: GraphView) -> tuple[Change, ...]:
    """The nodes that appear, are gone or changed, in the order of the graph.

    Aligned by name, as a line of text would be by its content: passes keep the
    names of what they do not touch.
    """
    old, new = [n.line() for n in before.nodes], [n.line() for n in after.nodes]
    names = [n.name for n in before.nodes], [n.name for n in after.nodes]
    changes: list[Change] = []
    matcher = difflib.SequenceMatcher(None, *names, autojunk=False)
    for _, a, b, c, d in matcher.get_opcodes():
        for i, j in zip(range(a, b), range(c, d), strict=False):
            if names[0][i] == names[1][j] and old[i] == new[j]:
                continue
            changes += [Change("-", names[0][i], old[i]), Change("+", names[1][j], new[j])]
        common = min(b - a, d - c)
        changes += [Change("-", names[0][i], old[i]) for i in range(a + common, b)]
        changes += [Change("+", names[1][j], new[j]) for j in range(c + common, d)]
    return tuple(changes)
