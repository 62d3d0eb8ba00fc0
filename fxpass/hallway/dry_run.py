"""A step through capture and the passes, and no further: no code is generated, nothing of the user's changes.

With fake tensors (``make`` called under ``build``'s fake mode) not even the
weights exist, so that a step too large for this machine can be looked at.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import _torch
from .._torch import Resources
from .._torch import fake_ranks as fake_ranks
from ..analysis.memory import MemoryProfile, graph_profile, parameter_count
from ..analysis.view import GraphView, view
from ..analysis.wire import Transfer, transfers
from ..backend import MixedPrecision
from ..errors import CaptureError
from ..ir.graph import Role, StepGraph
from ..lower.callable import lower, profile_only
from ..options import Options
from .dry_run_hooks import DryRunHooks, running_dry
from .graph_record import GraphRecord

LARGE = 6000  # nodes: Inductor schedules that many in about 20 s
CAPTURED = "captured"  # the point before the first pass
CompiledKernel = Sequence[Resources]  # in each block size
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # step, args, kwargs


@dataclass(frozen=True)
class DryRun:
    """What the passes made of a step."""

    record: GraphRecord
    step: StepGraph  # after the last pass
    views: Mapping[str, GraphView]  # by point: "captured", or the pass after which it was taken
    tensors: str  # "fake" or "real"
    device: str  # the device it was traced for
    memory_of: str = "graph"  # whose memory was profiled: the "graph"'s, or that of Inductor's "program"
    notes: tuple[str, ...] = ()
    ranks: int = 1
    transfers: tuple[Transfer, ...] = ()  # what it sends to other ranks
    kernels: Sequence[CompiledKernel] = ()  # for the GPU, if that was asked for

    @property
    def memory(self) -> MemoryProfile:
        """What is alive when."""
        return self.record.memory

    @property
    def parameters(self) -> int:
        """Elements of the parameters that the step updates, on all ranks together."""
        return parameter_count(self.step)

    @property
    def final(self) -> GraphView:
        """The graph that is lowered."""
        return list(self.views.values())[-1]


def dry_run(
    make: Callable[[], Call],
    options: Mapping[str, Any],
    *,
    device: str | None = None,
    tensors: str = "auto",
    points: Collection[str] | None = None,
    dynamic: bool | None = None,
    of: str = "graph",
    kernels: bool = False,
) -> DryRun:
    """Capture the step that ``make`` returns and run the passes of ``options`` on it.

    Args:
        make: builds model, optimizer and arguments; returns ``(step, args, kwargs)``.
        device: where what ``make`` builds goes by default; without CUDA at hand, "cuda" is traced on the CPU.
        tensors: "fake", "real", or "auto": fake, and real if that does not work.
        points: passes after which to keep the graph; None keeps all.
        dynamic: as in ``torch.compile``; True keeps the arguments' sizes symbolic.
        of: whose memory to profile: the "graph"'s, the "program"'s that Inductor schedules from it (seconds
            to minutes), or "auto", the program's unless the graph is large.
        kernels: compile the program for a GPU that is here: what its kernels take is known then.

    Raises:
        FxpassError: the step cannot be captured whole.
    """
    attempt = functools.partial(
        _attempt, make, options, device, points=points, dynamic=dynamic, of=of, kernels=kernels
    )
    if tensors == "real":
        return attempt(fake=False)
    before = _fake_bytes()
    try:
        return attempt(fake=True)
    except CaptureError:
        raise  # a graph break is one with real tensors too
    except Exception as error:
        if tensors == "fake" or 2 * (_fake_bytes() - before) > _free_bytes():
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    gc.collect()
    run = attempt(fake=False)
    return replace(run, notes=(f"not with fake tensors: {reason}", *run.notes))


def _attempt(
    make: Callable[[], Call],
    options: Mapping[str, Any],
    device: str | None,
    *,
    fake: bool,
    points: Collection[str] | None,
    dynamic: bool | None,
    of: str,
    kernels: bool,
) -> DryRun:
    notes: list[str] = []
    with _building(device, fake, notes):
        step, args, kwargs = make()
    views: dict[str, GraphView] = {}
    graphs: list[StepGraph] = []

    def after_each(point: str, graph: StepGraph) -> None:
        if points is None or point in points:
            views[point] = view(graph, point)
        graphs[:] = [graph]

    # no progress: the command line says what it does
    backend = MixedPrecision(**{**options, "progress": False})  # pyrefly: ignore[bad-argument-type]
    profile, profiled, compiled = _profiler(of, notes, kernels)
    sent: list[Transfer] = []
    ranks = [backend.group.size() if backend.group is not None else 1]

    def before_scheduling(step: StepGraph, *rest: Any) -> MemoryProfile:
        ranks[:] = [max([shard.ranks for shard in step.shards.values()], default=ranks[0])]
        sent[:] = transfers(step, ranks[0])
        return profile(step, *rest)

    with running_dry(DryRunHooks(after_each, before_scheduling)):
        torch.compile(step, backend=backend, dynamic=dynamic)(*args, **kwargs)
    if not backend.graphs:
        hint = "the function must call loss.backward() and optimizer.step() itself"
        raise CaptureError("the step ran to its end and nothing was compiled", hint=hint)
    kind = "fake" if fake else "real"
    device = _device(graphs[0])
    record = backend.graphs[-1]
    of = profiled[-1]
    return DryRun(
        record=record,
        step=graphs[0],
        views=views,
        tensors=kind,
        device=device,
        memory_of=of,
        notes=tuple(notes),
        ranks=ranks[0],
        transfers=tuple(sent),
        kernels=compiled,
    )


def _profiler(
    of: str, notes: list[str], kernels: bool
) -> tuple[Callable[..., MemoryProfile], list[str], list[CompiledKernel]]:
    """A profile of the program, or of the graph if Inductor cannot schedule it; and which of them it was.

    With ``kernels`` the last list is filled with those that were compiled.
    """
    profiled: list[str] = []
    compiled: list[CompiledKernel] = []

    def program(step: StepGraph, *rest: Any) -> MemoryProfile:
        if not kernels or _device(step) != "cuda":
            return profile_only(step, *rest)
        with _torch.kernels_loaded() as loaded:
            memory = lower(step, *rest).memory
        compiled[:] = loaded
        return memory

    def profile(step: StepGraph, inputs: list[Any], options: Options, mode: str | None) -> MemoryProfile:
        result = graph_profile(step)  # first: scheduling takes the graph apart
        profiled.append("graph")
        count = len(step.graph.nodes)
        if of == "auto" and count > LARGE:
            notes.append(
                f"memory of the graph as written, since it has {count} nodes; --of program takes longer"
            )
        elif of != "graph":
            try:
                result = program(step, inputs, options, mode)
                profiled[-1] = "program"
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                notes.append(f"memory of the graph: Inductor failed with {type(error).__name__}: {reason}")
        return result

    return profile, profiled, compiled


@contextlib.contextmanager
def _building(device: str | None, fake: bool, notes: list[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(_torch.fake_tensors())
        if not torch.cuda.is_available():
            stack.enter_context(_CpuForCuda(notes))
        if device is not None:
            stack.enter_context(torch.device(device))
        yield


class _CpuForCuda(TorchFunctionMode):
    """Puts on the CPU what asks for CUDA, where there is none.

    A torch that was built for it does not help: autograd asks a device for its
    streams, even if all tensors are fake.
    """

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            self._note()
            return args[0].cpu()
        args = tuple(self._cpu(a) for a in args)
        return func(*args, **{k: self._cpu(v) for k, v in (kwargs or {}).items()})

    def _cpu(self, value: Any) -> Any:
        is_cuda = isinstance(value, torch.device) and value.type == "cuda"
        if is_cuda or (isinstance(value, str) and value.partition(":")[0] == "cuda"):
            self._note()
            return torch.device("cpu")
        return value

    def _note(self) -> None:
        lacking = "no GPU is here" if torch.backends.cuda.is_built() else "this torch has no CUDA"
        note = f"traced with the CPU's operators: {lacking}"
        if note not in self.notes:
            self.notes.append(note)


def _device(step: StepGraph) -> str:
    """Where the parameters are, or the inputs of a step without."""
    inputs = sorted(step.roles, key=lambda n: step.roles[n] is not Role.PARAMETER)
    devices = (n.meta["val"].device.type for n in inputs if isinstance(n.meta["val"], torch.Tensor))
    return next(devices, "cpu")


def _fake_bytes() -> int:
    """What the fake tensors that are alive would take."""
    return sum(t.numel() * t.element_size() for t in gc.get_objects() if _torch.is_fake(t))


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
