"""Study 1: how should the loss scale tune itself? `python -m bench.stability [--quick]`.

Static scales, dynamic ones and the presets of other libraries, on three tasks, in FP16 beside
FP32 and BF16: skipped steps, the first step that is applied, underflow, final loss, the scale over time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import study
from bench.study import RESULTS, Run, Trainer
from fxpass import DynamicLossScale

NAMES = ("gpt", "conv", "lstm")
EXPONENTS = (0, 4, 8, 12, 16, 18, 20, 24)
TAIL = 20  # the final loss is the mean of so many steps, and the held-out loss after the last
BIN = 10  # losses are stored as means of so many steps


def policies() -> dict[str, dict[str, Any]]:
    """The options of every configuration that is not a static scale."""
    return {
        "fp32": {"dtype": "float32"},
        "bf16": {"dtype": "bfloat16"},
        "dynamic from 2^24": {"loss_scale": DynamicLossScale(init_scale=2.0**24)},
        "dynamic from 2^16": {"loss_scale": DynamicLossScale(init_scale=2.0**16)},
        "dynamic from 2^16, growth every 50": {"loss_scale": DynamicLossScale(growth_interval=50)},
        "like torch": {"loss_scale": DynamicLossScale.like("torch")},
        "like apex": {"loss_scale": DynamicLossScale.like("apex")},
        "like deepspeed": {"loss_scale": DynamicLossScale.like("deepspeed")},
        "headroom": {"loss_scale": "headroom"},
    }


@dataclass(frozen=True)
class Job:
    """Runs that share one compiled step: one configuration, or all static scales."""

    task: str
    name: str
    options: dict[str, Any]
    scales: tuple[float | None, ...]
    seeds: int
    steps: int


@dataclass
class Result:
    """One training run."""

    task: str
    name: str
    seed: int
    steps: int
    loss: float  # of training, the last TAIL steps
    held_out: float
    skipped: int
    first_applied: int | None  # counted from 1; None if every step was skipped
    scale: float  # after the last step
    below_normal: float | None  # mean share of gradient elements below float16's normal numbers
    zeros: float | None  # mean share of gradient elements that are zero, for whatever reason
    losses: list[float] = field(default_factory=list)  # means of BIN steps, first seed only
    scales: list[tuple[int, float]] = field(default_factory=list)  # (step, scale) at every change


def jobs(seeds: int, steps: int, exponents: Sequence[int]) -> list[Job]:
    """All runs of the study, the slow tasks first."""
    found = []
    for task in ("lstm", "gpt", "conv"):
        scales = tuple(2.0**e for e in exponents)
        found.append(Job(task, "static", {"loss_scale": 1.0}, scales, seeds, steps))
        found += [Job(task, name, options, (None,), seeds, steps) for name, options in policies().items()]
    return found


def work(job: Job) -> list[Result]:
    """Run one job (in a process of its own)."""
    trainer = Trainer(study.task_named(job.task), "adamw", job.options)
    found = []
    for scale in job.scales:
        for seed in range(job.seeds):
            run = trainer.run(seed, job.steps, scale=scale)
            name = job.name if scale is None else f"static 2^{round(math.log2(scale))}"
            found.append(_result(job, name, seed, run))
    return found


def _result(job: Job, name: str, seed: int, run: Run) -> Result:
    skipped = set(run.skipped)
    changes = [
        (step, scale) for step, scale in enumerate(run.scales) if step == 0 or scale != run.scales[step - 1]
    ]
    bins = range(0, job.steps, BIN)
    half = "dtype" not in job.options
    return Result(
        task=job.task,
        name=name,
        seed=seed,
        steps=job.steps,
        loss=statistics.fmean(run.losses[-TAIL:]),
        held_out=run.held_out["loss"],
        skipped=len(skipped),
        first_applied=next((s + 1 for s in range(job.steps) if s not in skipped), None),
        scale=run.scales[-1],
        below_normal=statistics.fmean(run.underflow) if run.underflow and half else None,
        zeros=statistics.fmean(run.zeros) if run.zeros and half else None,
        losses=[statistics.fmean(run.losses[b : b + BIN]) for b in bins] if seed == 0 else [],
        scales=changes if seed == 0 else [],
    )


COLUMNS = (
    "loss scale",
    "first applied step",
    "skipped",
    "below normal",
    "zero",
    "held-out loss",
    "+-",
    "last scale",
)


def rows(results: Sequence[dict[str, Any]], task: str) -> list[list[str]]:
    """One row per configuration: worst first step, means of the others, half the range of the loss."""
    found = []
    for name in dict.fromkeys(r["name"] for r in results if r["task"] == task):
        runs = [r for r in results if r["task"] == task and r["name"] == name]
        firsts = [r["first_applied"] for r in runs]
        losses = [r["held_out"] for r in runs]
        found.append(
            [
                name,
                "never" if None in firsts else str(max(firsts)),
                f"{statistics.fmean(r['skipped'] / r['steps'] for r in runs):.1%}",
                _share(runs, "below_normal"),
                _share(runs, "zeros"),
                f"{statistics.fmean(losses):.3f}",
                f"{(max(losses) - min(losses)) / 2:.3f}",
                "-" if name in ("fp32", "bf16") else f"2^{math.log2(runs[0]['scale']):.3g}",
            ]
        )
    return found


def _share(runs: Sequence[dict[str, Any]], key: str) -> str:
    known = [r[key] for r in runs if r[key] is not None]
    return f"{statistics.fmean(known):.1%}" if known else "-"


def tables(record: dict[str, Any]) -> dict[str, study.Rows]:
    """Columns and rows of the tables of docs/loss-scaling.md, by task."""
    return {task: (COLUMNS, rows(record["results"], task)) for task in NAMES}


def plot(record: dict[str, Any], path: Path) -> None:
    """Held-out loss and underflow by static scale, and the scale of each policy over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(NAMES), figsize=(13, 9), layout="constrained", sharey="row")
    for column, task in enumerate(NAMES):
        results = [r for r in record["results"] if r["task"] == task]
        static = [r for r in results if r["name"].startswith("static")]
        _by_scale(axes[0][column], static, lambda r: r["held_out"])
        for name, style in (("fp32", "-"), ("bf16", ":")):
            level = statistics.fmean(r["held_out"] for r in results if r["name"] == name)
            axes[0][column].axhline(level, color="black", lw=1, ls=style, label=name)
        _by_scale(axes[1][column], static, lambda r: r["below_normal"])
        moving = [r for r in results if r["seed"] == 0 and r["scale"] and r not in static]
        for r in moving:
            if r["name"] not in ("fp32", "bf16"):
                steps, scales = zip(*r["scales"], (r["steps"], r["scale"]), strict=True)
                axes[2][column].step(steps, scales, where="post", label=r["name"], alpha=0.7)
        axes[0][column].set_title(study.task_named(task).about, fontsize=8)
        axes[1][column].set_xlabel("static loss scale (log2)")
        axes[2][column].set_xlabel("step")
        axes[2][column].set_yscale("log", base=2)
    for row, label in enumerate(
        ("held-out loss", "share of gradient elements\nbelow normal numbers", "loss scale")
    ):
        axes[row][0].set_ylabel(label)
    axes[0][0].legend(fontsize=8)
    axes[2][0].legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _by_scale(axis: Any, static: list[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> None:
    known = [(float(r["name"].rpartition("^")[2]), value(r)) for r in static if value(r) is not None]
    axis.plot([x for x, _ in known], [y for _, y in known], "o", ms=4, alpha=0.6, label="static, each seed")


def _others(path: Path, name: str) -> list[dict[str, Any]]:
    results = json.loads(path.read_text())["results"]
    return [r for r in results if r["name"] != name and not (name == "static" and "static" in r["name"])]


def _place(result: dict[str, Any]) -> tuple[int, int]:
    """Where a result belongs in the tables: by task, static scales first."""
    name = "static" if result["name"].startswith("static") else result["name"]
    return NAMES.index(result["task"]), ["static", *policies()].index(name)


def main() -> None:
    """Run the study the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.stability", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, three static scales")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--out", type=Path, help="folder for JSON and plot (default docs/results)")
    parser.add_argument("--only", help="run this configuration alone and replace it in the JSON there is")
    given = parser.parse_args()
    seeds, steps, exponents = (1, 40, (0, 16, 24)) if given.quick else (3, 200, EXPONENTS)
    folder = given.out or (Path("out") if given.quick else RESULTS)
    chosen = [j for j in jobs(seeds, steps, exponents) if given.only in (None, j.name)]
    new = study.run_all(chosen, work, given.workers, lambda j: f"{j.task}: {j.name}")
    kept = _others(folder / "stability.json", given.only) if given.only else []
    results = sorted([*kept, *(asdict(r) for r in new)], key=_place)
    settings = {"seeds": seeds, "steps": steps, "optimizer": "adamw", "codegen": "eager"}
    study.save(folder / "stability.json", settings, results)
    record = json.loads((folder / "stability.json").read_text())
    plot(record, folder / "stability.png")
    study.show(tables(record))
    if folder == RESULTS:
        study.fill(RESULTS.parent / "loss-scaling.md", tables(record))


if __name__ == "__main__":
    main()
