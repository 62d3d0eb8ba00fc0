"""One rejected graph per rule of the verifier."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from fxpass import VerifyError
from fxpass.ir.edit import Editor
from fxpass.ir.graph import Phase, StepGraph
from fxpass.ir.marks import GRAD
from fxpass.ir.verify import verify
from tests.support.graphs import graph_of, training_step

aten = torch.ops.aten


@pytest.fixture
def step() -> StepGraph:
    return graph_of(*training_step())[0]


def first(step: StepGraph, text: str) -> Node:
    return next(n for n in step.graph.nodes if text in str(n.target))


def test_accepts_a_captured_graph(step: StepGraph) -> None:
    verify(step, "none", set(step.graph.nodes))


def no_value(step: StepGraph) -> None:
    del first(step, "relu").meta["val"]


def no_phase(step: StepGraph) -> None:
    del first(step, "relu").meta["fxpass_phase"]


def written_twice(step: StepGraph) -> None:
    write = first(step, "copy_.default")
    edit = Editor(step, "test")
    with edit.after(write):
        edit.call(aten.copy_.default, *write.args, when=Phase.OUTPUT, reason="test")


def writes_a_value(step: StepGraph) -> None:
    write = first(step, "copy_.default")
    write.update_arg(0, first(step, "relu"))


def writes_another_dtype(step: StepGraph) -> None:
    write = first(step, "copy_.default")
    edit = Editor(step, "test")
    with edit.before(write):
        write.update_arg(
            1, edit.cast(write.all_input_nodes[1], torch.float16, when=Phase.UPDATE, reason="test")
        )


def used_too_early(step: StepGraph) -> None:
    relu = first(step, "relu")
    next(n for n in step.graph.nodes if n.op == "call_function").prepend(relu)


def read_after_its_write(step: StepGraph) -> None:
    write = first(step, "copy_.default")
    view = first(step, "aten.t.default")
    edit = Editor(step, "test")
    write.update_arg(0, view.args[0])
    with edit.after(write):
        edit.call(aten.sum.default, view, when=Phase.AFTER, reason="test")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_value, "it has no value"),
        (no_phase, "it has no phase"),
        (written_twice, "is written twice"),
        (writes_a_value, "copy_ to something that is not an input"),
        (writes_another_dtype, "would be written torch.float16"),
        (read_after_its_write, "looks at an input that .* has overwritten"),
        (used_too_early, "is used before it is computed"),
    ],
)
def test_rejects(step: StepGraph, damage: Callable[[StepGraph], None], message: str) -> None:
    damage(step)
    with pytest.raises(VerifyError, match=message) as error:
        verify(step, "culprit")
    assert "'culprit'" in str(error.value)


def test_rejects_a_value_that_its_inputs_do_not_give(step: StepGraph) -> None:
    relu = first(step, "relu")
    relu.meta["val"] = relu.meta["val"].half()
    with pytest.raises(VerifyError, match=r"its value is torch.float32.*recorded torch.float16"):
        verify(step, "culprit", {relu})


def test_editor_stamps_and_propagates(step: StepGraph) -> None:
    mark = step.marks(GRAD)[0]
    edit = Editor(step, "mine")
    with edit.after(mark):
        node = edit.cast(mark, torch.float16, when=Phase.CHECK, reason="because")
    assert node.meta["val"].dtype is torch.float16
    assert (node.meta["fxpass_origin"].pass_name, node.meta["fxpass_origin"].reason) == ("mine", "because")
    assert node.prev is mark
    assert edit.cast(node, torch.float16, when=Phase.CHECK, reason="again") is node


def test_a_value_is_computed_again_only_if_what_it_reads_has_changed(step: StepGraph) -> None:
    edit = Editor(step, "test")
    relu = first(step, "relu")
    with edit.after(relu):
        half = edit.cast(relu, torch.float16, when=Phase.FORWARD, reason="test")
        again = edit.call(aten.neg.default, half, when=Phase.FORWARD, reason="test")
    assert not list(edit.unproven())
    half.update_kwarg("dtype", torch.bfloat16)
    assert list(edit.unproven()) == [half]
    edit.refresh(half)
    assert list(edit.unproven()) == [again]
