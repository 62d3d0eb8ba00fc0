"""What was captured of a step, what each pass did, and what runs in which precision: as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ..analysis.policy import VIEWS
from ..analysis.view import INPUT, OUTPUT, GraphView, NodeView
from ..analysis.why import why_float32
from ..analysis.wire import Transfer
from ..hallway.dry_run import CAPTURED, DryRun
from ..passes.pipeline import PassRecord
from .launches import Launches, launches
from .memory import PHASES, PROGRAM, MemorySummary, summary

FLOATS = ("float16", "bfloat16", "float32", "float64")


STAGES = ("dynamo", "capture", "passes", "verify")  # of a dry run


@dataclass(frozen=True)
class Region:
    """Nodes of one phase: as captured, after the passes, and how many of these a pass inserted."""

    phase: str
    captured: int
    compiled: int
    inserted: int


@dataclass(frozen=True)
class Precision:
    """Operations of forward and backward with one rule and one dtype of result."""

    colour: str  # of the op policy: low, high, norm, follow, backward_follow, widest; none
    dtype: str
    count: int


@dataclass(frozen=True)
class Float32:
    """Operations of forward and backward that compute in float32, and why."""

    op: str
    count: int
    reason: str


@dataclass(frozen=True)
class Inspection:
    """The answer of ``fxpass inspect``."""

    target: str
    tensors: str  # fake: shapes without memory; real
    device: str
    notes: tuple[str, ...]
    parameters: int  # elements of the parameters that are updated
    seconds: dict[str, float]  # of the CPU, by stage
    regions: tuple[Region, ...]
    passes: tuple[PassRecord, ...]
    precision: tuple[Precision, ...]
    float32: tuple[Float32, ...]
    no_gradient: dict[str, str]  # parameter -> why it gets none
    escaping: dict[str, str]  # parameter -> why its gradient outlives the step
    memory: MemorySummary
    ranks: int
    transfers: tuple[Transfer, ...]  # collectives, in the order in which they start
    launches: Launches | None  # with --launches


def inspection(target: str, run: DryRun, *, with_launches: bool = False) -> Inspection:
    """What ``run`` says, as data; what it launches, if the program was profiled and that is asked for."""
    before, after = run.views[CAPTURED], run.final
    record = run.record
    return Inspection(
        target=target,
        tensors=run.tensors,
        device=run.device,
        notes=run.notes,
        parameters=run.parameters,
        seconds={name: round(record.seconds.get(name, 0.0), 3) for name in STAGES},
        regions=_regions(before, after),
        passes=tuple(replace(p, seconds=round(p.seconds, 3)) for p in record.passes),
        precision=_precision(after),
        float32=_float32(after),
        no_gradient=record.unreached,
        escaping=record.escaping,
        memory=summary(run.memory, run.memory_of),
        ranks=run.ranks,
        transfers=run.transfers,
        launches=launches(run) if with_launches and run.memory_of == PROGRAM else None,
    )


def _regions(before: GraphView, after: GraphView) -> tuple[Region, ...]:
    counts = [Counter(n.phase for n in graph.nodes) for graph in (before, after)]
    made = Counter(n.phase for n in after.nodes if n.made_by)
    return tuple(
        Region(p, counts[0][p], counts[1][p], made[p]) for p in PHASES if counts[0][p] or counts[1][p]
    )


def _computing(graph: GraphView) -> list[NodeView]:
    """The operations of forward and backward that no pass inserted, without views."""
    return [
        n
        for n in graph.nodes
        if n.phase in ("forward", "backward") and not n.made_by and n.short not in (INPUT, OUTPUT, *VIEWS)
    ]


def _precision(graph: GraphView) -> tuple[Precision, ...]:
    counts = Counter((n.colour or "none", n.dtype) for n in _computing(graph) if n.dtype in FLOATS)
    return tuple(Precision(colour, dtype, count) for (colour, dtype), count in sorted(counts.items()))


def _float32(graph: GraphView) -> tuple[Float32, ...]:
    counts = Counter(
        (n.op.removesuffix(".default"), why_float32(n)) for n in _computing(graph) if n.dtype == "float32"
    )
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Float32(op, count, reason) for (op, reason), count in order)
