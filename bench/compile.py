"""What compiling costs: `python -m bench.compile --layers 4 12 24`.

CPU seconds (user and system, compilers included) of the first two steps of a GPT, in a process of its
own: with empty caches (cold), then again in a second process (warm). Beside it what people
do today, torch.compile(model) with autocast, GradScaler and fused AdamW. Imports and the
first compilation of a process are charged to nobody, and one compiler runs at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import measure, models
from bench.peers import MODES, PEERS, Recipe, ours

BASELINE = "compiled-amp"
OURS = "fxpass"
VARIANTS: dict[str, dict[str, Any]] = {**MODES, "fxpass bfloat16": {"dtype": "bfloat16"}}


@dataclass
class Cost:
    """What two steps have cost in one process."""

    name: str
    layers: int
    width: int
    tokens: int
    cold: float = 0.0  # CPU seconds
    warm: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)  # of the cold start, where fxpass says so
    warm_stages: dict[str, float] = field(default_factory=dict)
    cache: str = ""  # what the second process found
    losses: list[float] = field(default_factory=list)


def child(name: str, layers: int, width: int, tokens: int) -> None:
    """Measure one contender in this process and print the numbers."""
    torch.set_num_threads(1)
    measure.warm_compiler(torch.device("cpu"))
    torch.manual_seed(0)
    model = models.GPT(models.GPTConfig(width=width, layers=layers, heads=max(1, width // 64)))
    batch = models.token_batches(1, tokens)[0]
    factory = PEERS.get(name)
    contender = factory(model, Recipe()) if factory else ours(model, Recipe(), **VARIANTS[name])
    began = measure.cpu_seconds()
    losses = [float(contender.step(*batch)) for _ in range(2)]
    found: dict[str, Any] = {
        "cpu": measure.cpu_seconds() - began,
        "losses": losses,
        "stages": {},
        "cache": "",
    }
    if name != BASELINE:
        import fxpass  # not before: torch.compile finds the backend without it

        record = fxpass.of(contender.step).graphs[0]
        found |= {"stages": record.seconds, "cache": record.cache}
    print(json.dumps(found))


def cost(name: str, layers: int, width: int, tokens: int) -> Cost:
    """Run a contender in two processes with caches of their own."""
    result = Cost(name, layers, width, tokens)
    with tempfile.TemporaryDirectory(prefix="fxpass-bench-", ignore_cleanup_errors=True) as caches:
        settings = {
            "TORCHINDUCTOR_CACHE_DIR": caches,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "bench.compile",
            "--child",
            name,
            str(layers),
            str(width),
            str(tokens),
        ]
        runs = []
        for _ in range(2):
            done = subprocess.run(
                command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = runs
    result.cold, result.warm, result.losses = cold["cpu"], warm["cpu"], cold["losses"]
    result.stages, result.warm_stages, result.cache = cold["stages"], warm["stages"], warm["cache"]
    return result


def table(costs: list[Cost], title: str) -> Table:
    """Lay the costs out, one contender and depth a row."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.caption = f"CPU seconds of two steps. Ratios are to {BASELINE}."
    shown.add_column("contender")
    for heading in ("layers", "width", "cold", "ratio", "warm", "ratio", "cache"):
        shown.add_column(heading, justify="right")
    base = {(c.layers, c.width): c for c in costs if c.name == BASELINE}
    for c in costs:
        peer = base.get((c.layers, c.width))
        ratios = [f"{c.cold / peer.cold:.2f}x", f"{c.warm / peer.warm:.2f}x"] if peer else ["-", "-"]
        shown.add_row(
            c.name,
            str(c.layers),
            str(c.width),
            f"{c.cold:.1f}",
            ratios[0],
            f"{c.warm:.1f}",
            ratios[1],
            c.cache,
        )
    return shown


def stages(costs: list[Cost]) -> Table:
    """Lay out where the time of fxpass goes, a stage a row."""
    with_stages = [c for c in costs if c.stages]
    shown = Table(title="where it goes: CPU seconds (share of the cold start)", title_justify="left")
    shown.add_column("stage")
    for c in with_stages:
        shown.add_column(f"{c.name} {c.layers}x{c.width}", justify="right")
    for name in dict.fromkeys(stage for c in with_stages for stage in (*c.stages, *c.warm_stages)):
        cells = []
        for c in with_stages:
            cold, total = c.stages.get(name, 0.0), sum(c.stages.values())
            cells.append(f"{cold:.1f} ({cold / total:.0%}), warm {c.warm_stages.get(name, 0.0):.1f}")
        shown.add_row(name, *cells)
    return shown


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12], help="depths (default 4 12)")
    parser.add_argument("--width", type=int, nargs="+", default=[128], help="widths (default 128)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per step (default 512)")
    names = [BASELINE, *VARIANTS]
    parser.add_argument("--only", nargs="+", choices=names, default=[BASELINE, OURS], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for."""
    given = arguments()
    if given.child:
        child(given.child[0], *map(int, given.child[1:]))
        return
    console = Console(width=None if Console().is_terminal else 130)
    costs: list[Cost] = []
    where = measure.machine(torch.device("cpu"))
    for layers in given.layers:
        for width in given.width:
            for name in given.only:
                with console.status(f"{name}, {layers} layers of width {width}"):
                    costs.append(cost(name, layers, width, given.tokens))
                if given.json:  # now: the next takes minutes
                    record = {"machine": where, "tokens": given.tokens, "results": [*map(asdict, costs)]}
                    given.json.write_text(json.dumps(record, indent=2) + "\n")
    title = f"GPT, {given.tokens} tokens, max_norm 1.0\n" + ", ".join(f"{k} {v}" for k, v in where.items())
    console.print(table(costs, title))
    console.print(stages(costs))


if __name__ == "__main__":
    main()
