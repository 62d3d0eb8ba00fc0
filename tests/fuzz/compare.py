"""Is a compiled run the eager one? To a tolerance that the noise of the program itself sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz.reference import Call


@dataclass(frozen=True)
class Tolerance:
    """How far apart two runs may be, relative to a tensor's norm, and in multiples of the noise."""

    relative: float
    change: float  # share of what the run changed in a parameter
    noise: float  # what the perturbed runs move the parameters by
    factor: float  # times what the perturbed runs came to


TOLERANCES = {
    "float32": Tolerance(relative=1e-5, change=1e-3, noise=1e-6, factor=5.0),
    "float16": Tolerance(relative=0.02, change=0.2, noise=2e-3, factor=5.0),
    "bfloat16": Tolerance(relative=0.1, change=0.4, noise=1.6e-2, factor=5.0),
}


def difference(
    ours: Call, theirs: Call, noisy: Sequence[Call], start: Mapping[str, Tensor], tolerance: Tolerance
) -> str:
    """The first tensor that differs after a call, as text; empty if none does."""
    for name, expected in theirs.state.items():
        if name not in ours.state:
            return f"{name} is missing"
        seen = [call.state[name] for call in noisy if name in call.state]
        if text := _differs(ours.state[name], expected, seen, start.get(name), tolerance):
            return f"{name}: {text}"
    if theirs.skipped:
        return ""  # a loss of inf or nan is whatever the compiler makes of it
    if len(ours.outputs) != len(theirs.outputs):
        return f"{len(ours.outputs)} outputs instead of {len(theirs.outputs)}"
    for index, expected in enumerate(theirs.outputs):
        seen = [call.outputs[index] for call in noisy]
        if text := _differs(ours.outputs[index], expected, seen, None, tolerance):
            return f"output {index}: {text}"
    return ""


def _differs(ours: Tensor, theirs: Tensor, noisy: list[Tensor], start: Tensor | None, t: Tolerance) -> str:
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    finite = theirs.isfinite()
    for other in noisy:
        finite = finite & other.isfinite()
    odd = finite & ~ours.isfinite()
    if odd.any():
        return f"{ours[odd][0].item()} where eager has {theirs[odd][0].item():.6g}"
    if (~theirs.isfinite() & ours.isfinite()).any() and all(
        torch.equal(other.isfinite(), theirs.isfinite()) for other in noisy
    ):
        return f"finite where eager is not: {ours.tolist()} instead of {theirs.tolist()}"
    a, b = ours[finite], theirs[finite]
    spread = max([float((other[finite] - b).norm()) for other in noisy], default=0.0)
    allowed = t.relative * float(b.norm()) + t.factor * spread + 1e-9
    error = float((a - b).norm())
    if start is not None and t.relative > 1e-4:  # in half precision a parameter's change says more than it
        moved = float((b - start[finite]).norm())
        allowed = min(allowed, t.change * moved + t.factor * spread + 1e-6 * float(b.norm()))
    if error <= allowed:
        return ""
    return f"differs by {error:.3g} of {float(b.norm()):.3g}, allowed {allowed:.3g} (noise {spread:.3g})"
