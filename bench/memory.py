"""Compare the memory of one training step: `python -m bench.memory [--quick]`.

Bytes per parameter of every mode of fxpass and of its peers, from the same weights on the same
batches in one process: what persists, the peak, and the moments on the way. Peers pass their
moments in the open; those of fxpass, one compiled call, are read off its memory profile.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import measure, models
from bench.peers import MODES, PEERS, Contender, Recipe, ours
from bench.step import Runner
from bench.timeline import Timeline, plot_roles, plot_timelines, timeline_of_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

BASELINE = "compiled-amp"
BATCHES, STEPS = 4, 3
ENOUGH = 30.0  # seconds of timed steps
MOMENTS = ("end of forward", "end of backward", "update")


@dataclass
class Result:
    """What was measured of one contender on one model; bytes."""

    name: str
    model: str
    tokens: int
    parameters: int
    persistent: dict[str, int]  # by role
    peak: int = 0  # beyond the persistent ones
    moments: dict[str, int] = field(default_factory=dict)  # beyond the persistent ones
    roles: dict[str, int] = field(default_factory=dict)  # what is alive at the peak
    predicted: int = 0  # the profile's peak; 0 for peers
    step_ms: float = 0.0
    first_call_s: float = 0.0

    @property
    def kept(self) -> float:
        """Bytes per parameter between steps."""
        return sum(self.persistent.values()) / self.parameters

    @property
    def total(self) -> float:
        """Bytes per parameter at the peak."""
        return self.kept + self.peak / self.parameters

    def at(self, moment: str) -> float | None:
        """Bytes per parameter at a moment, None where it is not known."""
        return self.kept + self.moments[moment] / self.parameters if moment in self.moments else None


def contenders(names: list[str]) -> dict[str, Callable[[nn.Module, Recipe], Contender]]:
    """The peers and the modes of fxpass, by name."""
    known = {
        **{n: f for n, f in PEERS.items() if n != "fxpass"},
        **{n: partial(ours, **o) for n, o in MODES.items()},
    }
    return {name: known[name] for name in names}


def measured(
    name: str, make: Callable[[nn.Module, Recipe], Contender], size: str, tokens: int, device: torch.device
) -> tuple[Result, Timeline]:
    """Train one contender for a few steps and follow one of them."""
    torch.compiler.reset()
    model = models.gpt(size).to(device)
    batches = [(x.to(device), y.to(device)) for x, y in models.token_batches(BATCHES, tokens)]
    runner = Runner(make(copy.deepcopy(model), Recipe(device=device)), batches)
    parameters = models.parameter_count(model)
    del model
    first = measure.timed(runner, device)
    seconds = [measure.timed(runner, device)]
    while len(seconds) < STEPS and sum(seconds) < ENOUGH:
        seconds.append(measure.timed(runner, device))
    result = Result(name, size, tokens, parameters, _persistent(runner.contender), first_call_s=first)
    result.step_ms = measure.median_ms(seconds)
    whole_step = name in MODES
    if device.type == "cuda":
        timeline = Timeline([], {})
        result.peak = measure.peak_of_call(runner, device).bytes
    else:
        timeline = timeline_of_call(runner, eager_step=not whole_step)
        result.peak, result.moments = timeline.peak, timeline.moments
    if whole_step:
        _read_profile(result, runner.contender)
    else:
        result.roles = {**result.persistent, **_peer_roles(result)}
    return result, timeline


def _persistent(contender: Contender) -> dict[str, int]:
    weights = list(contender.model.parameters())
    held = {p for group in contender.optimizer.param_groups for p in group["params"]} - set(weights)
    states = (
        v for s in contender.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    )
    found = {
        "parameter": measure.storage_bytes([*weights, *contender.model.buffers()]),
        "masters": measure.storage_bytes(held),
        "optimizer state": measure.storage_bytes(states),
    }
    return {role: size for role, size in found.items() if size}


def _peer_roles(result: Result) -> dict[str, int]:
    """At the end of backward what a step adds are its gradients; what it adds beyond is all else."""
    gradients = min(result.peak, result.moments.get("end of backward", 0))
    return {"gradients": gradients, "activations and temporaries": result.peak - gradients}


def _read_profile(result: Result, contender: Contender) -> None:
    """Moments and roles of a compiled step, from the profile of its last graph."""
    import fxpass

    profile = fxpass.of(contender.step).graphs[-1].memory
    assert profile is not None, "a training step has a profile"
    result.predicted = profile.transient
    backward = [m.index for m in profile.moments if m.phase == "backward"]
    update = profile.peak_of("update")
    if backward and update:
        totals = (profile.totals[backward[0] - 1], profile.totals[backward[-1]], update.bytes)
        result.moments = {m: t - profile.persistent for m, t in zip(MOMENTS, totals, strict=True)}
    roles: dict[str, int] = {}
    for tensor in profile.peak.live:
        role = _ROLES.get(tensor.role, tensor.role)
        roles[role] = roles.get(role, 0) + tensor.bytes
    result.roles = {role: size for role, size in roles.items() if role != "input"}


_ROLES = {
    "fp16 gradient": "gradients",
    "bf16 gradient": "gradients",
    "fp32 gradient": "gradients",
    "saved activation": "activations",
    "cast weight": "cast weights",
    "temporary": "temporaries",
    "output": "temporaries",
}


def table(results: list[Result]) -> Table:
    """Lay the results of one model out, one contender a row."""
    first, base = results[0], next((r for r in results if r.name == BASELINE), None)
    title = (
        f"GPT {first.model}, {first.parameters / 1e6:.1f}M parameters, {first.tokens} tokens a step, AdamW"
    )
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.caption = (
        "Bytes per parameter; kept: between steps. Moments of fxpass are its profile's, peaks are measured. "
        f"activations: the peak beyond 12 bytes, as a share of {BASELINE}'s."
    )
    shown.add_column("contender")
    for heading in ("kept", *MOMENTS, "peak", "predicted", "activations", "ms/step", "first s"):
        shown.add_column(heading, justify="right")
    for r in results:
        moments = (r.at(m) for m in MOMENTS)
        predicted = r.kept + r.predicted / r.parameters if r.predicted else None
        beyond = (r.total - 12) / (base.total - 12) if base and base.total > 12 else None
        numbers = [*moments, r.total, predicted]
        shown.add_row(
            r.name,
            f"{r.kept:.2f}",
            *("-" if n is None else f"{n:.2f}" for n in numbers),
            "-" if beyond is None else f"{beyond:.2f}x",
            f"{r.step_ms:.0f}",
            f"{r.first_call_s:.0f}",
        )
    return shown


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--params", nargs="+", choices=models.GPT_SIZES, help="sizes (default 5M 21M 105M)")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per step (default 64 and 4096)")
    known = [*(n for n in PEERS if n != "fxpass"), *MODES]
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"of: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="1M parameters, 64 tokens, five contenders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", default=Path("out"), help="PNG files (default out)"
    )
    given = parser.parse_args()
    given.params = given.params or (["1M"] if given.quick else ["5M", "21M", "105M"])
    given.tokens = given.tokens or ([64] if given.quick else [64, 4096])
    quick = ["eager-amp", "o2-keep", "o2-drop", "fxpass", "fxpass tensor"]
    given.only = given.only or (quick if given.quick else known)
    return given


def main() -> None:
    """Measure what the command line asks for, print tables, write plots and JSON."""
    given = arguments()
    device = torch.device(given.device)
    console = Console(width=None if Console().is_terminal else 140)
    cases = [(size, tokens) for size in given.params for tokens in given.tokens]
    everything: list[Result] = []
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = time.perf_counter()
    with measure.no_compile_caches(), Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(cases) * len(given.only))
        measure.warm_compiler(device)
        for size, tokens in cases:
            results, timelines = [], {}
            for name, make in contenders(given.only).items():
                progress.update(bar, description=f"{size}, {tokens} tokens: {name}")
                result, timeline = measured(name, make, size, tokens, device)
                results.append(result)
                timelines[name] = (result.kept, timeline)
                progress.advance(bar)
            console.print(table(results))
            _plot(results, timelines, given.plots)
            everything += results
    console.print(f"plots in {given.plots}/; {time.perf_counter() - began:.0f} s")
    if given.json:
        numbers = [
            {**asdict(r), "kept_per_parameter": r.kept, "peak_per_parameter": r.total} for r in everything
        ]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"machine": measure.machine(device), "results": numbers}, indent=1))


def _plot(results: list[Result], timelines: dict[str, tuple[float, Timeline]], folder: Path) -> None:
    first = results[0]
    name, title = f"{first.model}_{first.tokens}", f"GPT {first.model}, {first.tokens} tokens"
    bars = {r.name: {k: v / r.parameters for k, v in r.roles.items()} for r in results}
    plot_roles(bars, title, folder / f"memory_roles_{name}.png")
    lines = {n: t for n, t in timelines.items() if n in ("eager-amp", BASELINE, "fxpass") and t[1].points}
    if lines:
        plot_timelines(lines, first.parameters, title, folder / f"memory_timeline_{name}.png")


if __name__ == "__main__":
    main()
