"""What a step launches: by phase, by the pass that asked for it, and what the compiled kernels take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.memory import Moment
from ..hallway.dry_run import CompiledKernel, DryRun
from .memory import PHASES

OWN = "(the step's own)"
TRITON, CPP = "Triton", "C++"
LIBRARY = "a library call is as many launches as the library makes of it: cuBLAS one or two, cuDNN more"
NO_REGISTERS = "registers and spills are known where kernels are compiled for a GPU"


@dataclass(frozen=True)
class PhaseLaunches:
    """What is launched in one phase."""

    phase: str
    kernels: int  # that Inductor generated
    calls: int  # of libraries


@dataclass(frozen=True)
class PassLaunches:
    """Launches for what one pass inserted."""

    name: str  # "(the step's own)": for what was captured
    alone: int  # launches that compute nothing else
    fused: int  # launches that compute something else as well


@dataclass(frozen=True)
class KernelResources:
    """What one compiled kernel takes, over the block sizes that it is chosen from."""

    name: str
    capability: int  # 90 for sm_90
    fewest: int  # registers a thread
    most: int
    spilled: int  # bytes a thread, in the block size that spills least


@dataclass(frozen=True)
class Launches:
    """What a step launches, counted in the program that Inductor generated."""

    language: str  # of the generated kernels: Triton or C++
    total: int
    phases: tuple[PhaseLaunches, ...]
    passes: tuple[PassLaunches, ...]
    compiled: tuple[KernelResources, ...]
    notes: tuple[str, ...]  # what cannot be told


def launches(run: DryRun) -> Launches:
    """Of a dry run whose program was profiled."""
    moments = run.memory.moments
    on_gpu = run.device == "cuda"
    notes = (LIBRARY,) if on_gpu else ()
    return Launches(
        language=TRITON if on_gpu else CPP,
        total=len(moments),
        phases=_phases(moments),
        passes=_passes(moments, [p.name for p in run.record.passes]),
        compiled=tuple(map(_resources, run.kernels)),
        notes=notes if run.kernels else (*notes, NO_REGISTERS),
    )


def _phases(moments: Sequence[Moment]) -> tuple[PhaseLaunches, ...]:
    counts = Counter((m.phase, m.generated) for m in moments)
    return tuple(
        PhaseLaunches(p, counts[p, True], counts[p, False])
        for p in PHASES
        if counts[p, True] or counts[p, False]
    )


def _passes(moments: Sequence[Moment], names: Sequence[str]) -> tuple[PassLaunches, ...]:
    alone = Counter(m.made_by[0] for m in moments if len(m.made_by) == 1)
    fused = Counter(name for m in moments if len(m.made_by) > 1 for name in m.made_by)
    return tuple(
        PassLaunches(name or OWN, alone[name], fused[name])
        for name in ("", *names)
        if alone[name] or fused[name]
    )


def _resources(sizes: CompiledKernel) -> KernelResources:
    registers = [size.registers for size in sizes]
    spilled = min(size.stack for size in sizes)
    return KernelResources(sizes[0].name, sizes[0].capability, min(registers), max(registers), spilled)
