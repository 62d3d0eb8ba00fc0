"""The hallway: what happens to one frame, stage by stage, from Dynamo's graph to a callable.

capture -> passes -> lower -> runtime. This is the only module that knows every
stage; it holds no logic of theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from .. import _torch
from ..analysis.elementwise import check_by_element
from ..analysis.modules import check_patterns
from ..capture import assumptions, checks, counters, optim_state
from ..capture.breaks import Break, given_up
from ..capture.counters import counters_of as counters_of
from ..capture.events import Event, events_of
from ..capture.step import capture, to_step
from ..errors import CaptureError
from ..ir.graph import StepGraph
from ..ir.shards import Shard
from ..ir.slots import Slot
from ..ir.text import to_text
from ..lower.callable import lower
from ..options import Options
from ..passes import passes_for
from ..passes.pipeline import run_pipeline
from ..passes.results import Reductions
from ..runtime.compiled_step import CompiledStep, Extras, OptimizerBinding, fields_of
from ..runtime.reporter import Reporter
from ..runtime.state import ScalerState
from ..runtime.watch import Column, Watch
from ..timing.clock import current, stage, tell
from . import keep, logs
from .dry_run_hooks import DryRunEnd, dry_run_hooks
from .graph_record import GraphRecord


@dataclass
class StepState:
    """What all graphs of one compiled step share."""

    scaler: ScalerState
    graphs: list[GraphRecord] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)  # one per graph that trains
    last_break: Break | None = None  # the last graph break
    compilations: checks.Compilations = field(default_factory=checks.Compilations)
    group: Any = None  # the process group of option data_parallel
    # parameters that are equal on its ranks
    replicated: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    plans: list[dict[str, list[str]]] = field(default_factory=list)  # of reductions, as the ranks agreed

    def __post_init__(self) -> None:
        self.reporter = Reporter(self.scaler.policy)

    def note_break(self, record: _torch.FrameRecord) -> None:
        """Dynamo broke the graph of a frame: remembered for the error that may follow.

        Raises:
            CaptureError: the frame trains, and is given up.
        """
        if not record.break_reason:
            return
        self.last_break = Break.of(record, self.last_break)
        if record.will_train or (record.given_up and record.backwards):
            raise given_up(record)

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
        assumptions.check(event.live(), event.where, event.counters)
    checks.check_frame(gm, record, state.last_break)
    if not checks.computes(gm):
        return gm.forward
    state.compilations.refuse(record)
    undo: list[Callable[[], None]] = []
    try:
        compilation = _Compilation(options, state, gm, inputs, mode=mode, record=record)
        for event in compilation.events:
            undo.append(optim_state.create_state(event.optimizer(), event.params, event.where))
            event.habits = optim_state.habits_of(event.optimizer(), list(event.params), event.where)
            undo.append(counters.start(event.optimizer(), event.counters))
        if dry_run_hooks() is None:
            _share_weights(state, compilation.events)
        compiled = compilation.run()
    except BaseException as error:
        for back in reversed(undo):
            back()
        if isinstance(error, DryRunEnd) and not record.events:
            return gm.forward  # the training part is still to come
        raise
    state.compilations.note(record)  # one that failed is none: the user may mend its cause and go on
    return compiled


def _share_weights(state: StepState, events: Sequence[Event]) -> None:
    """Start from equal weights on the ranks of option data_parallel; once, for each parameter."""
    if state.group is not None:
        weights = [slot.read(event.optimizer()) for event in events for slot in event.params]
        new = [w for w in weights if w not in state.replicated and _torch.shard_of(w) is None]
        _torch.share_first(new, state.group)
        state.replicated.update((weight, True) for weight in new)


class _Compilation:
    """One frame on its way through the stages."""

    def __init__(
        self,
        options: Options,
        state: StepState,
        gm: GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None,
        record: _torch.FrameRecord,
    ) -> None:
        self.options, self.state, self.gm, self.inputs = options, state, gm, list(inputs)
        self.mode, self.record = mode, record
        self.names = checks.input_names(gm, record)
        self.events = events_of(record, self.names)
        self.clock = current()
        self.on_disk: keep.Kept | None = None  # what an earlier process has compiled

    def run(self) -> CompiledStep:
        scaler, events = self.state.scaler, self.events
        modules = {id(module) for _, module in self.record.modules}
        tell(f"{len(modules)} modules, {len(self.gm.graph.nodes)} operations")
        device = checks.device_of([e.optimizer() for e in events], self.inputs)
        keep_grads = self.options.grads == "keep"
        fields = fields_of(scaler) if events else []
        shards = _shards(self.gm, self.inputs)
        if shards:
            self.options.check_sharded()
            checks.check_all_sharded(self.record, events, shards, self.names)
        self.captured = capture(
            self.gm,
            self.record,
            events,
            scaler_fields=fields,
            shards=shards,
            names=self.names,
            keep_grads=keep_grads,
        )
        self.watch = Watch.make(len(self.captured.gradients), device) if events else None
        extras = Extras(scaler, self.watch, device)
        extras.bindings = [_binding(event) for event in events]
        warm, self.cache = self._warm(extras.tensors())
        not_inference = checks.still_requires_grad(self.record, self.state.last_break)
        with stage("capture"):
            call = _torch.trace(
                self.captured.gm,
                self.inputs,
                extras.tensors(),
                compiler=self._inner,
                not_inference=not_inference,
                warm=warm,
            )
        if self.on_disk is not None:
            self._describe(self.on_disk.columns)
            self._note(self.on_disk, "hit")
            keep.warn_again(self.on_disk.warned)
        return CompiledStep(
            call=call,
            extras=extras,
            optimizers={event.number: event.optimizer for event in events},
            outputs=self.captured.outputs,
            numbers=sorted(self.captured.numbers),
            kept=self.captured.kept,
            cleared=self._cleared(),
            dropped=self._dropped() if self.options.grads == "drop" else [],
            reporter=self.state.reporter,
            holds=checks.module_hooks_stay(self.record),
            parts=[i for i, node in enumerate(self.captured.inputs) if node in self.captured.shards],
        )

    def _inner(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """AOTAutograd's compiler: the ATen graph through passes and lowering."""
        self.on_disk = None
        step = to_step(self.captured, gm, self.names)
        checks.check_reads(self.events, step.reads)
        check_by_element(step, [(type(e.optimizer()).__name__, e.where) for e in self.events])
        check_patterns(step, self.options.keep_fp32)
        before = to_text(step)
        look = dry_run_hooks()
        after_each = look.after_each if look else lambda name, step: None
        after_each("captured", step)
        warned: list[Any] = []
        with stage("passes"), keep.listening(warned):
            passes = run_pipeline(
                step, passes_for(self.options), check=self.options.verify, after_each=after_each
            )
        columns = keep.columns_of(step)
        if look is None:
            self._describe(columns)
        unreached = checks.unreached(self.events)
        escaping = checks.escaping(self.record, self.names, self.captured.kept)
        after = to_text(step)
        if look is not None:
            memory = look.profile(step, inputs, self.options, self.mode)
            record = GraphRecord(
                before=before,
                after=after,
                passes=passes,
                unreached=unreached,
                seconds=self.clock.cpu,
                memory=memory,
                escaping=escaping,
            )
            self._keep(record)
            raise DryRunEnd
        self._agree(step)
        lowered = lower(step, inputs, self.options, self.mode)
        comparisons = [event.assumed.comparisons if event.assumed else () for event in self.events]
        kept = keep.Kept(
            before=before,
            after=after,
            passes=passes,
            memory=lowered.memory,
            columns=columns,
            comparisons=comparisons,
            calls=lowered.calls,
            warned=warned,
        )
        self._note(kept, self.cache)
        return keep.as_code(lowered, kept)

    def _warm(self, extras: list[Any]) -> tuple[_torch.Warm | None, str]:
        """How the step is looked up in the cache on disk, or None; and what became of it so far."""
        if self.record.replicas or self.captured.shards:
            return None, "ranks agree on each compilation"
        return keep.warm(
            self.options,
            self.mode,
            self.captured,
            names=self.names,
            inputs=[*self.inputs, *extras],
            restore=self._restore,
        )

    def _restore(self, kept: keep.Kept) -> None:
        """A step that an earlier process has compiled is about to be taken, unless torch finds a fault in it.

        Raises:
            OptimizerError: what it took for granted of its optimizers does not hold.
        """
        for event, comparisons in zip(self.events, kept.comparisons, strict=True):
            event.assumed = assumptions.Assumptions.again(event.optimizer(), event.where, comparisons)
        self.on_disk = kept

    def _note(self, kept: keep.Kept, cache: str) -> None:
        unreached = checks.unreached(self.events)
        escaping = checks.escaping(self.record, self.names, self.captured.kept)
        record = GraphRecord(
            before=kept.before,
            after=kept.after,
            passes=kept.passes,
            unreached=unreached,
            seconds=self.clock.cpu,
            memory=kept.memory,
            escaping=escaping,
        )
        record.wall, record.cache = self.clock.wall, cache
        self._keep(record)
        logs.log(record)
        self.record.at_end.append(lambda: logs.log_times(record))

    def _keep(self, record: GraphRecord) -> None:
        """Add a graph to those of the step, with the reason for it."""
        assert self.record.code is not None, "a record is of a frame"
        record.name = _torch.frame_name(self.record.code)
        if self.record.changed is not None:
            record.why = self.record.changed.text
        self.state.graphs.append(record)

    def _agree(self, step: StepGraph) -> None:
        """Reduce what the other ranks reduce.

        Raises:
            CaptureError: another rank has compiled another step.
        """
        plan = step.result(Reductions).plan(step)
        if not plan or plan in self.state.plans:
            return
        for group, buckets in plan.items():
            if differs := _torch.agree(buckets, group):
                found = f"the ranks would train different steps: {differs}"
                hint = "let every rank run the same step: the same parameters used, the same options"
                raise CaptureError(found, where=next(iter(self.record.backwards), ""), hint=hint)
        self.state.plans.append(plan)

    def _describe(self, columns: Sequence[keep.KeptColumn]) -> None:
        """Say what the columns of the watch table are."""
        if self.watch is None:
            return
        weights = {
            slot: weakref.ref(slot.read(event.optimizer())) for event in self.events for slot in event.params
        }
        for column in columns:
            weight = weights.get(column.slot, lambda: None) if column.slot else lambda: None
            self.watch.columns.append(Column(column.name, column.sampled, weight))
        self.state.watches.append(self.watch)

    def _cleared(self) -> list[Slot]:
        """Parameters whose ``.grad`` is None after the step."""
        params = (item for event in self.events for item in event.all_params.items())
        return [slot for slot, node in params if node in self.record.cleared]

    def _dropped(self) -> list[Slot]:
        """Parameters whose gradient does not outlive the step: all but those whose tensor the user keeps."""
        params = (item for event in self.events for item in event.all_params.items())
        return [slot for slot, node in params if node not in self.captured.in_place]


def _shards(gm: GraphModule, inputs: Sequence[Any]) -> dict[str, Shard]:
    """The inputs that are parameters of ``fxpass.shard_``, by name in Dynamo's graph."""
    placeholders = (node.name for node in gm.graph.nodes if node.op == "placeholder")
    shards = {name: _torch.shard_of(value) for name, value in zip(placeholders, inputs, strict=True)}
    return {name: shard for name, shard in shards.items() if shard is not None}


def _binding(event: Event) -> OptimizerBinding:
    def fit(optimizer: torch.optim.Optimizer) -> None:
        optim_state.fit_state(optimizer, event.params, event.counters, event.state, event.where)

    def holds(optimizer: torch.optim.Optimizer) -> None:
        if event.assumed is not None:
            event.assumed.check(optimizer)

    return OptimizerBinding(event.optimizer, list(event.state), event.settings, fit, holds)
