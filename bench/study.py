"""Runs of a study: one compiled step trained again and again, in a pool of processes with a progress bar."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fxpass
from bench import measure
from bench.tasks import BUCKETS, TASKS, Task

RESULTS = Path(__file__).parent.parent / "docs" / "results"
Rows = tuple[Sequence[str], Sequence[Sequence[str]]]  # the columns and rows of a table
J = TypeVar("J")
R = TypeVar("R")


@dataclass
class Run:
    """What a training run left: per step, and at its end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the unscaled gradients, before clipping
    scales: list[float] = field(default_factory=list)  # the loss scale that each step was computed with
    skipped: list[int] = field(default_factory=list)  # steps
    underflow: list[float] = field(default_factory=list)  # share of elements below float16's normal numbers
    zeros: list[float] = field(default_factory=list)  # share of elements that are zero
    clipped: int = 0  # steps
    gave_up: bool = False  # the scale was stuck at its minimum: LossScaleError
    held_out: dict[str, float] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)  # mean update of a touched row, by bucket


class Trainer:
    """One compiled step of a task; every run starts from the weights of its seed.

    What differs between runs of one trainer, the scale at the start and the
    learning rate, is an input of the compiled graph, so nothing compiles anew.
    """

    def __init__(self, task: Task, optimizer: str, options: dict[str, Any]) -> None:
        torch.compiler.reset()
        self.task = task
        self.model = task.build(0)
        lr = task.lr[optimizer]
        self.optimizer = (
            torch.optim.AdamW(self.model.parameters(), lr=lr)
            if optimizer == "adamw"
            else torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        )
        self.backend = fxpass.MixedPrecision(codegen="eager", **options)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = self.model(x, y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss

        self.step = torch.compile(step, backend=self.backend)

    def run(self, seed: int, steps: int, *, scale: float | None = None, lr: float | None = None) -> Run:
        """Train for ``steps`` batches of ``seed``, from its weights and an empty optimizer state."""
        self._restart(seed, scale, lr)
        run = Run()
        seen = self.backend.stats()
        table = None if self.task.table is None else self.model.get_parameter(self.task.table)
        rows = _Rows(table)
        for x, y in self.task.batches(steps, seed):
            run.scales.append(float(self.backend.scale))
            rows.before()
            try:
                run.losses.append(float(self.step(x, y)))
            except fxpass.LossScaleError:
                run.gave_up = True
                break
            rows.after(x)
            stats = self.backend.stats()
            run.norms.append(stats.grad_norm)
            if stats.skipped > seen.skipped:
                run.skipped.append(len(run.losses) - 1)
            else:
                run.underflow.append(stats.underflow)
                run.zeros.append(stats.zeros)
            seen = stats
        run.clipped = seen.clipped
        run.held_out = self.task.evaluate(self.model)
        run.rows = rows.by_bucket()
        return run

    @torch.no_grad()
    def _restart(self, seed: int, scale: float | None, lr: float | None) -> None:
        self.model.load_state_dict(self.task.build(seed).state_dict())
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        policy = self.backend.policy
        start = scale or (1.0 if policy is None else policy.init)
        fresh = fxpass.MixedPrecision(loss_scale=policy).state_dict()
        self.backend.load_state_dict({**fresh, "scale": start})
        self.backend.scale.fill_(start)  # a state dict does not move a static scale


class _Rows:
    """How far a touched row of the table moves in a step, by how frequent the row is."""

    def __init__(self, table: nn.Parameter | None) -> None:
        self.table = table
        self.old = torch.zeros(())
        self.sums = dict.fromkeys(BUCKETS, 0.0)
        self.counts = dict.fromkeys(BUCKETS, 0)

    def before(self) -> None:
        if self.table is not None:
            self.old = self.table.detach().clone()

    def after(self, ids: Tensor) -> None:
        if self.table is None:
            return
        touched = ids.unique()
        moved = (self.table.detach() - self.old)[touched].norm(dim=1)
        for name, (low, high) in BUCKETS.items():
            inside = moved[(touched >= low) & (touched < high)]
            self.sums[name] += float(inside.sum())
            self.counts[name] += len(inside)

    def by_bucket(self) -> dict[str, float]:
        if self.table is None:
            return {}
        return {name: self.sums[name] / max(count, 1) for name, count in self.counts.items()}


def run_all(
    jobs: Sequence[J], work: Callable[[J], list[R]], workers: int, describe: Callable[[J], str]
) -> list[R]:
    """``work`` on each of ``jobs`` in ``workers`` processes of one thread; the results in their order."""
    found: dict[int, list[R]] = {}
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console()) as progress,
        ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_thread) as pool,
    ):
        bar = progress.add_task("compiling", total=len(jobs))
        futures = {pool.submit(work, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                number = futures[future]
                found[number] = future.result()
                progress.update(bar, advance=1, description=describe(jobs[number]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for number in range(len(jobs)) for result in found[number]]


def _one_thread() -> None:
    warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")  # on every first look at a GPU
    logging.getLogger("fxpass").setLevel(logging.ERROR)  # a study overflows on purpose
    torch.set_num_threads(1)


def task_named(name: str) -> Task:
    """One of :data:`bench.tasks.TASKS`."""
    return TASKS[name]


def console() -> Console:
    """Wide enough for the tables where the output is no terminal."""
    return Console(width=None if Console().is_terminal else 150)


def save(
    path: Path,
    settings: dict[str, Any],
    results: Sequence[dict[str, Any]],
    device: torch.device | None = None,
) -> None:
    """Write machine, settings and results as JSON, floats to six digits, None for inf and nan."""
    where = measure.machine(device or torch.device("cpu"))
    record = {"machine": where, "settings": settings, "results": list(results)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no inf and no nan
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def show(tables: dict[str, Rows]) -> None:
    """Print tables, each under its name."""
    for name, (columns, rows) in tables.items():
        shown = Table(*columns, title=name, title_justify="left")
        for row in rows:
            shown.add_row(*row)
        console().print(shown)


def fill(page: Path, tables: dict[str, Rows]) -> None:
    """Put each table behind its line ``<!-- table: NAME -->`` in ``page``, in place of the one there."""
    table = re.compile(r"<!-- table: (.+?) -->\n(?:\|.*\n)*")
    text = page.read_text()
    page.write_text(table.sub(lambda m: f"<!-- table: {m[1]} -->\n{markdown(tables[m[1]])}\n", text))


def markdown(table: Rows) -> str:
    """A table in Markdown, its first column left-aligned."""
    columns, rows = table
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
