"""Modules under fake tensors convert as real ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxpass import _torch


class Tied(nn.Module):
    """A weight with two names, a buffer and a recurrent layer, which flattens its weights anew."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.LSTM(3, 3)


@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.to("meta"), lambda m: m.to("cpu")])
def test_conversion_gives_the_dtypes_and_devices_of_real_modules(convert: Callable[[Any], Any]) -> None:
    real = convert(Tied())
    with _torch.fake_tensors():
        fake = convert(Tied())
    assert _torch.is_fake(fake.head.weight)
    assert fake.head.weight is fake.table.weight
    assert fake.rnn._flat_weights[0] is fake.rnn.weight_ih_l0
    for (name, ours), (_, theirs) in zip(fake.state_dict().items(), real.state_dict().items(), strict=True):
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device), name
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in fake.parameters())


def test_nothing_of_it_is_left_behind() -> None:
    before = nn.Module._apply
    with _torch.fake_tensors():
        assert nn.Module._apply is not before
    assert nn.Module._apply is before
    assert not _torch.is_fake(torch.ones(1))
