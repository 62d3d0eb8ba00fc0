"""A memory profile as a picture, with matplotlib (extra ``fxpass[plots]``)."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory import MemoryProfile

# One order and one colour for a role in every picture; what lives longest is at the bottom.
ROLES = {
    "parameter": "#4e79a7",
    "optimizer state": "#76b7b2",
    "input": "#bab0ac",
    "scaler": "#d4d4d4",
    "cast weight": "#b07aa1",
    "saved activation": "#f28e2b",
    "fp16 gradient": "#e15759",
    "bf16 gradient": "#e15759",
    "fp32 gradient": "#9d2f31",
    "temporary": "#edc948",
    "output": "#59a14f",
}


def roles_of(profile: MemoryProfile) -> list[str]:
    """The roles of a profile, in the order of :data:`ROLES`, others last."""
    order = list(ROLES)
    roles = {t.role for t in profile.tensors if t.bytes}
    return sorted(roles, key=lambda r: (order.index(r) if r in order else len(order), r))


def colour_of_role(role: str) -> str:
    """The colour of a role in every figure; grey-brown for one without its own."""
    return ROLES.get(role, "#9c755f")


def timeline_figure(profile: MemoryProfile, title: str = "") -> Any:
    """A matplotlib figure: live bytes by role over the moments of the step, phases named, the peak marked.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    timeline = profile.timeline()
    roles = roles_of(profile)
    series = [[moment.get(role, 0) / 1e6 for moment in timeline] for role in roles]
    x = list(range(len(timeline)))
    axes.stackplot(
        x, series, labels=roles, colors=[colour_of_role(r) for r in roles], step="post", linewidth=0
    )
    peak = profile.peak
    axes.axvline(peak.moment.index, color="#888888", linestyle=":")
    axes.set_title(f"{title}{': ' if title else ''}peak {peak.bytes / 1e6:,.1f} MB in {peak.moment.phase}")
    axes.set_xlabel("moment")
    axes.set_ylabel("MB alive")
    axes.margins(x=0)
    for phase, moments in groupby(profile.moments, key=lambda m: m.phase):
        run = list(moments)
        if len(run) > len(x) / 30:
            middle = (run[0].index + run[-1].index) / 2
            axes.text(middle, axes.get_ylim()[1] * 0.98, phase, ha="center", va="top", color="#888888")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
