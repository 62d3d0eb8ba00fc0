"""The scaler's state: device tensors shared by all graphs of one compiled step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import read_state
from .scale import DynamicLossScale, HeadroomLossScale, LossScale, StaticLossScale
from .watch import Watch, summary

COUNTERS = ("steps", "skipped", "consecutive_skipped", "clipped")
DYNAMIC = ("scale", "growth_tracker", "overflows", "stuck")
HEADROOM = ("headroom_mean", "headroom_variance", "headroom_last", "headroom_margin")


class _Fields(NamedTuple):
    steps: int
    skipped: int
    consecutive_skipped: int
    scale: float
    growth_tracker: int
    grad_norm: float
    clipped: int
    nonfinite: tuple[str, ...]
    largest: float
    underflow: float
    zeros: float


class StepStats(_Fields):
    """What happened so far.

    ``grad_norm`` is the global norm of the last step's unscaled gradients
    before clipping; ``nonfinite`` names the gradients of the last skipped step,
    as ``"parameter: inf"`` or ``"parameter: nan"``, in backward's order;
    ``largest`` is the largest unscaled magnitude in the last step; of its
    float16 gradients' elements, ``underflow`` is the share below the normal
    numbers (less than 2**-14 as stored), and ``zeros`` the part of it that is
    zero: underflow too, unless the gradient is zero in exact arithmetic.
    """

    __slots__ = ()

    def _asdict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Flat: numbers, and ``nonfinite`` as one string. Ready for a logger's scalars."""
        return {**super()._asdict(), "nonfinite": ", ".join(self.nonfinite)}


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
        if isinstance(self.loss_scale, DynamicLossScale):
            return (*COUNTERS, "grad_norm", *DYNAMIC)
        if isinstance(self.loss_scale, HeadroomLossScale):
            return (*COUNTERS, "grad_norm", "scale", "stuck", "headroom_count", *HEADROOM)
        return (*COUNTERS, "grad_norm", "scale")

    def _make(self, device: torch.device) -> None:
        policy = self.loss_scale
        for name in (*COUNTERS, "growth_tracker", "overflows", "stuck", "headroom_count"):
            self.tensors[name] = torch.zeros((), dtype=torch.int64, device=device)
        if isinstance(policy, DynamicLossScale):
            self.tensors["growth_tracker"] -= policy.growth_delay
        for name in ("grad_norm", *HEADROOM):
            self.tensors[name] = torch.zeros((), dtype=torch.float32, device=device)
        self.tensors["headroom_variance"] += 1.0
        init = 1.0 if policy is None else policy.init
        self.tensors["scale"] = torch.full((), init, dtype=torch.float32, device=device)

    def to(self, device: torch.device) -> None:
        """Move the state to the device of the step's parameters."""
        for name, value in self.tensors.items():
            if value.device != device:
                self.tensors[name] = value.to(device)

    def stats(self, watches: Sequence[Watch]) -> StepStats:
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
            *summary(watches),
        )

    def state_dict(self) -> dict[str, float | int]:
        """GradScaler's keys first (it reads this dict as it is), then fxpass's own."""
        policy, t = self.loss_scale, self.tensors
        moves = policy if isinstance(policy, DynamicLossScale) else DynamicLossScale()
        still = policy is None or isinstance(policy, StaticLossScale)  # GradScaler keeps it still, too
        own = {name: t[name].item() for name in self.fields if name not in ("scale", "growth_tracker")}
        return {
            "scale": float(t["scale"]),
            "growth_factor": 1.0 if still else moves.growth_factor,
            "backoff_factor": 1.0 if still else moves.backoff_factor,
            "growth_interval": moves.growth_interval,
            "_growth_tracker": int(t["growth_tracker"]),
            **own,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take scale and counters; settings given to the constructor win over saved ones.

        So a static scale stays what it is, and a saved scale outside of
        ``min_scale`` and ``max_scale`` is moved to the nearer of the two.

        Raises:
            OptionError: the state is of no known layout, partial or out of range; nothing is changed then.
        """
        saved = read_state(state)
        fresh = ScalerState(self.loss_scale)  # what the layout does not say starts anew
        policy = self.loss_scale
        if isinstance(policy, (DynamicLossScale, HeadroomLossScale)):
            scale = min(max(saved.scale, policy.min_scale), policy.max_scale)
            fresh.tensors["scale"].fill_(scale)
            delay = policy.growth_delay if isinstance(policy, DynamicLossScale) else 0
            fresh.tensors["growth_tracker"].fill_(max(saved.growth_tracker, -delay))
        for name in fresh.fields:
            if name in saved.counters:
                fresh.tensors[name].fill_(saved.counters[name])
        for name, value in fresh.tensors.items():
            self.tensors[name].copy_(value)
