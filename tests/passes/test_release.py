"""Each update stands right behind its gradient where the verdict allows it."""

from __future__ import annotations

import torch
from torch import nn

from fxpass import MixedPrecision
from fxpass.ir.graph import Phase, StepGraph, phase, source
from fxpass.passes import passes_for
from tests.support.graphs import graph_of, training_step


def deep() -> nn.Module:
    layers = [nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2)]
    return nn.Sequential(*layers)


def writes_in_backward(step: StepGraph) -> list[str]:
    """Names of the parameters that are written before the last node of backward."""
    nodes = list(step.graph.nodes)
    last = max(i for i, n in enumerate(nodes) if phase(n) is Phase.BACKWARD)
    writes = [n for n in nodes[:last] if n.target is torch.ops.aten.copy_.default]
    return [step.names[source(n)] for n in writes if "weight" in step.names[source(n)]]


def graph(**options: object) -> StepGraph:
    step, args = training_step(deep(), torch.optim.AdamW)
    passes = passes_for(MixedPrecision(**options))  # pyrefly: ignore[bad-argument-type]
    return graph_of(step, args, passes)[0]


def test_waits_for_the_verdict_by_default() -> None:
    assert writes_in_backward(graph()) == []


def test_per_tensor_verdicts_let_updates_run_in_backward_last_layer_first() -> None:
    names = [n for n in writes_in_backward(graph(skip="tensor")) if n.endswith(".weight")]
    layers = [n.rsplit(".", 2)[-2] for n in names]
    assert layers == ["5", "4", "2"], (
        "the first layer's gradient ends backward: nothing is left to run before it"
    )


def test_second_gradients_go_straight_into_their_updates() -> None:
    names = writes_in_backward(graph(release=True, max_norm=1.0))
    assert any(n.endswith("4.weight") for n in names), names


def test_an_update_waits_for_later_readers_of_its_parameter() -> None:
    """A weight that a layer before it shares is read by that layer's backward after its own gradient."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(torch.tanh(x @ self.weight) @ self.weight))

    step, args = training_step(Tied(), torch.optim.AdamW)
    captured, _ = graph_of(step, args, passes_for(MixedPrecision(skip="tensor")))
    nodes = {n: i for i, n in enumerate(captured.graph.nodes)}
    write = next(
        n
        for n in nodes
        if n.target is torch.ops.aten.copy_.default
        and captured.names[source(n)].endswith("weight")
        and tuple(source(n).meta["val"].shape) == (4, 4)
    )
    readers = [n for n in source(write).users if phase(n) in (Phase.FORWARD, Phase.BACKWARD)]
    assert readers
    assert all(nodes[n] < nodes[write] for n in readers)
