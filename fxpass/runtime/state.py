"""The scaler's state: device tensors shared by all graphs of one compiled step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .scale import DynamicLossScale, LossScale

COUNTERS = ("steps", "skipped", "consecutive_skipped", "clipped")
DYNAMIC = ("scale", "growth_tracker", "overflows", "stuck")
NONFINITE = "nonfinite"  # one float32 per checked gradient, of the last overflow; belongs to one graph


class StepStats(NamedTuple):
    """What happened so far. ``grad_norm`` is of the last step, unscaled, before clipping."""

    steps: int
    skipped: int
    consecutive_skipped: int
    scale: float
    growth_tracker: int
    grad_norm: float
    clipped: int
    nonfinite: tuple[str, ...]  # "parameter: inf" or "parameter: nan", of the last skipped step


class ScalerState:
    """Scale and counters as 0-d tensors on the step's device, made on first use."""

    def __init__(self, loss_scale: LossScale | None) -> None:
        self.loss_scale = loss_scale
        self.tensors: dict[str, Tensor] = {}
        self._make(torch.device("cpu"))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a graph reads and writes, in input order."""
        if self.loss_scale is None:
            return (*COUNTERS, "grad_norm")
        if self.loss_scale.dynamic:
            return (*COUNTERS, "grad_norm", *DYNAMIC)
        return (*COUNTERS, "grad_norm", "scale")

    def _make(self, device: torch.device) -> None:
        for name in (*COUNTERS, "growth_tracker", "overflows", "stuck"):
            self.tensors[name] = torch.zeros((), dtype=torch.int64, device=device)
        self.tensors["grad_norm"] = torch.zeros((), dtype=torch.float32, device=device)
        init = 1.0 if self.loss_scale is None else self.loss_scale.init
        self.tensors["scale"] = torch.full((), init, dtype=torch.float32, device=device)

    def to(self, device: torch.device) -> None:
        """Move the state to the device of the step's parameters."""
        for name, value in self.tensors.items():
            if value.device != device:
                self.tensors[name] = value.to(device)

    def stats(self, nonfinite: tuple[str, ...]) -> StepStats:
        """Read everything to the host: the only call that synchronises."""
        t = self.tensors
        return StepStats(
            int(t["steps"]),
            int(t["skipped"]),
            int(t["consecutive_skipped"]),
            float(t["scale"]),
            int(t["growth_tracker"]),
            float(t["grad_norm"]),
            int(t["clipped"]),
            nonfinite,
        )

    def state_dict(self) -> dict[str, float | int]:
        """GradScaler's keys first (it reads this dict as it is), then fxpass's own."""
        policy = self.loss_scale if isinstance(self.loss_scale, DynamicLossScale) else DynamicLossScale()
        t = self.tensors
        return {
            "scale": float(t["scale"]),
            "growth_factor": policy.growth_factor,
            "backoff_factor": policy.backoff_factor,
            "growth_interval": policy.growth_interval,
            "_growth_tracker": int(t["growth_tracker"]),
            **{name: int(t[name]) for name in (*COUNTERS, "overflows", "stuck")},
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Take scale and counters; settings given to the constructor win over saved ones.

        Raises:
            KeyError: ``scale`` or ``_growth_tracker`` is missing; nothing is changed then.
        """
        scale, tracker = float(state["scale"]), int(state["_growth_tracker"])
        counters = {name: int(state.get(name, 0)) for name in (*COUNTERS, "overflows", "stuck")}
        self.tensors["scale"].fill_(scale)
        self.tensors["growth_tracker"].fill_(tracker)
        for name, value in counters.items():
            self.tensors[name].fill_(value)
