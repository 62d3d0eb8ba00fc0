"""Scaler states of other libraries, and our own, read into one form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError
from ..scaling import KEPT

GRAD_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
COUNTERS = ("steps", "skipped", "consecutive_skipped", "clipped")
HINT = (
    "pass what MixedPrecision.state_dict() returned, or the state of torch.amp.GradScaler, Apex amp "
    "or a DeepSpeed optimizer"
)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says: the scale, good steps since it last moved, and counters it has."""

    scale: float
    growth_tracker: int
    counters: Mapping[str, float] = field(default_factory=dict)


def read_state(state: Mapping[str, Any], keeps: Mapping[str, float]) -> Saved:
    """Recognise the layout of ``state`` and check every value of it.

    ``keeps``: what the policy at hand keeps in its checkpoints, beside those of ``fxpass.scaling``.

    * ours and ``torch.amp.GradScaler``: ``{"scale": ..., "_growth_tracker": ...}``;
    * Apex amp: ``{"loss_scaler0": {"loss_scale": ..., "unskipped": ...}}``, of several the smallest scale;
    * DeepSpeed: ``{"cur_scale": ..., "cur_iter": ..., "last_overflow_iter": ...}`` or, of ZeRO, the
      scaler object under ``"loss_scaler"``.

    Raises:
        OptionError: no known layout, a key is missing, or a value is no possible one.
    """
    if not isinstance(state, Mapping):
        raise OptionError(f"not a loss scale state: {type(state).__name__} is not a dict", hint=HINT)
    for belongs, read in _LAYOUTS:
        if belongs(state):
            return read(state, keeps)
    keys = ", ".join(map(str, list(state)[:8])) or "none"
    raise OptionError(f"not a loss scale state: no layout has the keys it has ({keys})", hint=HINT)


def _grad_scaler(state: Mapping[str, Any], keeps: Mapping[str, float]) -> Saved:
    for key in GRAD_SCALER:
        _get(state, key)
    always = {**dict.fromkeys(COUNTERS, 0), "grad_norm": 0.0}
    kinds = {**always, **KEPT, **keeps}
    known = [key for key in kinds if key in state and key not in ("scale", "growth_tracker")]
    if known:  # ours: whatever the policy, these are always there
        for key in always:
            _get(state, key)
    read = {int: _count, float: _number}
    counters = {key: read[type(kinds[key])](state, key) for key in known}
    return Saved(_scale(state, "scale"), _count(state, "_growth_tracker", least=-(2**31)), counters)


def _apex(state: Mapping[str, Any], keeps: Mapping[str, float]) -> Saved:
    scalers = [state[key] for key in state if str(key).startswith("loss_scaler")]
    scales = []
    for scaler in scalers:
        if not isinstance(scaler, Mapping):
            raise OptionError(f"not a loss scale state: loss_scaler is {scaler!r}", hint=HINT)
        scales.append(Saved(_scale(scaler, "loss_scale"), _count(scaler, "unskipped")))
    return min(scales, key=lambda saved: saved.scale)


def _deepspeed(state: Mapping[str, Any], keeps: Mapping[str, float]) -> Saved:
    scale = _scale(state, "cur_scale")
    if "cur_iter" not in state and "last_overflow_iter" not in state:
        if state.get("dynamic_loss_scale", False):
            _get(state, "cur_iter")
        return Saved(scale, 0)  # a static scale
    good = _count(state, "cur_iter") - _count(state, "last_overflow_iter", least=-1) - 1
    if good < 0:
        raise OptionError("not a loss scale state: last_overflow_iter is after cur_iter", hint=HINT)
    window = _count(state, "scale_window", least=1) if "scale_window" in state else 0
    # the first growth comes after window + 1 good steps, the next ones after window
    tracker = good - 1 if not window or good <= window else (good - 1) % window
    left = ("delayed_shift", "cur_hysteresis")
    used = {"overflows": _count(state, left[0]) - _count(state, left[1])} if left[1] in state else {}
    return Saved(scale, tracker, used)


def _zero(state: Mapping[str, Any], keeps: Mapping[str, float]) -> Saved:
    scaler = state["loss_scaler"]
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_window", "delayed_shift", "cur_hysteresis")
    if isinstance(scaler, Mapping):
        return _deepspeed(scaler, keeps)
    return _deepspeed({name: getattr(scaler, name) for name in names if hasattr(scaler, name)}, keeps)


_Reader = Callable[[Mapping[str, Any], Mapping[str, float]], Saved]
_LAYOUTS: tuple[tuple[Callable[[Mapping[str, Any]], bool], _Reader], ...] = (
    (lambda s: "scale" in s or "_growth_tracker" in s, _grad_scaler),
    (lambda s: "cur_scale" in s, _deepspeed),
    (lambda s: "loss_scaler" in s, _zero),
    (lambda s: any(str(key).startswith("loss_scaler") for key in s), _apex),
)


def _get(state: Mapping[str, Any], key: str) -> Any:
    if key not in state:
        raise OptionError(f"not a loss scale state: {key!r} is missing", hint=HINT)
    return state[key]


def _number(state: Mapping[str, Any], key: str) -> float:
    value = _get(state, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"not a loss scale state: {key!r} is {value!r}, not a number", hint=HINT)
    return float(value)


def _scale(state: Mapping[str, Any], key: str) -> float:
    value = _number(state, key)
    if not (math.isfinite(value) and value > 0):
        hint = "a scale of 0 is where other scalers end up after overflows without end; start with a new one"
        raise OptionError(f"not a loss scale state: {key!r} is {value!r}, not a finite number > 0", hint=hint)
    return value


def _count(state: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = _number(state, key)
    if not math.isfinite(value) or value != int(value) or value < least:
        raise OptionError(f"not a loss scale state: {key!r} is {value!r}, not a whole number", hint=HINT)
    return int(value)
