"""The hallway: what happens to one frame, stage by stage, from Dynamo's graph to a callable.

capture -> passes -> lower -> runtime. This is the only module that knows every
stage; it holds no logic of theirs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import _torch
from .capture import checks, optim
from .capture.step import Captured, Event, capture, to_step
from .errors import FxpassError, LossScaleError, OptionError
from .ir.graph import StepGraph
from .ir.text import to_text
from .lower.compile import lower
from .options import Options, check_names
from .passes import pipeline
from .passes.pipeline import PassRecord, run_pipeline
from .runtime.state import NONFINITE, ScalerState, StepStats
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


@dataclass(frozen=True, eq=False)
class MixedPrecision(Options):
    """A backend for ``torch.compile`` with a handle: scale, statistics, checkpoints, graphs.

    ``torch.compile(step, backend=MixedPrecision(max_norm=1.0))`` compiles a
    whole training step. Options are checked here; see README for the table.

    Raises:
        OptionError: an option of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_state", ScalerState(self.loss_scale))  # type: ignore[arg-type]
        object.__setattr__(self, "_graphs", [])
        object.__setattr__(self, "_nonfinite", [])
        object.__setattr__(self, "_break", None)

    # ------------------------------------------------------------ the handle

    @property
    def scale(self) -> Tensor:
        """The loss scale: a live 0-d float32 tensor on the step's device."""
        return self._scaler.tensors["scale"]

    @property
    def graphs(self) -> list[GraphRecord]:
        """One record per compiled graph, oldest first."""
        return list(self.__dict__["_graphs"])

    @property
    def _scaler(self) -> ScalerState:
        return self.__dict__["_state"]

    def stats(self) -> StepStats:
        """Counters so far, read from the device (the only call that synchronises)."""
        return self._scaler.stats(self._nonfinite_names())

    def _nonfinite_names(self) -> tuple[str, ...]:
        found: list[str] = []
        for names, tensor in self.__dict__["_nonfinite"]:
            for name, value in zip(names, tensor.tolist(), strict=True):
                if value != value or value == float("inf"):
                    found.append(f"{name}: {'nan' if value != value else 'inf'}")
        return tuple(dict.fromkeys(found))

    def state_dict(self) -> dict[str, Any]:
        """Scale, growth tracker and counters as Python numbers; ``GradScaler.load_state_dict`` reads it."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the scale and counters of :meth:`state_dict` or of ``torch.amp.GradScaler.state_dict()``.

        Raises:
            OptionError: a key is missing or not a number; nothing is changed then.
        """
        try:
            self._scaler.load_state_dict(dict(state))
        except (KeyError, TypeError, ValueError) as error:
            hint = "pass what MixedPrecision.state_dict() or torch.amp.GradScaler.state_dict() returned"
            raise OptionError(f"not a loss scale state: {error!r}", hint=hint) from None

    # ------------------------------------------------------------ the backend

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile one graph of Dynamo's; called by ``torch.compile``."""
        mode = kwargs.pop("mode", None)
        if kwargs:
            hint = "give the options to MixedPrecision(...), or use backend='mixedprec' with options={...}"
            raise OptionError("torch.compile(options=...) with a MixedPrecision object", hint=hint)
        return _compile_frame(self, gm, inputs, mode)

    def note_break(self, record: Any) -> None:
        """Dynamo broke the graph of a frame: remembered for the error that may follow."""
        object.__setattr__(self, "_break", (record.break_reason, record.break_where))

    @property
    def last_break(self) -> tuple[str, str] | None:
        """Reason and user line of the last graph break."""
        return self.__dict__["_break"]


def mixedprec(gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend behind ``torch.compile(..., backend="mixedprec", options={...})``."""
    record = _torch.current_record()
    if record is None:
        hint = "use torch.compile(step, backend='mixedprec')"
        raise FxpassError("the mixedprec backend was called outside of torch.compile", hint=hint)
    return record.backend(gm, inputs, **({"mode": kwargs["mode"]} if "mode" in kwargs else {}))


def of(step: Callable[..., Any]) -> MixedPrecision:
    """The handle of a compiled step.

    Raises:
        OptionError: ``step`` was not compiled with this backend.
    """
    backend = _torch.backend_of(step)
    found = _find(backend) if backend is not None else None
    if found is None:
        hint = "pass what torch.compile(step, backend='mixedprec') returned"
        raise OptionError(f"{step!r} is not a step compiled by fxpass", hint=hint)
    return found


def _find(compiler_fn: Any) -> MixedPrecision | None:
    """The MixedPrecision object behind Dynamo's compiler function, None if it is not ours.

    A string backend gets its handle on first sight, kept on the wrapper object
    that torch.compile makes per call.
    """
    inner = getattr(compiler_fn, "compiler_fn", compiler_fn)
    if isinstance(inner, MixedPrecision):
        return inner
    if inner is not mixedprec:
        return None
    handle = getattr(compiler_fn, "_fxpass_handle", None)
    if handle is None:
        options = dict(getattr(compiler_fn, "kwargs", {}).get("options") or {})
        check_names(options)
        handle = MixedPrecision(**options)
        compiler_fn._fxpass_handle = handle
    return handle


_torch.install(_find)


# ---------------------------------------------------------------- one frame


def _compile_frame(mp: MixedPrecision, gm: GraphModule, inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    record = _torch.current_record()
    checks.check_frame(gm, record, mp.last_break)
    undo: list[Callable[[], None]] = []
    try:
        for event in record.events:
            places = [(p.group, p.position) for p in event.params if p.has_grad]
            optim.check(event.live(), event.where)
            undo.append(optim.create_state(event.live(), places, event.where))
        return _Compilation(mp, gm, inputs, mode, record).run()
    except BaseException:
        for back in undo:
            back()
        raise


class _Compilation:
    """One frame on its way through the stages."""

    def __init__(self, mp: MixedPrecision, gm: GraphModule, inputs: Sequence[Any], mode: str | None, record: Any) -> None:
        self.mp, self.gm, self.inputs, self.mode, self.record = mp, gm, list(inputs), mode, record
        self.scaler = mp._scaler
        self.clock = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.checked: list[str] = []

    def run(self) -> CompiledStep:
        fields = [*self.scaler.fields, NONFINITE] if self.record.events else []
        self.captured = capture(self.gm, self.record, fields, keep_grads=self.mp.grads == "keep")
        self.bindings = [_binding(event) for event in self.captured.events]
        self.device = checks.device_of([e.live() for e in self.record.events], self.inputs)
        self.scaler.to(self.device)
        reads = max(len(self.record.leaf_grads), 1)
        self.nonfinite = torch.zeros(reads, dtype=torch.float32, device=self.device) if fields else None
        call = _torch.trace(self.captured.gm, self.inputs + self._extras(), self._inner)
        return CompiledStep(
            call,
            self.scaler,
            self.bindings,
            self.device,
            self.captured.outputs,
            self.captured.kept,
            self._cleared(),
            self.mp.grads == "drop",
            self.nonfinite,
            _patience(self.mp),
        )

    def _extras(self) -> list[Tensor]:
        if not self.bindings:
            return []
        extras = [self.scaler.tensors[name] for name in self.scaler.fields]
        assert self.nonfinite is not None, "a step that trains has a record of overflows"
        return [*extras, self.nonfinite, *(t for b in self.bindings for t in b.inputs(self.device))]

    def _cleared(self) -> list[tuple[int, int, int]]:
        return [
            (event.index, p.group, p.position)
            for event in self.record.events
            for p in event.params
            if p.node in self.record.cleared
        ]

    def _inner(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """AOTAutograd's compiler: the ATen graph through passes and lowering."""
        self._lap("capture")
        step = to_step(self.captured, gm, checks.input_names(self.gm))
        step.read_events = [e for e, event in enumerate(self.record.events) for p in event.params if p.has_grad]
        step.backwards_before = [event.backwards for event in self.record.events]
        before = to_text(step)
        passes = run_pipeline(step, pipeline(self.mp), check=self.mp.verify)
        self._lap("passes")
        names = [checks.leaf_name(self.record, step, mark) for mark, _ in step.checked]
        if self.nonfinite is not None:
            self.nonfinite.resize_(len(names)) if len(names) != len(self.nonfinite) else None
            self.mp.__dict__["_nonfinite"].append((names, self.nonfinite))
        after, unreached = to_text(step), checks.unreached(self.record)
        compiled = lower(step, inputs, self.mp, self.mode)
        self._lap("lower")
        self.mp.__dict__["_graphs"].append(GraphRecord(before, after, passes, unreached, self.seconds))
        return compiled

    def _lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self.clock
        self.clock = now


def _binding(event: Event) -> OptimizerBinding:
    def recreate(optimizer: torch.optim.Optimizer) -> None:
        optim.create_state(optimizer, event.places, event.where)

    def holds(optimizer: torch.optim.Optimizer) -> None:
        if event.comparisons:
            optim.check_comparisons(optimizer, event.dynamic, event.comparisons, event.where)

    keys = [(k.group, k.position, k.key) for k in event.state]
    return OptimizerBinding(event.optimizer, keys, recreate, holds)


def _patience(mp: MixedPrecision) -> Callable[[], None]:
    """Raises LossScaleError once the scale is stuck at its minimum for ``patience`` overflows."""
    policy = mp.loss_scale
    patience = getattr(policy, "patience", None)
    if patience is None:
        return lambda: None

    def look() -> None:
        stuck = mp._scaler.tensors["stuck"]
        if stuck.device.type == "cpu" and int(stuck) >= patience:
            names = mp._nonfinite_names()
            found = (
                f"{patience} steps in a row overflowed at the minimum loss scale {policy.min_scale:g}; "  # type: ignore[union-attr]
                f"first non-finite gradient: {names[0] if names else 'unknown'}"
            )
            hint = "look for inf or nan in the forward of that parameter's module, or keep it in float32 (keep_fp32)"
            raise LossScaleError(found, hint=hint)

    return look


__all__ = ["GraphRecord", "MixedPrecision", "dataclasses", "mixedprec", "of"]
