"""What lies in whose storage, on small graphs made by hand, and against what tensors really share."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import fxpass.lower.outline  # noqa: F401 - registers fxpass::update
from fxpass.ir.alias import (
    VIEWS,
    hazards,
    input_storages,
    is_view,
    keeps_elements,
    shared,
    storage_of,
    view_of,
    written,
)
from fxpass.ir.marks import GRAD, MARK

aten = torch.ops.aten


class Hand:
    """A graph made by hand, its values real tensors."""

    def __init__(self) -> None:
        self.graph = Graph()

    def input(self, *shape: int) -> Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = torch.randn(*shape)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        values = map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def write(self, target: Node, value: Node) -> Node:
        node = self.graph.call_function(aten.copy_.default, (target, value))
        node.meta["val"] = target.meta["val"]
        return node


OPERATORS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.diagonal.default, ()),
    (aten.unfold.default, (0, 2, 1)),
    (aten.t.default, ()),
    (aten.select.int, (0, 1)),
    (aten.slice.Tensor, (0, 0, 2)),
    (aten.expand.default, ([2, 6, 6],)),
    (aten._unsafe_view.default, ([36],)),
    (aten.reshape.default, ([4, 9],)),
    (aten.contiguous.default, ()),
    (aten.as_strided.default, ([2], [1], 0)),
    (aten.detach.default, ()),
    (aten.view.dtype, (torch.int32,)),
    (aten.clone.default, ()),
    (aten._to_copy.default, ()),
    (aten.neg.default, ()),
    (aten.copy.default, (torch.ones(6, 6),)),
    (aten.lift_fresh_copy.default, ()),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("target", "extra"), OPERATORS, ids=lambda v: str(v) if callable(v) else "")
def test_as_the_tensors_say(target: Any, extra: tuple[Any, ...], transposed: bool) -> None:
    hand = Hand()
    source = hand.input(6, 6)
    if transposed:
        source = hand.call(aten.t.default, source)
        if target is aten._unsafe_view.default:
            return
    node = hand.call(target, source, *extra)
    shares = node.meta["val"].untyped_storage()._cdata == source.meta["val"].untyped_storage()._cdata
    assert (view_of(node) is source) == shares
    assert source in shared(node) or not shares, "what is shared is known to be"


def test_an_operator_nobody_knows_may_share_all_it_reads() -> None:
    def mystery(a: Tensor, b: Tensor) -> Tensor:
        return a

    hand = Hand()
    a, b = hand.input(4), hand.input(4)
    node = hand.call(mystery, a, b)
    assert set(shared(node)) == {a, b}
    assert not is_view(node)
    assert input_storages(hand.graph)[node] == {a, b}


def test_parts_lie_in_what_was_split_and_results_of_a_kernel_in_nothing() -> None:
    hand = Hand()
    x = hand.input(6, 6)
    part = hand.call(operator.getitem, hand.call(aten.split.Tensor, x, 2), 1)
    deviation = hand.call(operator.getitem, hand.call(aten.var_mean.correction, x), 0)
    assert storage_of(part) is x
    assert storage_of(deviation) is deviation
    assert input_storages(hand.graph).get(deviation) is None
    assert input_storages(hand.graph)[part] == {x}


def test_a_mark_is_its_value_and_a_write_a_new_one() -> None:
    hand = Hand()
    x, y = hand.input(4), hand.input(4)
    mark = hand.call(MARK, x, GRAD, 0)
    result = hand.write(y, mark)
    lies = input_storages(hand.graph)
    assert lies[mark] == {x}
    assert written(result) == (y,)
    assert result not in lies


def test_names_of_views_come_from_the_schemas() -> None:
    assert {"view", "diagonal", "unfold", "_unsafe_view", "getitem", "split", "unbind", "expand"} <= VIEWS
    assert VIEWS.isdisjoint({"clone", "relu_", "copy_", "_to_copy", "add", "dropout", "unsafe_split"})


def test_elements_kept_whatever_the_strides() -> None:
    hand = Hand()
    x = hand.input(6, 6)
    keeps = [(aten.t.default, ()), (aten.view.default, ([36],)), (aten.unsqueeze.default, (0,))]
    loses = [
        (aten.select.int, (0, 1)),
        (aten.view.dtype, (torch.int32,)),
        (aten.as_strided.default, ([36], [1], 0)),
    ]
    assert all(keeps_elements(hand.call(target, x, *extra)) for target, extra in keeps)
    assert not any(keeps_elements(hand.call(target, x, *extra)) for target, extra in loses)


@pytest.mark.parametrize("by_unit", [False, True])
@pytest.mark.parametrize("view", [aten.diagonal.default, aten.alias.default, aten.neg.default])
def test_a_read_after_the_write_is_a_hazard(view: Any, by_unit: bool) -> None:
    hand = Hand()
    x, new = hand.input(6, 6), hand.input(6, 6)
    before = hand.call(view, x)
    hand.call(aten.sum.default, before)
    if by_unit:
        hand.graph.call_function(torch.ops.fxpass.update.default, ([x], [new], [0, 1, 1])).meta["val"] = None
    else:
        hand.write(x, new)
    late = hand.call(aten.sum.default, before)
    hand.graph.output((late, x))
    found = [hazard.reader for hazard in hazards(hand.graph)]
    assert found == ([] if view is aten.neg.default else [late])
