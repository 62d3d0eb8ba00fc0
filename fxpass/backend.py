"""The backend as users see it: the options with a handle, the string "mixedprec", and ``of``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from . import _torch
from .errors import FxpassError, OptionError
from .hallway.frame import StepState, compile_frame, counters_of
from .hallway.graph_record import GraphRecord
from .options import Options, check_inductor, check_names
from .runtime.state import ScalerState, StepStats
from .runtime.watch import Diagnosis, diagnose

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class MixedPrecision(Options):
    """A backend for ``torch.compile`` with a handle: scale, statistics, checkpoints, graphs.

    ``torch.compile(step, backend=MixedPrecision(max_norm=1.0))`` compiles a
    whole training step. Options are checked here; see README for the table.

    Raises:
        OptionError: an option of the wrong type or out of range.
    """

    _state: StepState = field(init=False, repr=False)  # what its graphs share: scaler, records, watches

    def __new__(cls, *args: Any, **options: Any) -> Self:
        check_names(options)  # before the dataclass raises TypeError
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inductor(self.inductor, _torch.inductor_settings())
        object.__setattr__(self, "_state", StepState(ScalerState(self.policy), group=self.group))

    @property
    def scale(self) -> Tensor:
        """The loss scale: a live 0-d float32 tensor on the step's device."""
        return self._state.scaler.tensors["scale"]

    @property
    def grad_norm(self) -> Tensor:
        """The norm of the last step's unscaled gradients before clipping: live, like ``scale``."""
        return self._state.scaler.tensors["grad_norm"]

    @property
    def graphs(self) -> list[GraphRecord]:
        """One record per compiled graph, oldest first."""
        return list(self._state.graphs)

    def stats(self) -> StepStats:
        """Counters so far, read from the device (the only call that synchronises)."""
        return self._state.scaler.stats(self._state.watches)

    def diagnosis(self) -> Diagnosis:
        """Per parameter: first and last step with inf or nan, magnitudes, underflow; read from the device.

        The parameter whose gradient was first non-finite comes first. ``print``
        shows a table, ``rich.print`` a coloured one.
        """
        return diagnose(self._state.watches)

    def state_dict(self) -> dict[str, Any]:
        """Scale, growth tracker and counters as Python numbers; ``GradScaler.load_state_dict`` reads it."""
        return self._state.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, or from a state of GradScaler, Apex amp or DeepSpeed.

        Settings given to the constructor win over saved ones; scale and counters are the saved ones.

        Raises:
            OptionError: no known layout, or partial, or a value out of range; nothing is changed then.
        """
        self._state.load(state)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile one graph of Dynamo's; called by ``torch.compile``."""
        mode = kwargs.pop("mode", None)
        if kwargs:
            hint = "give the options to MixedPrecision(...), or use backend='mixedprec' with options={...}"
            raise OptionError("torch.compile(options=...) with a MixedPrecision object", hint=hint)
        return compile_frame(self, self._state, gm, inputs, mode)

    def note_break(self, record: _torch.FrameRecord) -> None:
        """Dynamo broke the graph of a frame: remembered for the error that may follow.

        Raises:
            CaptureError: the frame trains, and Dynamo has given it up.
        """
        self._state.note_break(record)

    def refuse_eager(self, where: str) -> None:
        """Raise: a backward is about to run uncompiled under this backend.

        Raises:
            CaptureError: always; no parameter has changed.
        """
        raise self._state.uncompiled(where)


class _NamedBackend:
    """The backend behind ``torch.compile(..., backend="mixedprec", options={...})``.

    Unequal even to itself: Dynamo lets two ``torch.compile`` calls whose
    backends are equal share compiled code, and with it they would share a scaler.
    """

    __name__ = "mixedprec"
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return False

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        record = _torch.current_record()
        if record is None:
            hint = "use torch.compile(step, backend='mixedprec')"
            raise FxpassError("the mixedprec backend was called outside of torch.compile", hint=hint)
        return record.backend(gm, inputs, **({"mode": kwargs["mode"]} if "mode" in kwargs else {}))


mixedprec = _NamedBackend()


def of(step: Callable[..., Any]) -> MixedPrecision:
    """The handle of a compiled step.

    Raises:
        OptionError: ``step`` was not compiled with this backend.
    """
    if isinstance(handle := getattr(step, "handle", None), MixedPrecision):  # fxpass.step(...)
        return handle
    backend = _torch.backend_of(step)
    ours = _find(backend) if backend is not None else None
    if ours is None:
        hint = "pass what torch.compile(step, backend='mixedprec') returned"
        raise OptionError(f"{step!r} is not a step compiled by fxpass", hint=hint)
    return ours


def _find(compiler_fn: Any) -> MixedPrecision | None:
    """The MixedPrecision object behind Dynamo's compiler function, None if it is not ours.

    A string backend gets its handle on first sight, kept on the wrapper object
    that torch.compile makes per call.
    """
    wrapper = _torch.innermost(compiler_fn)
    inner = getattr(wrapper, "compiler_fn", wrapper)
    if isinstance(inner, MixedPrecision):
        return inner
    if inner is not mixedprec:
        return None
    handle = getattr(wrapper, "_fxpass_handle", None)
    if handle is None:
        options = dict(getattr(wrapper, "kwargs", {}).get("options") or {})
        handle = MixedPrecision(**options)
        wrapper._fxpass_handle = handle
    return handle


_torch.install(_find, counters_of)
