"""The hallway: what happens to one frame, stage by stage, from Dynamo's graph to a callable.

capture -> passes -> lower -> runtime. This is the only module that knows every
stage; it holds no logic of theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import _torch
from .capture import checks, optim, optim_state
from .capture.step import Event, capture, to_step
from .errors import LossScaleError
from .ir.text import to_text
from .lower.compile import lower
from .options import Options
from .passes import passes_for
from .passes.pipeline import PassRecord, run_pipeline
from .runtime.scale import DynamicLossScale
from .runtime.state import NONFINITE, ScalerState
from .runtime.step import CompiledStep, OptimizerBinding


@dataclass
class GraphRecord:
    """One compiled graph: text before and after the passes, and what each pass did."""

    before: str
    after: str
    passes: list[PassRecord]
    unreached: dict[str, str]  # trainable parameter -> why it is not updated
    seconds: dict[str, float]  # compile time by stage: capture, passes, lower

    def inserted(self) -> dict[str, int]:
        """Nodes inserted per pass."""
        return {record.name: record.inserted for record in self.passes}


@dataclass
class StepState:
    """What all graphs of one compiled step share."""

    scaler: ScalerState
    graphs: list[GraphRecord] = field(default_factory=list)
    overflows: list[tuple[list[str], Tensor]] = field(
        default_factory=list
    )  # per graph: names, sums (and padding)
    last_break: tuple[str, str] | None = None  # reason and user line of the last graph break

    def nonfinite(self) -> tuple[str, ...]:
        """``"parameter: inf"`` or ``"parameter: nan"`` of the last skipped step; reads the device."""
        found = []
        for names, sums in self.overflows:
            for name, value in zip(names, sums.tolist(), strict=False):
                if value != value or value == float("inf"):
                    found.append(f"{name}: {'nan' if value != value else 'inf'}")
        return tuple(dict.fromkeys(found))


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
        optim.check(event.live(), event.where)
    checks.check_frame(gm, record, state.last_break)
    if not checks.computes(gm):
        return gm.forward
    undo: list[Callable[[], None]] = []
    try:
        for event in record.events:
            places = [(p.group, p.position) for p in event.params if p.has_grad]
            undo.append(optim_state.create_state(event.live(), places, event.where))
        return _Compilation(options, state, gm, inputs, mode, record).run()
    except BaseException:
        for back in undo:
            back()
        raise


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
        fields = [*scaler.fields, NONFINITE] if events else []
        self.captured = capture(self.gm, self.record, fields, keep_grads=self.options.grads == "keep")
        self.bindings = [_binding(event) for event in self.captured.events]
        device = checks.device_of([e.live() for e in events], self.inputs)
        scaler.to(device)
        self.overflow = torch.zeros(max(len(self.record.leaf_grads), 1), device=device) if events else None
        extras = [scaler.tensors[name] for name in scaler.fields] if events else []
        extras += [self.overflow] if self.overflow is not None else []
        extras += [t for b in self.bindings for t in b.inputs(device)]
        call = _torch.trace(self.captured.gm, self.inputs, extras, self._inner)
        return CompiledStep(
            call,
            scaler,
            self.bindings,
            device,
            self.captured.outputs,
            self.captured.kept,
            self._cleared(),
            self.options.grads == "drop",
            self.overflow,
            _patience(self.options, self.state),
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
        before = to_text(step)
        passes = run_pipeline(step, passes_for(self.options), check=self.options.verify)
        self._lap("passes")
        if self.overflow is not None:
            leaves = [self.record.leaf_grads[int(str(mark.args[2]))].leaf for mark, _ in step.checked]
            names = [by_node.get(leaf, leaf) for leaf in leaves]
            self.state.overflows.append((names, self.overflow))
        after, unreached = to_text(step), checks.unreached(self.record, by_node)
        compiled = lower(step, inputs, self.options, self.mode)
        self._lap("lower")
        self.state.graphs.append(GraphRecord(before, after, passes, unreached, self.seconds))
        return compiled

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
        if event.comparisons:
            optim.check_comparisons(optimizer, event.comparisons, event.where)

    keys = [(k.group, k.position, k.key) for k in event.state]
    return OptimizerBinding(event.optimizer, keys, fit, holds)


def _patience(options: Options, state: StepState) -> Callable[[], None]:
    """Raises LossScaleError once the scale is stuck at its minimum for ``patience`` overflows."""
    policy = options.policy
    if not isinstance(policy, DynamicLossScale):
        return lambda: None

    def look() -> None:
        stuck = state.scaler.tensors["stuck"]
        if stuck.device.type == "cpu" and int(stuck) >= policy.patience:
            names = state.nonfinite()
            found = (
                f"{policy.patience} steps in a row overflowed at the minimum scale {policy.min_scale:g}; "
                f"first non-finite gradient: {names[0] if names else 'unknown'}"
            )
            hint = "look for inf or nan in that parameter's module, or name it in keep_fp32"
            raise LossScaleError(found, hint=hint)

    return look
