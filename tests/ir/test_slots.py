"""One name for each value that an optimizer holds: read, written and told apart by place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from fxpass.ir.slots import Slot

WEIGHT = Slot(0, 0, 1, name="net.weight")
AVERAGE = WEIGHT.state("exp_avg")


def optimizer() -> Optimizer:
    """Two groups; the second counts its steps itself, as schedule-free and Prodigy do."""
    first, second, third = (nn.Parameter(torch.full((2,), float(i))) for i in range(3))
    opt = AdamW([{"params": [first, second]}, {"params": [third], "k": 5, "lr": 0.5}], betas=(0.8, 0.9))
    opt.state[second]["exp_avg"] = torch.ones(2)
    vars(opt)["scale"] = 3.0
    return opt


@pytest.mark.parametrize(
    ("slot", "value", "text", "path"),
    [
        (AVERAGE, 1.0, "exp_avg[net.weight]", "state[net.weight]['exp_avg']"),
        (Slot(0, 1, key="lr"), 0.5, "lr[1]", "param_groups[1]['lr']"),
        (Slot(0, 1, key="k"), 5, "k[1]", "param_groups[1]['k']"),
        (Slot(0, 0, key="betas", item=1), 0.9, "betas[0][1]", "param_groups[0]['betas'][1]"),
        (Slot(0, None, key="scale"), 3.0, "scale", "self.scale"),
    ],
)
def test_read_write_and_text(slot: Slot, value: Any, text: str, path: str) -> None:
    opt = optimizer()
    found = slot.read(opt)
    assert value == (found[0] if isinstance(found, torch.Tensor) else found)
    assert (str(slot), slot.path) == (text, path)
    slot.write(opt, 0.25)
    assert slot.read(opt) == 0.25


def test_a_parameter() -> None:
    opt = optimizer()
    assert WEIGHT.read(opt) is opt.param_groups[0]["params"][1]
    assert str(WEIGHT) == WEIGHT.path == "net.weight"
    with pytest.raises(AssertionError, match="in place"):
        WEIGHT.write(opt, torch.ones(2))


def test_an_element_is_written_beside_the_others() -> None:
    opt = optimizer()
    Slot(0, 0, key="betas", item=1).write(opt, 0.5)
    assert opt.param_groups[0]["betas"] == (0.8, 0.5)


def test_reading_what_is_not_there_makes_nothing() -> None:
    opt = optimizer()
    absent = Slot(0, 0, 0, "exp_avg"), Slot(0, 1, key="weight_sum"), Slot(0, None, key="count")
    assert [slot.read(opt) for slot in absent] == [None] * 3
    assert list(opt.state) == [WEIGHT.read(opt)]


def test_state_belongs_to_its_parameter_and_a_setting_to_itself() -> None:
    number = Slot(0, 1, key="k")
    assert AVERAGE.owner == WEIGHT.owner == WEIGHT
    assert AVERAGE.owner.name == AVERAGE.name == "net.weight"
    assert number.owner is number


def test_equal_is_the_same_place_whatever_it_is_called() -> None:
    assert {Slot(0, 0, 1, "exp_avg"): 7}[AVERAGE] == 7
    others = [Slot(1, 0, 1, "exp_avg"), Slot(0, 1, 1, "exp_avg"), Slot(0, 0, 0, "exp_avg"), WEIGHT]
    assert AVERAGE not in others
