"""What a program is, and the list of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch import Tensor

from bench.programs.kernels import let_torchvision_import

CALLS = 8
# in the order of the table; a module registers its programs when it is imported
FAMILIES = (
    "language",
    "encoders",
    "seq2seq",
    "images",
    "audio",
    "multimodal",
    "timm_models",
    "torchvision_models",
    "diffusion",
    "tuning",
    "graphs",
    "examples",
    "recurrent",
    "gans",
    "contrastive",
    "reinforcement",
    "derivatives",
    "generative",
    "habits",
    "optimizers",
    "layers",
)


@dataclass
class Training:
    """A step, and the arguments of each call of it. The step returns its losses.

    ``check`` gives the losses after the last call instead: for steps that draw random numbers, which a
    compiled step draws otherwise than an eager one.
    """

    step: Callable[..., Any]
    calls: Sequence[tuple[Any, ...]]
    check: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Program:
    """``build`` makes models, optimizers, the step and its data anew; torch is seeded before."""

    name: str
    family: str
    source: str  # a package of the index, or "own, in the shape of ..."
    build: Callable[[], Training]
    quick: bool = False  # one of those that CI runs
    lines: int = 0  # changed, beyond moving the step into a function

    def origin(self) -> str:
        """The source, with the version that is installed."""
        try:
            return f"{self.source} {metadata.version(self.source)}"
        except metadata.PackageNotFoundError:
            return self.source


PROGRAMS: dict[str, Program] = {}


def add(made: Program) -> None:
    """Enter a program into the list."""
    assert made.name not in PROGRAMS, f"two programs are called {made.name}"
    PROGRAMS[made.name] = made


def program(
    family: str, source: str, *, quick: bool = False, lines: int = 0
) -> Callable[[Callable[[], Training]], Callable[[], Training]]:
    """Enter the decorated function's program, under the function's name."""

    def enter(build: Callable[[], Training]) -> Callable[[], Training]:
        add(Program(build.__name__, family, source, build, quick, lines))
        return build

    return enter


def programs() -> list[Program]:
    """All programs, family by family."""
    let_torchvision_import()
    for module in FAMILIES:
        importlib.import_module(f"bench.programs.{module}")
    return list(PROGRAMS.values())


def losses(result: Any) -> list[float]:
    """The numbers in what a step returned."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [number for part in result for number in losses(part)]
    return [float(result.detach() if isinstance(result, Tensor) else result)]
