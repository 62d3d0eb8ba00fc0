"""What the examples share: the log of a run, a step's peak memory, the progress bar, the table."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """A training step and the losses and times of its calls."""

    name: str
    step: Step
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        loss = self.step(x, y).item()  # reading the loss also waits for the device
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)

    def final_loss(self) -> float:
        return statistics.fmean(self.losses[-20:])

    def median_ms(self) -> float:
        return 1000 * statistics.median(self.seconds)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that `call` holds at any moment, beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes its own stages to stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyrefly: ignore[missing-attribute] # missing in torch's stub
        peak = max(peak, held)
    return peak


def progress() -> Progress:
    """Return a progress bar that ends in the task's `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    console = Console()
    console.print(title)  # as a title of the table it would be wrapped to the table's width
    table = Table("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
