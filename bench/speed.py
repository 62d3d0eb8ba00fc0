"""Tokens per second of one training step beside its peers: `python -m bench.speed --device cuda`.

Rows are measured one after the other, each with the device to itself: 1.3B parameters do not
fit twice. They come in the order in which they matter, and no row begins that the time left
would hardly see to its end, so that one call stays within `--minutes`; the rows that were not
reached are listed. On a CPU the numbers say little: autocast in float16 is emulated there.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import measure, models, study
from bench.peers import BASELINE, OPTIONAL, PEERS, Contender, Factory, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OURS = "fxpass"
COMPILED = (BASELINE, OURS, *OPTIONAL)  # what CUDA graphs are for
FACTORIES: dict[str, Factory] = {**PEERS, **{name: factory for name, (_, factory) in OPTIONAL.items()}}
TOKENS = {"125M": 16384, "350M": 8192, "1.3B": 4096}  # a step; of other sizes 512
WARM_UP = 4  # steps: compile, allocate, and with CUDA graphs record and replay
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """What to measure."""

    params: str
    dtype: str
    contender: str
    graphs: bool

    def __str__(self) -> str:
        return f"{self.params} {self.dtype} {self.contender}{', CUDA graphs' if self.graphs else ''}"


@dataclass
class Result:
    """What was measured of one row, or why nothing was."""

    row: Row
    parameters: int = 0
    tokens: int = 0  # a step
    first_call_s: float = 0.0
    step_s: float = 0.0  # the median
    kept_bytes: int = 0
    peak_bytes: int = 0  # what is kept included
    work: measure.DeviceWork | None = None
    error: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on in a second."""
        return self.tokens / self.step_s if self.step_s else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, derived ones included."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def rows(
    params: Sequence[str], dtypes: Sequence[str], contenders: Sequence[str], graphs: Sequence[bool]
) -> list[Row]:
    """Every combination that makes sense, ours and its baseline before the others."""
    order = sorted(contenders, key=lambda name: name not in (BASELINE, OURS))
    first = [name for name in order if name in (BASELINE, OURS)]
    rest = [name for name in order if name not in first]
    found = [
        Row(size, dtype, name, graph)
        for names in (first, rest)
        for size, dtype, graph, name in product(params, dtypes, graphs, names)
    ]
    return [row for row in found if row.contender in COMPILED or not row.graphs]


def measured(row: Row, device: torch.device, tokens: int, steps: int) -> Result:
    """Train the row's contender for some steps, alone on the device."""
    _tidy(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with device:
        model = models.gpt(row.params)
    config = models.GPT_SIZES[row.params]
    drawn = models.token_batches(2, tokens, vocab=config.vocab, context=config.context)
    batches = [(x.to(device), y.to(device)) for x, y in drawn]
    result = Result(row, models.parameter_count(model), batches[0][0].numel())
    recipe = Recipe(device=device, dtype=getattr(torch, row.dtype), graphs=row.graphs)
    contender = FACTORIES[row.contender](model, recipe)
    turns = iter(range(10**9))

    def call() -> None:
        if row.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        contender.step(*batches[next(turns) % len(batches)])

    result.first_call_s = measure.timed(call, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP - 1):
        call()
    seconds = [measure.timed(lambda: [call() for _ in range(steps)], device) for _ in range(ROUNDS)]
    result.step_s = measure.median_ms(seconds) / 1e3 / steps
    result.work = measure.device_work(call, device)
    result.kept_bytes = measure.storage_bytes(contender.persistent())
    result.peak_bytes = _peak(contender, call, device, before)
    return result


def _peak(contender: Contender, call: Callable[[], None], device: torch.device, before: int) -> int:
    """The most bytes in use in a step; a CUDA graph's are those of the step that was recorded."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return measure.storage_bytes(contender.persistent()) + measure.peak_of_call(call, device).bytes


def _tidy(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(
    wanted: Sequence[Row],
    device: torch.device,
    *,
    tokens: int | None,
    steps: int,
    minutes: float,
    begins: Callable[[Row], None] = lambda _: None,
) -> tuple[list[Result], list[Row]]:
    """Measure rows until the time is up: what was found, and the rows that were not reached."""
    began, longest = time.monotonic(), 0.0
    found: list[Result] = []
    for number, row in enumerate(wanted):
        now = time.monotonic()
        if now - began + longest > 60 * minutes:
            return found, list(wanted[number:])
        begins(row)
        try:
            found.append(measured(row, device, tokens or TOKENS.get(row.params, 512), steps))
        except Exception as error:  # one that does not fit, or cannot be trained so, must not cost the others
            reason = str(error).strip().partition("\n")[0]
            found.append(Result(row, error=f"{type(error).__name__}: {reason}"))
        longest = max(longest, time.monotonic() - now)
    return found, []


def table(results: Sequence[Result]) -> study.Rows:
    """Lay the results out, one row each; ratios are to the baseline of the same size, dtype and graphs."""
    speed = {r.row: r.tokens_per_s for r in results}
    columns = (
        *("parameters", "dtype", "contender", "CUDA graphs", "tokens/s", "ratio", "ms/step"),
        *("launches", "waits", "kept B/p", "peak B/p", "first s"),
    )
    lines = []
    for r in results:
        row = r.row
        head = [row.params, row.dtype, row.contender, "yes" if row.graphs else "no"]
        if r.error:
            lines.append([*head, r.error[:60], *[""] * (len(columns) - 5)])
            continue
        base = speed.get(Row(row.params, row.dtype, BASELINE, row.graphs)) or speed.get(
            Row(row.params, row.dtype, BASELINE, False)
        )
        work = ["-", "-"] if r.work is None else [str(r.work.launches or "-"), str(r.work.waits)]
        bytes_ = [f"{n / r.parameters:.2f}" for n in (r.kept_bytes, r.peak_bytes)]
        ratio = f"{r.tokens_per_s / base:.2f}x" if base else "-"
        speeds = [f"{r.tokens_per_s:,.0f}", ratio, f"{1e3 * r.step_s:.1f}"]
        lines.append([*head, *speeds, *work, *bytes_, f"{r.first_call_s:.1f}"])
    return list(columns), lines


def installed() -> list[str]:
    """The contenders whose packages are here."""
    there = [name for name, (module, _) in OPTIONAL.items() if importlib.util.find_spec(module)]
    return [*PEERS, *there]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    names = installed()
    default = [name for name in names if name not in ("compiled-fp32", "o2-keep")]
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--params", nargs="+", choices=models.GPT_SIZES, help="sizes (default 350M 125M 1.3B)"
    )
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), help="(default both)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument("--graphs", choices=("both", "yes", "no"), help="CUDA graphs (default both on CUDA)")
    parser.add_argument("--tokens", type=int, help=f"a step (default {TOKENS}, else 512)")
    parser.add_argument("--steps", type=int, help=f"in each of {ROUNDS} timed rounds (default 10)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all (default 9)")
    parser.add_argument("--quick", action="store_true", help="1M, float16, 64 tokens, one step a round")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    given = parser.parse_args(argv)
    given.params = given.params or (["1M"] if given.quick else ["350M", "125M", "1.3B"])
    given.dtype = given.dtype or (["float16"] if given.quick else ["float16", "bfloat16"])
    given.only = given.only or ([BASELINE, OURS] if given.quick else default)
    given.tokens = given.tokens or (64 if given.quick else None)
    given.steps = given.steps or (1 if given.quick else 10)
    on_cpu = torch.device(given.device).type == "cpu"
    given.graphs = {"both": [False, True], "yes": [True], "no": [False]}[
        given.graphs or ("no" if on_cpu or given.quick else "both")
    ]
    return given


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Measure what the command line asks for; print a table, and write JSON."""
    given = arguments(argv)
    device = torch.device(given.device)
    wanted = rows(given.params, given.dtype, given.only, given.graphs)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=study.console(), transient=True) as progress:
        bar = progress.add_task("importing", total=len(wanted))

        def begins(row: Row) -> None:
            progress.update(bar, completed=wanted.index(row), description=str(row))

        found, missed = run(
            wanted, device, tokens=given.tokens, steps=given.steps, minutes=given.minutes, begins=begins
        )
    where = measure.machine(device)
    study.show({", ".join(f"{key} {value}" for key, value in where.items()): table(found)})
    for row in missed:
        study.console().print(f"not reached in {given.minutes:g} minutes: {row}")
    for name in sorted(set(OPTIONAL) - set(installed())):
        study.console().print(f"not installed: {OPTIONAL[name][0]}")
    if given.json:
        settings = {
            **{key: value for key, value in vars(given).items() if key != "json"},
            "not_reached": [str(row) for row in missed],
        }
        study.save(given.json, settings, [r.as_json() for r in found], device)
    return found


if __name__ == "__main__":
    main()
