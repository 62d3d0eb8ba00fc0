"""Step graphs for unit tests: captured from real code, stopped where a test wants to look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import Node

import fxpass.hallway.frame
from fxpass import MixedPrecision
from fxpass.ir.graph import StepGraph
from fxpass.ir.provenance import origin
from fxpass.passes.graph_pass import GraphPass
from fxpass.passes.pipeline import PassRecord, run_pipeline


class _Stop(Exception):
    """Ends the compilation once the graph is in hand."""


def graph_of(
    step: Callable[..., Any], args: Sequence[Any], passes: Sequence[GraphPass] = (), **options: Any
) -> tuple[StepGraph, list[PassRecord]]:
    """The graph of ``step`` after ``passes`` (verified after each), and the passes' records."""
    found: list[Any] = []

    def grab(graph: StepGraph, *_: Any, **__: Any) -> list[PassRecord]:
        found.extend((graph, run_pipeline(graph, passes)))
        raise _Stop

    torch.compiler.reset()
    with mock.patch.object(fxpass.hallway.frame, "run_pipeline", grab):
        try:
            torch.compile(step, backend=MixedPrecision(**options))(*args)
        except Exception as error:
            if not found:
                raise error
    return found[0], found[1]


def training_step(
    model: nn.Module | None = None, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **settings: Any
) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]:
    """A step of a two-layer model (or ``model``, from 4 to 2 features) and arguments for it."""
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    opt = optimizer(model.parameters(), **{"lr": 0.1, **settings})  # pyrefly: ignore[bad-argument-type]

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    return step, (torch.randn(6, 4), torch.randn(6, 2))


def inserted_by(step: StepGraph, name: str) -> list[Node]:
    """The nodes a pass inserted."""
    return [n for n in step.graph.nodes if (made := origin(n)) is not None and made.pass_name == name]


def targets(nodes: Sequence[Node]) -> list[str]:
    """Operator names, for assertions that read well."""
    return [str(n.target) for n in nodes]
