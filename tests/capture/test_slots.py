"""One optimizer state tensor from capture to the runtime: the same slot everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from fxpass import MixedPrecision
from fxpass.ir.graph import Role, source
from fxpass.ir.marks import UPDATE
from fxpass.ir.slots import Slot
from fxpass.runtime.compiled_step import OptimizerBinding
from tests.support.graphs import graph_of, training_step
from tests.support.helpers import EAGER, Mlp, Training, batches, compare


def test_the_graph_knows_every_slot_by_its_input_and_its_mark() -> None:
    step, _ = graph_of(*training_step(optimizer=AdamW))
    average = Slot(0, 0, 1, "exp_avg")
    node = step.slots[average]
    assert (step.roles[node], step.names[node]) == (Role.STATE, "exp_avg[0.bias]")
    assert step.slots[average.owner] is next(n for n in step.roles if step.names[n] == "0.bias")
    (update,) = (u for u in step.updates if u.slot == average)
    assert (update.slot.name, update.mark.args[1], update.event) == ("0.bias", UPDATE, 0)
    (write,) = (n for n in step.graph.nodes if n.target is torch.ops.aten.copy_.default and n.args[0] is node)
    assert source(write, 1) in {update.mark, *update.mark.users}
    assert {str(s): step.roles[n] for s, n in step.slots.items() if s.position is None} == {"lr[0]": Role.LR}


def test_gradients_have_their_leaf_and_their_readers() -> None:
    step, _ = graph_of(*training_step(optimizer=SGD))
    assert [step.names[g.leaf] for g in step.gradients.values()] == [r.slot.name for r in step.reads]  # pyrefly: ignore[bad-index]
    assert [str(r.slot) for r in step.reads] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def _twice() -> Training:
    """Two optimizers, one of them stepping twice, and a parameter that both update."""
    model = Mlp()
    opts = [AdamW(model.parameters(), lr=0.01), SGD([model.last.weight], lr=0.1, momentum=0.9)]

    def step(x: Tensor, y: Tensor) -> Tensor:
        for opt in (opts[0], opts[1], opts[0]):
            loss = nn.functional.mse_loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        for opt in opts:
            opt.zero_grad()
        return loss.detach()

    return Training(step, [model], list(opts), batches())


def test_two_steps_of_one_optimizer_share_their_inputs() -> None:
    training = _twice()
    step, _ = graph_of(training.step, training.calls[0])
    weight = [s for s in step.slots if s.name == "last.weight" and s.key is None]
    assert sorted(s.optimizer for s in weight) == [0, 1]
    assert len({step.slots[s] for s in weight}) == 1, "one tensor"
    assert {u.event for u in step.updates if u.slot.optimizer == 0} == {0, 2}
    inputs = [n for n in step.inputs() if step.roles[n] in (Role.STATE, Role.LR)]
    assert len(inputs) == len({s for s in step.slots if s.key is not None}), "no slot has two"


def test_two_steps_of_one_optimizer_are_eagers() -> None:
    compare(_twice, handle=MixedPrecision(**EAGER))


def test_a_binding_follows_replaced_state_and_numbers_of_a_group() -> None:
    """Whatever a slot names: what a group counts itself is read like a learning rate."""
    parameter = nn.Parameter(torch.ones(2))
    opt = SGD([{"params": [parameter], "k": 3, "lr": None}], lr=0.1)
    opt.state[parameter]["buffer"] = torch.zeros(2)
    slot, fitted = Slot(0, 0, 0, "buffer"), []
    settings = [Slot(0, 0, key="k"), Slot(0, 0, key="lr")]
    binding = OptimizerBinding(lambda: opt, [slot], settings, fitted.append, lambda opt: None)

    def read() -> list[Any]:
        return [t.tolist() for t in binding.inputs(torch.device("cpu"))]

    assert read() == [[0.0, 0.0], 3.0, 0.0]
    settings[0].write(opt, 4)
    settings[1].write(opt, torch.tensor(0.5))
    assert read() == [[0.0, 0.0], 4.0, 0.5]
    assert fitted == [opt], "the first call"
    slot.write(opt, torch.ones(2))
    assert read() == [[1.0, 1.0], 4.0, 0.5]
    assert fitted == [opt, opt]
