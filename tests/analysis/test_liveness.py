"""Liveness against what really happens: random graphs run op by op, storages watched as they come and go."""

from __future__ import annotations

import operator
import weakref
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from fxpass import MixedPrecision
from fxpass.analysis.liveness import Liveness, liveness
from fxpass.ir.graph import Phase, Role, StepGraph
from fxpass.passes import passes_for
from tests.support.graphs import graph_of, training_step

aten = torch.ops.aten

OPERATORS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.neg.default, ()),
    (aten.clone.default, ()),
    (aten._to_copy.default, ()),
    (aten.relu_.default, ()),
    (aten.view.default, ([-1],)),
    (aten._unsafe_view.default, ([4, 6],)),
    (aten.reshape.default, ([2, 12],)),
    (aten.reshape.default, ([6, 4],)),
    (aten.t.default, ()),
    (aten.alias.default, ()),
    (aten.slice.Tensor, (0, 0, 3)),
    (aten.unsqueeze.default, (0,)),
    (aten.split.Tensor, (2,)),
    (aten.unbind.int, ()),
    (aten.var_mean.correction, ()),
    (aten.sum.default, ()),
]
Choice = tuple[int, int, int]  # which operator, on which earlier value, which part of a result of several


def random_graph(choices: list[Choice], outputs: list[int]) -> GraphModule:
    """A graph of those of ``choices`` that are possible; values in it are real tensors."""
    graph = Graph()
    values: list[Node] = []

    def add(node: Node, value: Any) -> None:
        node.meta.update(val=value, fxpass_phase=Phase.FORWARD)
        if isinstance(value, Tensor):
            values.append(node)

    for name in ("x", "y"):
        add(graph.placeholder(name), torch.randn(6, 4))
    for which, source, part in choices:
        target, extra = OPERATORS[which]
        node = values[source % len(values)]
        try:
            result = target(node.meta["val"], *extra)
        except (RuntimeError, IndexError):
            continue  # no such view of this value
        add(made := graph.call_function(target, (node, *extra)), result)
        if not isinstance(result, Tensor) and result:
            part %= len(result)
            add(graph.call_function(operator.getitem, (made, part)), result[part])
    graph.output(tuple(dict.fromkeys(values[i % len(values)] for i in outputs)))
    return GraphModule(torch.nn.Module(), graph)


class Watched(Interpreter):
    """Runs a graph and notes, before each node, which storages that nodes made are still there."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.made: dict[str, weakref.ref[Any]] = {}
        self.alive: list[set[str]] = []

    def run_node(self, n: Node) -> Any:
        if n.op not in ("placeholder", "output"):
            self.alive.append(self.present())
        result = super().run_node(n)
        several = isinstance(result, (tuple, list))
        if n.op != "output":
            for i, part in enumerate(result if several else [result]):
                self.note(f"{n.name}[{i}]" if several else n.name, part)
        return result if n.users or n.op == "output" else None  # generated code drops what nobody reads

    def note(self, name: str, value: Tensor) -> None:
        storage = value.untyped_storage()
        if not any(ref() is storage for ref in self.made.values()):
            self.made[name] = weakref.ref(storage)

    def present(self) -> set[str]:
        return {name for name, ref in self.made.items() if ref() is not None}


def before(alive: Liveness, index: int) -> set[str]:
    """The storages that should be there when node ``index`` begins."""
    return {s.name for s in alive.storages if s.birth < index <= s.death}


def _number(below: int) -> st.SearchStrategy[int]:
    return st.integers(0, below - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(OPERATORS) - 1), st.integers(0, 30), st.integers(0, 9)), max_size=25
    ),
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
def test_storages_live_as_long_as_they_do_in_eager(choices: list[Choice], outputs: list[int]) -> None:
    gm = random_graph(choices, outputs)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    found = liveness(StepGraph(gm, roles=dict.fromkeys(inputs, Role.INPUT)))
    for node in gm.graph.nodes:
        sizes = node.meta.pop("val", None)
        del sizes  # or the graph itself keeps storages alive
    held = [torch.randn(6, 4), torch.randn(6, 4)]
    watched = Watched(gm)
    results = watched.run(*held)
    assert [sorted(before(found, i)) for i in range(len(found.nodes))] == [sorted(a) for a in watched.alive]
    assert {s.name for s in found.storages if s.death == len(found.nodes)} == watched.present()
    sizes = {name: ref().nbytes() for name, ref in watched.made.items() if ref() is not None}  # pyrefly: ignore[missing-attribute]
    assert {s.name: int(s.size) for s in found.storages if s.name in sizes} == sizes
    del results


def test_roles_of_a_training_step() -> None:
    step, args = training_step()
    graph, _ = graph_of(step, args, passes_for(MixedPrecision(max_norm=1.0)))
    found = liveness(graph)
    roles = {s.role for s in found.storages}
    expected = "parameter,input,scaler,cast weight,fp16 gradient,saved activation,output"
    assert roles >= set(expected.split(","))
    weights = [s for s in found.storages if s.role == "parameter"]
    assert [int(s.size) for s in weights] == [128, 32, 64, 8]
    assert all(s.external and s.birth == -1 and s.death == len(found.nodes) for s in weights)
    gradients = [s for s in found.storages if s.role == "fp16 gradient"]
    assert sorted(int(s.size) for s in gradients) == [32, 64]  # of weights; those of biases are float32 sums
