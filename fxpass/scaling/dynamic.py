"""torch.amp.GradScaler's state machine, and those of Apex and DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..errors import OptionError
from .loss_scale import LARGEST, SMALLEST, MovingLossScale, check, check_counts, count_stuck
from .writer import Writer

aten = torch.ops.aten


@dataclass(frozen=True)
class DynamicLossScale(MovingLossScale):
    """torch.amp.GradScaler's state machine, with a floor, a ceiling and hysteresis.

    An overflow multiplies the scale by ``backoff_factor`` and never takes it
    below ``min_scale``; ``growth_interval`` good steps in a row multiply it by
    ``growth_factor`` if the result is finite and at most ``max_scale``.
    ``patience`` overflows in a row at ``min_scale`` raise
    ``fxpass.LossScaleError``.

    Args:
        hysteresis: the ``hysteresis``-th overflow is the first that lowers the scale.
        consecutive_hysteresis: a good step forgives earlier overflows (Apex); else
            only a growth does (DeepSpeed's default).
        growth_delay: more good steps than ``growth_interval`` that the first growth
            takes, from the start or after an overflow (DeepSpeed: 1).
        saturate: grow to ``max_scale`` itself rather than stop below it (Apex).

    Raises:
        OptionError: a setting of the wrong type or out of range.
    """

    name: ClassVar[str] = "dynamic"
    keeps: ClassVar[Mapping[str, float]] = {"scale": 1.0, "growth_tracker": 0, "overflows": 0, "stuck": 0}

    init_scale: float = 2.0**16  # pyrefly: ignore[bad-override]
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 1.0  # pyrefly: ignore[bad-override]
    max_scale: float = 2.0**24  # pyrefly: ignore[bad-override]
    patience: int = 50  # pyrefly: ignore[bad-override]
    consecutive_hysteresis: bool = True
    growth_delay: int = 0
    saturate: bool = False

    def __post_init__(self) -> None:
        cls = type(self)
        check_counts(self, "growth_interval", "hysteresis")
        check_counts(self, "growth_delay", least=0)
        self.check_range()
        check(cls, "growth_factor", self.growth_factor, self.growth_factor >= 1, "a finite number >= 1")
        check(cls, "backoff_factor", self.backoff_factor, 0 < self.backoff_factor < 1, "between 0 and 1")
        for name in ("consecutive_hysteresis", "saturate"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise OptionError(f"{cls.__name__}({name}={value!r}): {name} must be True or False")

    @classmethod
    def like(cls, library: str, **settings: Any) -> DynamicLossScale:
        """Defaults and sequence of ``"torch"``, ``"apex"`` or ``"deepspeed"``, with ``settings`` on top.

        The library's own names of settings are understood too
        (``initial_scale_power=16`` of DeepSpeed, ``scale_window=2000`` of Apex).
        Not reproduced are their faults: the scale never becomes 0.0, where
        GradScaler and Apex end up, and gradients are divided by the scale they
        were multiplied by, where DeepSpeed takes the one after it.

        Raises:
            OptionError: an unknown library or setting, or a value out of range.
        """
        if library not in _LIBRARIES:
            allowed = " or ".join(map(repr, _LIBRARIES))
            raise OptionError(f"DynamicLossScale.like({library!r}): allowed is {allowed}")
        defaults, names = _LIBRARIES[library]
        values = dict(defaults)
        for name, value in settings.items():
            if name == "initial_scale_power" and library == "deepspeed":
                check(cls, name, value, isinstance(value, int) and -126 <= value <= 127, "an integer")
                values["init_scale"] = 2.0**value
                continue
            own = names.get(name, name)
            if own not in cls.__dataclass_fields__:
                hint = f"the settings are {', '.join([*cls.__dataclass_fields__, *names])}"
                raise OptionError(f"DynamicLossScale.like({library!r}) has no setting {name!r}", hint=hint)
            values[own] = value
        return cls(**values)

    def grad_scaler(self) -> dict[str, float]:
        return {
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
        }

    def first(self) -> dict[str, float]:
        return {**super().first(), "growth_tracker": -self.growth_delay}

    def resumed(self, scale: float, growth_tracker: int) -> dict[str, float]:
        return {"scale": self.within(scale), "growth_tracker": max(growth_tracker, -self.growth_delay)}

    def move(self, out: Writer, overflow: Node, magnitudes: Sequence[Node], limit: float) -> None:
        read = out.read
        scale, tracker = read["scale"], read["growth_tracker"]
        overflows = out.op(aten.add.Tensor, read["overflows"], 1)
        patient = out.op(aten.lt.Scalar, overflows, self.hysteresis)
        smaller = out.op(aten.mul.Tensor, scale, self.backoff_factor)
        backed_off = out.select(patient, scale, out.op(aten.clamp_min.default, smaller, self.min_scale))

        good = out.op(aten.add.Tensor, tracker, 1)
        grows = out.op(aten.ge.Scalar, good, self.growth_interval)  # more than it: a loaded checkpoint's
        larger = out.op(aten.mul.Tensor, scale, self.growth_factor)
        if self.saturate:
            larger, allowed = out.op(aten.clamp_max.default, larger, self.max_scale), grows
        else:
            fits = out.op(aten.le.Scalar, larger, self.max_scale)
            allowed = out.op(aten.logical_and.default, grows, fits)
        out.write("scale", out.select(overflow, backed_off, out.select(allowed, larger, scale)))

        none = out.zero("growth_tracker")
        restart = out.op(aten.sub.Tensor, none, self.growth_delay)
        out.write("growth_tracker", out.select(overflow, restart, out.select(grows, none, good)))
        forgiven = out.zero("overflows")
        if not self.consecutive_hysteresis:
            forgiven = out.select(grows, forgiven, read["overflows"])
        out.write("overflows", out.select(overflow, overflows, forgiven))
        backs_off = out.op(aten.logical_and.default, overflow, out.op(aten.logical_not.default, patient))
        count_stuck(out, backs_off, self.min_scale)


# By library: its defaults where they differ from ours, and its names for our settings.
_LIBRARIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "torch": ({"min_scale": SMALLEST, "max_scale": LARGEST}, {}),
    "apex": (
        {"min_scale": SMALLEST, "saturate": True},
        {"scale_window": "growth_interval", "min_loss_scale": "min_scale", "max_loss_scale": "max_scale"},
    ),
    "deepspeed": (
        {
            "growth_interval": 1000,
            "growth_delay": 1,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "max_scale": LARGEST,
            "patience": 1,
        },
        {"loss_scale_window": "growth_interval", "min_loss_scale": "min_scale"},
    ),
}
