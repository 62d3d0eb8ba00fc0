"""Bytes over one call, with the moments a training step passes, and plots of them.

The moments of any eager step are found by watching `Tensor.backward` and `Optimizer.step` from
outside, so that contenders need not know. On a CPU only: a CUDA device tells its peak alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

CALL, BACKWARD, UPDATE = "bench::call", "bench::backward", "bench::update"
COLOURS = {
    "parameter": "#4c78a8",
    "optimizer state": "#9ecae9",
    "masters": "#72b7b2",
    "gradients": "#e45756",
    "activations": "#f58518",
    "cast weights": "#b279a2",
    "temporaries": "#bab0ac",
    "activations and temporaries": "#f58518",
}


@dataclass(frozen=True)
class Timeline:
    """Bytes beyond those held when the call began, after every allocation and free."""

    points: list[tuple[float, int]]  # (share of the call's duration, bytes)
    moments: dict[str, int]  # bytes at the end of forward, at the end of backward, at the update's peak

    @property
    def peak(self) -> int:
        """The most bytes held beyond those at the beginning."""
        return max((size for _, size in self.points), default=0)


def timeline_of_call(call: Callable[[], object], *, eager_step: bool) -> Timeline:
    """Call twice and follow the second call (the profiler needs the first: see bench/measure.py).

    Only an eager step passes through `Tensor.backward` and `Optimizer.step`, and has moments.
    """
    marked = _moments_marked() if eager_step else nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded, marked:
        call()
        with record_function(CALL):
            call()
    events: list[Any] = recorded.profiler.kineto_results.events()  # pyrefly: ignore[missing-attribute]
    spans: dict[str, tuple[int, int]] = {}
    for event in events:
        if event.name() in (CALL, BACKWARD, UPDATE):  # the last of each: that of the second call
            spans[event.name()] = (event.start_ns(), event.start_ns() + event.duration_ns())
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return _follow(memory, spans)


def _follow(memory: list[tuple[int, int]], spans: dict[str, tuple[int, int]]) -> Timeline:
    start, end = spans[CALL]
    base = sum(change for when, change in memory if when < start)
    total, points = base, []
    absolute: list[tuple[int, int]] = []
    for when, change in memory:
        if start <= when <= end:
            total += change
            points.append(((when - start) / (end - start), total - base))
            absolute.append((when, total - base))

    def held(at: int) -> int:
        return next((size for when, size in reversed(absolute) if when <= at), 0)

    moments = {}
    if BACKWARD in spans and UPDATE in spans:
        began, ended = spans[UPDATE]
        moments["end of forward"] = held(spans[BACKWARD][0])
        moments["end of backward"] = held(spans[BACKWARD][1])
        during = [size for when, size in absolute if began <= when <= ended]
        moments["update"] = max([held(began), *during])
    return Timeline(points, moments)


@contextmanager
def _moments_marked() -> Iterator[None]:
    """Leave a mark in the profile at every backward and every optimizer step."""
    backward = torch.Tensor.backward
    updates: list[Any] = []

    def marked(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with record_function(BACKWARD):
            backward(self, *args, **kwargs)

    def before(*_: object) -> None:
        updates.append(record_function(UPDATE).__enter__())

    def after(*_: object) -> None:
        updates.pop().__exit__(None, None, None)

    hooks = [
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]
    try:
        with mock.patch.object(torch.Tensor, "backward", marked):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def plot_roles(bars: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Draw bytes per parameter at the peak, one stacked bar for each contender."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 * len(bars) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = list(bars)[::-1]
    left = [0.0] * len(names)
    for role in [r for r in COLOURS if any(r in roles for roles in bars.values())]:
        widths = [bars[name].get(role, 0.0) for name in names]
        axes.barh(names, widths, left=left, label=role, color=COLOURS[role])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.2f}", va="center")
    axes.set_xlabel("bytes per parameter at the peak of a step")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_timelines(lines: dict[str, tuple[float, Timeline]], parameters: int, title: str, path: Path) -> None:
    """Draw bytes per parameter over the step; ``lines`` holds what each contender keeps, and its timeline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, (kept, timeline) in lines.items():
        shares = [share for share, _ in timeline.points]
        sizes = [kept + size / parameters for _, size in timeline.points]
        axes.step(
            shares, sizes, where="post", label=f"{name}: peak {max(sizes, default=kept):.2f}", linewidth=1
        )
    axes.set_xlabel("share of the step's time")
    axes.set_ylabel("bytes per parameter")
    axes.set_title(title, loc="left")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
