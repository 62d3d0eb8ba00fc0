"""The hallway: what happens to one frame, stage by stage, from Dynamo's graph to a callable.

capture -> passes -> lower -> runtime. This is the only module that knows every
stage; it holds no logic of theirs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import _torch, logs
from .analysis.memory import MemoryProfile
from .analysis.modules import check_patterns
from .capture import assumptions, checks, optim_state
from .capture.step import Event, capture, to_step
from .errors import CaptureError
from .ir.graph import StepGraph
from .ir.text import to_text
from .look import DryRunEnd, Look, current_look, looking
from .lower.compile import lower, profile_only
from .options import Options
from .passes import passes_for
from .passes.pipeline import run_pipeline
from .record import GraphRecord
from .runtime.report import Reporter
from .runtime.state import ScalerState
from .runtime.step import CompiledStep, OptimizerBinding
from .runtime.watch import REPORT, WATCH, Watch


@dataclass
class StepState:
    """What all graphs of one compiled step share."""

    scaler: ScalerState
    graphs: list[GraphRecord] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)  # one per graph that trains
    last_break: tuple[str, str] | None = None  # reason and user line of the last graph break
    compilations: checks.Compilations = field(default_factory=checks.Compilations)

    def __post_init__(self) -> None:
        self.reporter = Reporter(self.scaler.loss_scale)

    def uncompiled(self, where: str) -> CaptureError:
        """The error for a backward at ``where`` that is about to run uncompiled."""
        return checks.uncompiled(self.last_break, where)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what was seen of the gradients before is forgotten."""
        self.scaler.load_state_dict(state)
        for watch in self.watches:
            watch.clear()
        t = self.scaler.tensors
        self.reporter.restart(int(t["skipped"]), float(t["scale"]))


@contextmanager
def profiling() -> Iterator[list[MemoryProfile]]:
    """A compiled step called inside is captured and scheduled, but not compiled and not run.

    The call ends the block, with the step's memory profile in the list.
    Parameters and inputs may be fake: no data is read or changed.
    """
    found: list[MemoryProfile] = []

    def profile(*graph_inputs_options_mode: Any) -> MemoryProfile:
        found.append(profile_only(*graph_inputs_options_mode))
        return found[-1]

    with looking(Look(lambda point, step: None, profile, keep=False)):
        yield found


def compile_frame(
    options: Options, state: StepState, gm: GraphModule, inputs: Sequence[Any], mode: str | None
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's.

    Raises:
        CaptureError: the frame is not a whole step; nothing of the user's has changed.
        OptimizerError: an optimizer of the step cannot be traced; likewise.
    """
    record = _torch.current_record()
    assert record is not None, "the backend was called outside of torch.compile"
    for event in record.events:
        assumptions.check(event.live(), event.where)
    checks.check_frame(gm, record, state.last_break)
    if not checks.computes(gm):
        return gm.forward
    state.compilations.refuse(record)
    undo: list[Callable[[], None]] = []
    try:
        for event in record.events:
            places = [(p.group, p.position) for p in event.params if p.has_grad]
            undo.append(optim_state.create_state(event.live(), places, event.where))
        compiled = _Compilation(options, state, gm, inputs, mode, record).run()
    except BaseException as error:
        for back in undo:
            back()
        if isinstance(error, DryRunEnd) and not record.events:
            return gm.forward  # the training part is still to come
        raise
    state.compilations.note(record)  # one that failed is none: the user may mend its cause and go on
    return compiled


class _Compilation:
    """One frame on its way through the stages."""

    def __init__(
        self,
        options: Options,
        state: StepState,
        gm: GraphModule,
        inputs: Sequence[Any],
        mode: str | None,
        record: _torch.FrameRecord,
    ) -> None:
        self.options, self.state, self.gm, self.inputs = options, state, gm, list(inputs)
        self.mode, self.record = mode, record
        self.clock = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def run(self) -> CompiledStep:
        scaler, events = self.state.scaler, self.record.events
        fields = [*scaler.fields, WATCH, REPORT] if events else []
        self.captured = capture(self.gm, self.record, fields, keep_grads=self.options.grads == "keep")
        self.bindings = [_binding(event) for event in self.captured.events]
        device = checks.device_of([e.live() for e in events], self.inputs)
        scaler.to(device)
        self.watch = Watch.make(len(self.record.leaf_grads), device) if events else None
        extras = [scaler.tensors[name] for name in scaler.fields] if events else []
        extras += [self.watch.table, self.watch.report] if self.watch is not None else []
        extras += [t for b in self.bindings for t in b.inputs(device)]
        not_inference = checks.still_requires_grad(self.record, self.state.last_break)
        call = _torch.trace(self.captured.gm, self.inputs, extras, self._inner, not_inference)
        return CompiledStep(
            call,
            scaler,
            self.bindings,
            device,
            self.captured.outputs,
            self.captured.kept,
            self._cleared(),
            self.options.grads == "drop",
            self.watch,
            self.state.reporter,
            checks.module_hooks_stay(self.record),
        )

    def _inner(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """AOTAutograd's compiler: the ATen graph through passes and lowering."""
        self._lap("capture")
        by_node = checks.input_names(self.gm, self.record)
        step = to_step(self.captured, gm, by_node)
        events = self.record.events
        step.read_events = [e for e, event in enumerate(events) for p in event.params if p.has_grad]
        step.read_groups = [p.group for event in events for p in event.params if p.has_grad]
        step.backwards_before = [event.backwards for event in events]
        step.backward_of = [grad.backward for grad in self.record.leaf_grads]
        check_patterns(step, self.options.keep_fp32)
        before = to_text(step)
        look = current_look()
        after_each = look.after_each if look else lambda name, step: None
        after_each("captured", step)
        passes = run_pipeline(
            step, passes_for(self.options), check=self.options.verify, after_each=after_each
        )
        self._lap("passes")
        if self.watch is not None and look is None:
            self._describe(self.watch, step, by_node)
        unreached = checks.unreached(self.record, by_node)
        escaping = checks.escaping(self.record, by_node, self.options.grads == "keep")
        after = to_text(step)
        if look is not None:
            memory = look.profile(step, inputs, self.options, self.mode)
            record = GraphRecord(before, after, passes, unreached, self.seconds, memory, escaping)
            if look.keep:
                self.state.graphs.append(record)
            raise DryRunEnd
        lowered = lower(step, inputs, self.options, self.mode)
        self._lap("lower")
        self.seconds["memory"] = lowered.seconds
        record = GraphRecord(before, after, passes, unreached, self.seconds, lowered.memory, escaping)
        logs.log(record)
        self.state.graphs.append(record)
        return lowered.call

    def _describe(self, watch: Watch, step: StepGraph, names: Mapping[str, str]) -> None:
        """Name the columns of the watch table."""
        for mark in step.checked:
            leaf = self.record.leaf_grads[int(str(mark.args[2]))].leaf
            weight = self.record.real.get(leaf)
            watch.names.append(names.get(leaf, leaf))
            watch.sizes.append(step.tiny[mark][2] if mark in step.tiny else 0)
            watch.weights.append(weakref.ref(weight) if isinstance(weight, Tensor) else lambda: None)
        self.state.watches.append(watch)

    def _cleared(self) -> list[tuple[int, int, int]]:
        return [
            (event.index, p.group, p.position)
            for event in self.record.events
            for p in event.params
            if p.node in self.record.cleared
        ]

    def _lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self.clock
        self.clock = now


def _binding(event: Event) -> OptimizerBinding:
    def fit(optimizer: torch.optim.Optimizer) -> None:
        optim_state.fit_state(optimizer, event.places, event.state, event.where)

    def holds(optimizer: torch.optim.Optimizer) -> None:
        if event.assumed is not None:
            event.assumed.check(optimizer)

    keys = [(k.group, k.position, k.key) for k in event.state]
    return OptimizerBinding(event.optimizer, keys, fit, holds)
