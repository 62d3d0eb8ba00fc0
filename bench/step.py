"""Compare one training step of all contenders: `python -m bench.step --params 12M --tokens 64`.

Bytes per parameter at the peak, milliseconds per step, seconds until the first step is done,
and the losses from the same initial weights on the same batches.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import measure, models
from bench.peers import BASELINE, PEERS, Contender, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

BATCHES = 4  # few, and used again and again: random tokens can only be learnt by heart
WARM_UP = 2  # steps after the first one


@dataclass
class Result:
    """What was measured of one contender."""

    name: str
    parameters: int
    compiled: bool
    first_call_s: float
    first_call_ratio: float | None = None  # of compile baseline
    persistent_bytes: int = 0
    peak: measure.Peak | None = None
    step_s: list[float] = field(default_factory=list)
    step_ratio: float | None = None  # of the baseline's median
    losses: list[float] = field(default_factory=list)
    scale: float = 1.0  # the loss scale after the last of those losses

    @property
    def persistent(self) -> float:
        """Bytes per parameter that live between steps."""
        return self.persistent_bytes / self.parameters

    @property
    def transient(self) -> float:
        """Bytes per parameter that a step adds at its peak."""
        return self.peak.bytes / self.parameters if self.peak else 0.0

    def as_json(self) -> dict[str, object]:
        """Return all numbers, derived ones included."""
        return {
            **asdict(self),
            "persistent_per_parameter": self.persistent,
            "transient_per_parameter": self.transient,
            "total_per_parameter": self.persistent + self.transient,
            "median_ms": measure.median_ms(self.step_s),
        }


class Runner:
    """Feeds one contender the batches in order and keeps its losses, on the device."""

    def __init__(self, contender: Contender, batches: list[models.Batch]) -> None:
        self.contender = contender
        self.batches = batches
        self.losses: list[Tensor] = []

    def __call__(self, _turn: int = 0) -> None:
        x, y = self.batches[len(self.losses) % len(self.batches)]
        self.losses.append(self.contender.step(x, y))


def compare(
    names: list[str],
    model: nn.Module,
    batches: list[models.Batch],
    recipe: Recipe,
    *,
    rounds: int,
    done: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Measure the named contenders in one process; `done` hears of every finished step."""
    device = recipe.device
    parameters = models.parameter_count(model)
    runners: dict[str, Runner] = {}
    results: dict[str, Result] = {}
    with measure.no_compile_caches():
        measure.warm_compiler(device)
        for name in names:
            runner = Runner(PEERS[name](copy.deepcopy(model), recipe), batches)
            first = measure.timed(runner, device)
            done(name)
            for _ in range(WARM_UP):
                runner()
                done(name)
            runners[name] = runner
            results[name] = Result(name, parameters, runner.contender.compiled, first)
        times = measure.interleaved(runners, rounds, device, lambda: done("timing"))
        for name, runner in runners.items():
            result = results[name]
            result.step_s = times[name]
            result.losses = [float(loss) for loss in runner.losses]
            result.scale = runner.contender.scale()
            result.persistent_bytes = measure.storage_bytes(runner.contender.persistent())
            result.peak = measure.peak_of_call(runner, device)
            done(f"memory of {name}")
    _set_ratios(results)
    return list(results.values())


def _set_ratios(results: dict[str, Result]) -> None:
    baseline = results.get(BASELINE)
    if baseline is None:
        return
    for result in results.values():
        result.step_ratio = measure.median_ms(result.step_s) / measure.median_ms(baseline.step_s)
        if result.compiled:
            result.first_call_ratio = result.first_call_s / baseline.first_call_s


def table(results: list[Result], title: str) -> Table:
    """Lay the results out, one contender a row."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.caption = f"B/p: bytes per parameter. Ratios are to {BASELINE}. First call: compile and one step."
    shown.add_column("contender")
    headings = "kept B/p|+ step B/p|= peak B/p|at|ms/step|ratio|first s|ratio|scale|loss"
    for heading in headings.split("|"):
        shown.add_column(heading, justify="right")
    for r in results:
        at = r.peak.at if r.peak else None
        shown.add_row(
            r.name,
            f"{r.persistent:.2f}",
            f"{r.transient:.2f}",
            f"{r.persistent + r.transient:.2f}",
            "-" if at is None else f"{at:.0%}",
            f"{measure.median_ms(r.step_s):.1f}",
            _ratio(r.step_ratio),
            f"{r.first_call_s:.1f}",
            _ratio(r.first_call_ratio),
            f"{r.scale:g}",
            f"{r.losses[0]:.4f} > {r.losses[-1]:.4f}",
        )
    return shown


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--params", choices=models.GPT_SIZES, help="size of the GPT (default 12M)")
    parser.add_argument("--untied", action="store_true", help="give the head weights of its own")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per step, over all rows (default 64)")
    parser.add_argument("--rounds", type=int, help="timed steps of each contender (default 10)")
    parser.add_argument("--quick", action="store_true", help="5M and 3 rounds, unless told otherwise")
    parser.add_argument("--only", nargs="+", choices=PEERS, metavar="NAME", help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    given = parser.parse_args()
    given.params = given.params or ("5M" if given.quick else "12M")
    given.rounds = given.rounds or (3 if given.quick else 10)
    return given


def main() -> None:
    """Run the comparison the command line asks for."""
    given = arguments()
    device = torch.device(given.device)
    recipe = Recipe(device=device, dtype=getattr(torch, given.dtype))
    model = models.gpt(given.params, tied=not given.untied).to(device)
    batches = [(x.to(device), y.to(device)) for x, y in models.token_batches(BATCHES, given.tokens)]
    names: list[str] = given.only or list(PEERS)
    where = measure.machine(device)
    console = Console(width=None if Console().is_terminal else 130)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(names) * (2 + WARM_UP + given.rounds))
        results = compare(
            names,
            model,
            batches,
            recipe,
            rounds=given.rounds,
            done=lambda name: progress.update(bar, advance=1, description=name),
        )
    rows, length = batches[0][0].shape
    title = (
        f"GPT of {models.parameter_count(model) / 1e6:.2f}M parameters, {rows}x{length} tokens, "
        f"{given.dtype}, {given.rounds} rounds\n"
        + ", ".join(f"{key} {value}" for key, value in where.items())
    )
    console.print(table(results, title))
    if given.json:
        settings = {
            "params": given.params,
            "tokens": rows * length,
            "rounds": given.rounds,
            "dtype": given.dtype,
        }
        record = {"machine": where, "settings": settings, "results": [r.as_json() for r in results]}
        given.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
