"""The scaler's state: device tensors shared by all graphs of one compiled step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..scaling import LossScale, NoLossScale
from .checkpoint import COUNTERS, read_state
from .watch import Watch, summary


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

    def _asdict(self) -> dict[str, Any]:
        """Flat: numbers, and ``nonfinite`` as one string. Ready for a logger's scalars."""
        return {**super()._asdict(), "nonfinite": ", ".join(self.nonfinite)}


class ScalerState:
    """Scale and counters as 0-d tensors on the step's device, made on first use."""

    def __init__(self, loss_scale: LossScale | None) -> None:
        self.policy = loss_scale or NoLossScale()
        self.tensors: dict[str, Tensor] = {}
        self._make(torch.device("cpu"))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a graph reads and writes, in input order."""
        return (*COUNTERS, "grad_norm", *self.policy.keeps)

    def _make(self, device: torch.device) -> None:
        always = {**dict.fromkeys(COUNTERS, 0), "grad_norm": 0.0}
        always |= {"scale": self.policy.init, "growth_tracker": 0}  # which every GradScaler has
        for name, first in {**always, **self.policy.first()}.items():
            dtype = torch.int64 if isinstance(first, int) else torch.float32
            self.tensors[name] = torch.full((), first, dtype=dtype, device=device)

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
        t = self.tensors
        own = {name: t[name].item() for name in self.fields if name not in ("scale", "growth_tracker")}
        return {
            "scale": float(t["scale"]),
            **self.policy.grad_scaler(),
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
        saved = read_state(state, self.policy.keeps)
        fresh = ScalerState(self.policy)  # what the layout does not say starts anew
        for name, value in self.policy.resumed(saved.scale, saved.growth_tracker).items():
            fresh.tensors[name].fill_(value)
        for name in fresh.fields:
            if name in saved.counters:
                fresh.tensors[name].fill_(saved.counters[name])
        for name, value in fresh.tensors.items():
            self.tensors[name].copy_(value)
