"""From what a command was given to a dry run of its target."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..hallway.dry_run import DryRun, dry_run
from .output import working
from .target import load


def dry_run_of(
    target: str,
    options: dict[str, Any],
    device: str | None,
    tensors: str,
    *,
    points: Collection[str] | None = None,
    dynamic: bool | None = None,
    of: str = "graph",
    kernels: bool = False,
) -> DryRun:
    """Capture ``target`` and run the passes; see ``fxpass.hallway.dry_run.dry_run``."""
    step = load(target)
    if device is not None:
        check_device(device)
    with working(f"capturing {target}"):
        return dry_run(
            step.make,
            options,
            device=device,
            tensors=tensors,
            points=points,
            dynamic=dynamic,
            of=of,
            kernels=kernels,
        )


def check_device(device: str) -> None:
    """Raise ``UsageProblem`` for a text that names no device."""
    import torch

    from .usage import UsageProblem

    try:
        torch.device(device)
    except RuntimeError:
        raise UsageProblem(f"{device!r} is not a device", "give cpu, cuda or cuda:0") from None
