"""A memory profile as data: by phase and role, what is alive at the peak, and a trace for Perfetto."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import sympy

from ..analysis.memory import LiveTensor, MemoryProfile
from ..analysis.plot import colour_of_role, roles_of
from ..ir.graph import Phase

PHASES = [phase.value for phase in Phase]
PROGRAM, GRAPH, AUTO = "program", "graph", "auto"
NOTES = {
    PROGRAM: "of the program Inductor schedules: what a training step takes",
    GRAPH: "of the graph run node by node, unfused: an upper bound",
}


@dataclass(frozen=True)
class PhaseMemory:
    """The moment of one phase with the most bytes."""

    phase: str
    peak: int  # bytes
    at: str  # the moment
    roles: dict[str, int]  # bytes by role


@dataclass(frozen=True)
class Alive:
    """One tensor that is alive at the peak."""

    name: str
    node: str
    role: str
    dtype: str
    shape: str
    bytes: int
    where: str  # the user's line


@dataclass(frozen=True)
class MemorySummary:
    """Where the bytes of one step are."""

    of: str  # "program" or "graph", see NOTES
    parameters: int
    peak: int  # bytes
    at: str  # the moment of the peak
    phase: str
    bytes_per_parameter: float
    formula: str  # of the peak, in Phi and the symbolic sizes
    sizes: dict[str, str]  # symbolic size -> what it is and its value
    phases: tuple[PhaseMemory, ...]
    largest: tuple[Alive, ...]


def summary(profile: MemoryProfile, of: str, *, top: int = 10) -> MemorySummary:
    """The ``top`` largest tensors at the peak, and the peak of each phase."""
    phases = []
    timeline = profile.timeline()
    for phase in PHASES:
        peak = profile.peak_of(phase)
        if peak is not None:
            phases.append(PhaseMemory(phase, peak.bytes, peak.moment.name, dict(timeline[peak.moment.index])))
    peak = profile.peak
    return MemorySummary(
        of=of,
        parameters=profile.parameters,
        peak=peak.bytes,
        at=peak.moment.name,
        phase=peak.moment.phase,
        bytes_per_parameter=round(peak.bytes / max(profile.parameters, 1), 3),
        formula=str(sympy.N(profile.expression, 6)),
        sizes=profile.symbols,
        phases=tuple(phases),
        largest=tuple(alive(t) for t in peak.live[:top]),
    )


def alive(tensor: LiveTensor) -> Alive:
    """What a person wants to know of one tensor."""
    shape = tensor.shape if len(tensor.shape) <= 40 else f"{tensor.shape[:37]}..."  # of symbolic sizes
    return Alive(
        name=tensor.name,
        node=tensor.node,
        role=tensor.role,
        dtype=tensor.dtype,
        shape=shape,
        bytes=tensor.bytes,
        where=tensor.where,
    )


def page_data(profile: MemoryProfile, of: str, *, top: int = 60) -> dict[str, Any]:
    """What the page's timeline needs: bytes by role and moment, and the tensors that take most."""
    timeline = profile.timeline()
    peak = profile.peak
    transient = [t for t in profile.tensors if t.birth >= 0 and t.bytes]
    by_weight = sorted(transient, key=lambda t: (-t.bytes * (t.death - t.birth + 1), t.birth))
    largest = sorted(by_weight[:top], key=lambda t: t.birth)
    return {
        "note": f"Live bytes {NOTES[of]}. Scroll to zoom, drag to choose a range, double-click to see all.",
        "moments": [
            {"name": m.name, "phase": m.phase, "node": _node_at(profile, m.index)} for m in profile.moments
        ],
        "totals": [sum(moment.values()) for moment in timeline],
        "roles": [
            {"name": r, "colour": colour_of_role(r), "bytes": [m.get(r, 0) for m in timeline]}
            for r in roles_of(profile)
        ],
        "peak": {
            "index": peak.moment.index,
            "bytes": peak.bytes,
            "name": peak.moment.name,
            "phase": peak.moment.phase,
        },
        "tensors": [{**vars(alive(t)), "birth": t.birth, "death": t.death} for t in largest],
        "live": [vars(alive(t)) for t in peak.live[:20]],
    }


def _node_at(profile: MemoryProfile, moment: int) -> str:
    """The node of the largest tensor that is born then, else the moment's own name."""
    born = [t for t in profile.tensors if t.birth == moment and t.node]
    return max(born, key=lambda t: t.bytes).node if born else profile.moments[moment].name


def chrome_trace(profile: MemoryProfile, *, top: int = 200) -> dict[str, Any]:
    """The Chrome/Perfetto trace event format: one microsecond a moment.

    Phases are slices, bytes by role one counter, the largest tensors slices on
    rows of their own (Trace Event Format: "X" complete and "C" counter events).
    """
    events: list[dict[str, Any]] = []
    for phase, moments in groupby(profile.moments, key=lambda m: m.phase):
        run = list(moments)
        events.append({"name": phase, "ph": "X", "pid": 1, "tid": 0, "ts": run[0].index, "dur": len(run)})
    for m, roles in zip(profile.moments, profile.timeline(), strict=True):
        events.append({"name": "live bytes", "ph": "C", "pid": 1, "ts": m.index, "args": roles})
    transient = sorted((t for t in profile.tensors if t.birth >= 0), key=lambda t: -t.bytes)[:top]
    free: list[int] = []  # by row, the first moment at which it is free again
    for t in sorted(transient, key=lambda t: t.birth):
        row = next((i for i, end in enumerate(free) if end <= t.birth), len(free))
        free[row : row + 1] = [t.death + 1]
        args = {"bytes": t.bytes, "role": t.role, "type": f"{t.dtype}[{t.shape}]", "where": t.where}
        shape = {"name": t.name, "ph": "X", "pid": 2, "tid": row, "ts": t.birth, "dur": t.death - t.birth + 1}
        events.append({**shape, "args": args})
    for pid, name in ((1, "step"), (2, "tensors")):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
    return {"traceEvents": events, "displayTimeUnit": "ns"}
