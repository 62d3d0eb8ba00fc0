"""Study 2: what does the clipping threshold do? `python -m bench.clipping [--quick]`.

Thresholds from 0.01 to none, by global norm, per parameter and adaptively, under AdamW, SGD and SGD
with too high a learning rate: final loss, how often clipping acts, the norms it meets, and how far
the rows of a rarely touched table move.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import study
from bench.study import RESULTS, Run, Trainer
from bench.tasks import BUCKETS

NAMES = ("gpt", "conv", "lstm", "sparse")
RECIPES = {"adamw": ("adamw",), "sgd": ("sgd", "hot sgd")}  # learning rates that share a compiled step
GLOBAL = (0.01, 0.03, 0.1, 0.3, 1.0)
PARAMETER = (0.01, 0.1, 1.0)
ADAPTIVE = (0.003, 0.01, 0.1)
QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
DIVERGED = 6.0  # worse than a guess in every task: the end of the plot's axis
TAIL = 20  # the final training loss is the mean of so many steps


def clips(quick: bool = False) -> dict[str, dict[str, Any]]:
    """The options of every way to clip, by name."""
    found: dict[str, dict[str, Any]] = {"none": {}}
    found |= {f"global {t:g}": {"max_norm": t} for t in GLOBAL}
    found |= {f"parameter {t:g}": {"max_norm": t, "clip_per": "parameter"} for t in PARAMETER}
    found |= {f"adaptive {t:g}": {"adaptive_clip": t} for t in ADAPTIVE}
    return {n: found[n] for n in ("none", "global 0.01", "parameter 0.01")} if quick else found


@dataclass(frozen=True)
class Job:
    """Runs that share one compiled step."""

    task: str
    optimizer: str
    name: str
    options: dict[str, Any]
    seeds: int
    steps: int


@dataclass
class Result:
    """One training run."""

    task: str
    recipe: str
    name: str
    seed: int
    steps: int
    loss: float  # of training, the last TAIL steps
    held_out: dict[str, float]  # "loss", and in the sparse task that of each bucket of tokens
    clipped: float  # share of the applied steps
    skipped: int
    gave_up: bool
    norms: dict[str, float]  # quantiles of the norm before clipping, over the applied steps
    rows: dict[str, float]  # mean update of a touched row, by bucket
    trace: list[float] = field(default_factory=list)  # the norms of a run without clipping, first seed


def jobs(seeds: int, steps: int, quick: bool) -> list[Job]:
    """All runs of the study, the slow tasks first."""
    return [
        Job(task, optimizer, name, options, seeds, steps)
        for task in ("lstm", "gpt", "conv", "sparse")
        for optimizer in RECIPES
        for name, options in clips(quick).items()
    ]


def work(job: Job) -> list[Result]:
    """Run one job (in a process of its own)."""
    task = study.task_named(job.task)
    trainer = Trainer(task, job.optimizer, job.options)
    found = []
    for recipe in RECIPES[job.optimizer]:
        for seed in range(job.seeds):
            run = trainer.run(seed, job.steps, lr=task.lr[recipe])
            found.append(_result(job, recipe, seed, run))
    return found


def _result(job: Job, recipe: str, seed: int, run: Run) -> Result:
    skipped = set(run.skipped)
    norms = torch.tensor([n for step, n in enumerate(run.norms) if step not in skipped] or [math.nan])
    traced = job.name == "none" and seed == 0
    return Result(
        task=job.task,
        recipe=recipe,
        name=job.name,
        seed=seed,
        steps=job.steps,
        loss=statistics.fmean(run.losses[-TAIL:]),
        held_out=run.held_out,
        clipped=run.clipped / max(len(run.norms) - len(skipped), 1),
        skipped=len(skipped),
        gave_up=run.gave_up,
        norms={name: norms.quantile(q).item() for name, q in QUANTILES.items()},
        rows=run.rows,
        trace=run.norms if traced else [],
    )


def select(results: Sequence[dict[str, Any]], **wanted: str) -> list[dict[str, Any]]:
    """The results whose fields are as ``wanted``."""
    return [r for r in results if all(r[key] == value for key, value in wanted.items())]


def mean(values: Sequence[float | None], digits: str = ".3f") -> str:
    """The mean over seeds, "diverged" if one of them is not finite."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "diverged"
    value = statistics.fmean(known)
    return format(value, digits if value < 100 else ".0f")


def loss_rows(results: Sequence[dict[str, Any]], task: str) -> study.Rows:
    """A row per way to clip: by recipe, the mean held-out loss and the share of clipped steps."""
    columns, recipes = ["clip"], [recipe for group in RECIPES.values() for recipe in group]
    for recipe in recipes:
        columns += [recipe, "clipped"]
    found = []
    for name in dict.fromkeys(r["name"] for r in results):
        row = [name]
        for recipe in recipes:
            runs = select(results, task=task, recipe=recipe, name=name)
            row += [
                mean([r["held_out"]["loss"] for r in runs]),
                mean([r["clipped"] for r in runs], ".0%"),
            ]
        found.append(row)
    return columns, found


def norm_rows(results: Sequence[dict[str, Any]]) -> study.Rows:
    """The quantiles of the norm in runs without clipping."""
    found = []
    for task in NAMES:
        for recipe in ("adamw", "sgd"):
            runs = select(results, task=task, recipe=recipe, name="none")
            found.append([task, recipe, *(mean([r["norms"][q] for r in runs]) for q in QUANTILES)])
    return ["task", "optimizer", *QUANTILES], found


def table_rows(results: Sequence[dict[str, Any]], recipe: str) -> study.Rows:
    """The sparse task: update of a touched row and loss, by how frequent its token is."""
    columns = ["clip", "clipped", *(f"update, {b}" for b in BUCKETS), "tail / head"]
    columns += [f"loss, {b}" for b in BUCKETS]
    found = []
    for name in dict.fromkeys(r["name"] for r in results):
        runs = select(results, task="sparse", recipe=recipe, name=name)
        ratios = [r["rows"]["tail"] / r["rows"]["head"] for r in runs]
        found.append(
            [
                name,
                mean([r["clipped"] for r in runs], ".0%"),
                *(mean([r["rows"][b] for r in runs], ".4f") for b in BUCKETS),
                mean(ratios, ".2f"),
                *(mean([r["held_out"][b] for r in runs], ".2f") for b in BUCKETS),
            ]
        )
    return columns, found


def tables(record: dict[str, Any]) -> dict[str, study.Rows]:
    """Columns and rows of the tables of docs/clipping.md, by name."""
    results = record["results"]
    found = {f"loss: {task}": loss_rows(results, task) for task in NAMES}
    found["norm before clipping"] = norm_rows(results)
    return found | {f"rows: {recipe}": table_rows(results, recipe) for recipe in ("adamw", "sgd", "hot sgd")}


def _points(runs: Sequence[dict[str, Any]], kind: str) -> list[tuple[float, float]]:
    """(threshold, mean loss over seeds) of one kind of clip, without what diverged."""
    found = []
    for name in dict.fromkeys(r["name"] for r in runs if r["name"].startswith(kind)):
        losses = [r["held_out"]["loss"] for r in runs if r["name"] == name]
        if None not in losses:
            found.append((float(name.split()[1]), statistics.fmean(losses)))
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """By task: held-out loss by threshold, and the norms that a run without clipping meets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = record["results"]
    figure, axes = plt.subplots(2, len(NAMES), figsize=(16, 7), layout="constrained")
    for column, task in enumerate(NAMES):
        upper, lower = axes[0][column], axes[1][column]
        for color, recipe in enumerate(("adamw", "sgd", "hot sgd")):
            for kind, style in (("global", "o-"), ("parameter", "s--"), ("adaptive", "^:")):
                points = _points(select(results, task=task, recipe=recipe), kind)
                label = f"{recipe}, {kind}"
                upper.plot(*zip(*points, strict=True), style, color=f"C{color}", ms=4, lw=1, label=label)
            none = [r["held_out"]["loss"] for r in select(results, task=task, recipe=recipe, name="none")]
            if None not in none:
                upper.axhline(statistics.fmean(none), color=f"C{color}", lw=0.7, alpha=0.6)
            for r in select(results, task=task, recipe=recipe, name="none"):
                if r["trace"]:
                    lower.plot(r["trace"], color=f"C{color}", lw=0.8, label=recipe)
        upper.set_xscale("log")
        upper.set_yscale("log")
        upper.set_ylim(top=min(upper.get_ylim()[1], DIVERGED))
        upper.set_title(study.task_named(task).about, fontsize=7)
        upper.set_xlabel("threshold")
        lower.set_yscale("log")
        lower.set_xlabel("step")
    axes[0][0].set_ylabel("held-out loss (line: without clipping)")
    axes[1][0].set_ylabel("global norm without clipping")
    axes[0][-1].legend(fontsize=6)
    axes[1][-1].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run the study the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.clipping", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, three ways to clip")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--out", type=Path, help="folder for JSON and plot (default docs/results)")
    given = parser.parse_args()
    seeds, steps = (1, 25) if given.quick else (2, 300)
    folder = given.out or (Path("out") if given.quick else RESULTS)
    results = study.run_all(
        jobs(seeds, steps, given.quick), work, given.workers, lambda j: f"{j.task}: {j.optimizer}, {j.name}"
    )
    settings = {"seeds": seeds, "steps": steps, "dtype": "float16", "codegen": "eager"}
    study.save(folder / "clipping.json", settings, [asdict(r) for r in results])
    record = json.loads((folder / "clipping.json").read_text())
    plot(record, folder / "clipping.png")
    study.show(tables(record))
    if folder == RESULTS:
        study.fill(RESULTS.parent / "clipping.md", tables(record))


if __name__ == "__main__":
    main()
