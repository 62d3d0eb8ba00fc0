"""Train a small GPT on the source of Python's standard library, beside eager torch.amp.

Both sides start from the same weights and see the same batches. `mixedprec_step`
is all that a user of fxpass writes; `amp_step` is what it replaces.
"""

from __future__ import annotations

import argparse
import copy
import string
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxpass
from _show import Run, Step, peak_bytes, print_table, progress
from models import GPT

CONTEXT = 128
MAX_NORM = 1.0
LEARNING_RATE = 1e-3
VOCABULARY = string.printable[:97]  # without carriage return, vertical tab and form feed
PLOT = Path("out/gpt_stdlib.png")


def mixedprec_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    # torch's own stub allows no float among the options
    options: dict[str, Any] = {"max_norm": MAX_NORM}
    return torch.compile(train_step, backend="mixedprec", options=options)


def amp_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Step:
    def train_step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            loss = model(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return train_step


def stdlib_text(limit: int = 4_000_000) -> str:
    """Return the start of the standard library's modules, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    return "".join(f.read_text(encoding="utf-8", errors="ignore") for f in files)[:limit]


def batches(text: str, size: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random windows of the text and the same windows one character later, for ever."""
    number = {character: i for i, character in enumerate(VOCABULARY)}
    data = torch.tensor([number[c] for c in text if c in number], device=device)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(CONTEXT + 1, device=device)
    while True:
        starts = torch.randint(len(data) - CONTEXT, (size, 1), generator=generator)
        rows = data[starts.to(device) + window]
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # a file is all we want, on machines without a screen too
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1], layout="constrained"
    )
    for run, style in zip(runs, ({"lw": 5, "alpha": 0.35}, {"lw": 1.2, "color": "black"}), strict=True):
        above.plot(run.losses, label=f"{run.name}: {run.final_loss():.3f} at the end", **style)
    above.set_ylabel("loss (nats per character)")
    above.set_title("A small GPT on the standard library's source, float16")
    above.legend()
    difference = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    below.semilogy(difference, lw=1.2, color="black")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.align_ylabels()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=3, help="windows of 128 characters per step")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    amp_model = GPT(len(VOCABULARY), CONTEXT, width=168, heads=3, layers=3).to(args.device)
    our_model = copy.deepcopy(amp_model)
    parameters = sum(p.numel() for p in amp_model.parameters())
    amp_optimizer = torch.optim.AdamW(amp_model.parameters(), lr=LEARNING_RATE)
    our_optimizer = torch.optim.AdamW(our_model.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(args.device.type)

    amp = Run("torch.amp", amp_step(amp_model, amp_optimizer, scaler))
    ours = Run("mixedprec", mixedprec_step(our_model, our_optimizer))
    data = batches(stdlib_text(), args.batch, args.seed, args.device)
    amp_skipped = 0
    with progress() as bar:
        task = bar.add_task("training", total=args.steps, note="compiling the first step")
        for _ in range(args.steps):
            x, y = next(data)
            scale = scaler.get_scale()
            amp(x, y)
            amp_skipped += scaler.get_scale() < scale
            ours(x, y)
            note = f"{amp.name} {amp.losses[-1]:.3f}  {ours.name} {ours.losses[-1]:.3f}"
            bar.update(task, advance=1, note=note)

    stats = fxpass.of(ours.step).stats()
    amp_scale = scaler.get_scale()
    x, y = next(data)
    persistent = 12  # bytes per parameter: the float32 weight and Adam's two moments
    amp_peak = persistent + peak_bytes(lambda: amp.step(x, y), args.device) / parameters
    our_peak = persistent + peak_bytes(lambda: ours.step(x, y), args.device) / parameters
    print_table(
        f"GPT with {parameters:,} parameters, {x.numel()} tokens a step, {args.steps} steps",
        [amp.name, ours.name],
        [
            ["final loss (mean of 20)", f"{amp.final_loss():.4f}", f"{ours.final_loss():.4f}"],
            ["peak bytes per parameter", f"{amp_peak:.2f}", f"{our_peak:.2f}"],
            ["ms per step (median)", f"{amp.median_ms():.1f}", f"{ours.median_ms():.1f}"],
            ["skipped steps", f"{amp_skipped}", f"{stats.skipped}"],
            ["final loss scale", f"{amp_scale:g}", f"{stats.scale:g}"],
        ],
    )
    if not args.no_plot:
        plot([amp, ours], PLOT)
        print(f"loss curves: {PLOT}")


if __name__ == "__main__":
    main()
