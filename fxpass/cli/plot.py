"""The memory timeline in a terminal: one column of characters for a stretch of moments."""

from __future__ import annotations

from itertools import pairwise

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ..analysis.memory import MemoryProfile
from ..analysis.plot import colour_of_role, roles_of
from .output import bytes_text

HEIGHT, MARGIN = 14, 11
LETTERS = "#=+*%@o~x:-."  # by role, so that the picture can be read without colour


def timeline(profile: MemoryProfile, out: Console) -> None:
    """Print live bytes by role; each column shows the largest moment of its stretch."""
    moments = profile.timeline()
    if not moments:
        return
    roles = roles_of(profile)
    totals = [sum(m.values()) for m in moments]
    width = min(len(moments), max(out.width - MARGIN - 2, 20))
    edges = [i * len(moments) // width for i in range(width + 1)]
    stretches = [range(a, max(b, a + 1)) for a, b in pairwise(edges)]
    columns = [moments[max(s, key=totals.__getitem__)] for s in stretches]
    top = max(totals)
    stacks = [_stack(column, roles, top) for column in columns]
    for level in reversed(range(HEIGHT)):
        label = bytes_text(top * (level + 1) / HEIGHT) if level in (HEIGHT - 1, HEIGHT // 2 - 1) else ""
        line = Text(f"{label:>{MARGIN - 2}} |")
        for stack in stacks:
            role = stack[level] if level < len(stack) else None
            line.append(
                " " if role is None else LETTERS[role % len(LETTERS)],
                style="" if role is None else colour_of_role(roles[role]),
            )
        out.print(line, soft_wrap=True)
    out.print(_phases(profile, stretches), soft_wrap=True)
    legend = Text()
    for i, role in enumerate(roles):
        legend.append(LETTERS[i % len(LETTERS)], style=colour_of_role(role)).append(f" {role}   ")
    out.print(Padding(legend, (0, 0, 0, MARGIN)))


def _stack(column: dict[str, int], roles: list[str], top: int) -> list[int]:
    """Which role each level shows, bottom up; rounded so that the heights add up."""
    cells: list[int] = []
    total = 0
    for i, role in enumerate(roles):
        total += column.get(role, 0)
        cells += [i] * (round(HEIGHT * total / top) - len(cells))
    return cells


def _phases(profile: MemoryProfile, stretches: list[range]) -> Text:
    """The names of the phases under the columns, where there is room."""
    line, last = "", ""
    for i, stretch in enumerate(stretches):
        phase = profile.moments[stretch[0]].phase
        if phase != last:
            room = sum(profile.moments[s[0]].phase == phase for s in stretches[i:])
            mark = f"|{phase}" if room > len(phase) + 1 else "|"
            line = line.ljust(i) + (mark if len(line) <= i else "")
            last = phase
    return Text(" " * MARGIN + line)
