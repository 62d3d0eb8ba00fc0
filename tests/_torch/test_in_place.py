"""Which operations of Dynamo's graph write in place."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from fxpass import _torch


@pytest.mark.parametrize(
    ("target", "more", "kwargs", "writes"),
    [
        (F.relu, (), {"inplace": True}, True),
        (F.relu, (True,), {}, True),
        (F.dropout, (0.5, True, True), {}, True),
        (F.relu, (), {}, False),
        (torch.relu_, (), {}, True),
        (torch.relu, (), {}, False),
        (operator.setitem, (0, 1.0), {}, True),
        (operator.ilshift, (1,), {}, True),
        ("add_", (1,), {}, True),
        ("__add__", (1,), {}, False),
    ],
)
def test_written(target: Any, more: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    given = (x, *more)
    by_name = isinstance(target, str)
    node = graph.call_method(target, given, kwargs) if by_name else graph.call_function(target, given, kwargs)
    assert _torch.written(node) == ([x] if writes else [])


def test_written_to_out() -> None:
    graph = Graph()
    x, out = graph.placeholder("x"), graph.placeholder("out")
    assert _torch.written(graph.call_function(torch.add, (x, 1), {"out": out})) == [out]
