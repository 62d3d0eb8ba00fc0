"""Is a compiled run the eager one? To a tolerance that the noise of the program itself sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz.reference import Run


@dataclass(frozen=True)
class Tolerance:
    """How far apart two runs may be, relative to a tensor's norm, and in multiples of the noise."""

    relative: float
    change: float  # share of what the run changed in a parameter
    noise: float  # what the perturbed runs move the parameters by
    factor: float  # times what the perturbed runs came to
    most: float = math.inf  # what is larger may be inf


TOLERANCES = {
    "float32": Tolerance(relative=1e-5, change=1e-3, noise=1e-6, factor=5.0),
    "float16": Tolerance(relative=0.02, change=0.2, noise=2e-3, factor=5.0, most=65504.0),
    "bfloat16": Tolerance(relative=0.1, change=0.4, noise=1.6e-2, factor=5.0),
}


def difference(
    number: int, ours: Run, theirs: Run, noisy: Sequence[Run], tolerance: Tolerance, exact: Sequence[str]
) -> str:
    """The first tensor that differs after a call, as text; empty if none does."""
    mine, wanted = ours.calls[number], theirs.calls[number]
    changes = [wanted.state[name] - old for name, old in theirs.start.items() if name.startswith("model")]
    moved = max(map(_size, changes))
    for name, expected in wanted.state.items():
        largest = moved
        if name not in mine.state:
            return f"{name}: missing"
        zero = torch.zeros_like(expected)
        is_exact = name.removeprefix("extra ").rsplit(" ", 1)[0] in exact
        runs = [r for r in noisy if name in r.calls[number].state and not (r.autocast and is_exact)]
        others = [(r.calls[number].state[name], r.start.get(name, zero)) for r in runs]
        own = TOLERANCES["float32"] if is_exact else tolerance
        start = theirs.start.get(name)
        if name.startswith("optimizer"):
            largest = max(
                _size(v) for n, v in wanted.state.items() if n.split(".")[1:] == name.split(".")[1:]
            )
        if text := _differs(mine.state[name], expected, start, others, own, largest):
            return f"{name}: {text}"
    if wanted.skipped:
        return ""  # a loss of inf or nan is whatever the compiler makes of it
    if len(mine.outputs) != len(wanted.outputs):
        return f"{len(mine.outputs)} outputs instead of {len(wanted.outputs)}"
    for name, expected in wanted.grads.items():
        if name not in mine.grads:
            return f"grad {name}: missing"
        others = [(r.calls[number].grads[name], torch.zeros_like(expected)) for r in noisy]
        if text := _differs(mine.grads[name], expected, None, others, tolerance):
            return f"grad {name}: {text}"
    for index, expected in enumerate(wanted.outputs):
        others = [(r.calls[number].outputs[index], torch.zeros_like(expected)) for r in noisy]
        if text := _differs(mine.outputs[index], expected, None, others, tolerance):
            return f"output {index}: {text}"
    return ""


def _differs(
    ours: Tensor,
    theirs: Tensor,
    start: Tensor | None,
    noisy: list[tuple[Tensor, Tensor]],
    t: Tolerance,
    largest: float = 0.0,
) -> str:
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    finite = theirs.isfinite() & (theirs.abs() <= t.most)
    for other, _ in noisy:
        finite = finite & other.isfinite()
    odd = finite & ~ours.isfinite()
    if odd.any():
        return f"{ours[odd][0].item()} where eager has {theirs[odd][0].item():.6g}"
    sure = all(torch.equal(other.isfinite(), theirs.isfinite()) for other, _ in noisy)
    if sure and (~theirs.isfinite() & ours.isfinite()).any():
        return f"finite where eager is not: {ours.tolist()} instead of {theirs.tolist()}"
    begin = torch.zeros_like(theirs) if start is None else start
    moved = (theirs - begin)[finite]
    spread = max([float(((other - origin)[finite] - moved).norm()) for other, origin in noisy], default=0.0)
    size, error = float(theirs[finite].norm()), float((ours - theirs)[finite].norm())
    rounding = 3 * t.noise * largest  # of gradients that cancel, such as a bias's before a norm
    allowed = t.relative * size + (rounding if t.relative > 1e-4 else 0.0)
    if start is not None and t.relative > 1e-4:  # in half precision a change says more than a value
        allowed = min(allowed, t.change * float(moved.norm()) + rounding + 1e-6 * size)
    allowed += t.factor * spread + 1e-9
    if error <= allowed:
        return ""
    return f"differs by {error:.3g} of {size:.3g}, allowed {allowed:.3g} (noise {spread:.3g})"


def _size(values: Tensor) -> float:
    return float(values.nan_to_num(0.0, 0.0, 0.0).norm())
