"""0-d tensors where an optimizer's Python expects numbers."""

from __future__ import annotations

import math
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass.capture.scalars import Comparison, ScalarTensors, tensor_functions
from fxpass.ir.slots import Slot
from tests.support.helpers import same

HALF = torch.tensor(0.5, dtype=torch.float64)
X, A, B = (torch.arange(1.0, 4.0) * k for k in (1, 2, 3))


class Functions:
    """What optimizers do with numbers, by functions that this module defines or imports."""

    def scalars(self, t: Any) -> list[Any]:
        return [math.sqrt(t), sqrt(t), math.pow(t, 2), math.exp(t), max(1e-3, t), min(t, 0.25), max(t, 1)]

    def of_lists(self) -> tuple[float, float, float]:
        return max([1, 2, 3]), min(3, 2, 1), math.prod((2, 3))


def test_math_and_extremes_take_tensors() -> None:
    with tensor_functions([Functions]):
        same([float(v) for v in Functions().scalars(HALF)], Functions().scalars(0.5), "scalars")
        assert all(isinstance(v, Tensor) for v in Functions().scalars(HALF))
        assert Functions().of_lists() == (3, 1, 6)


def test_the_module_gets_its_names_back() -> None:
    names = ("math", "sqrt", "min", "max")
    before = {name: globals().get(name) for name in names}
    with tensor_functions([Functions]):
        assert {name: globals().get(name) for name in names} != before
    assert {name: globals().get(name) for name in names} == before


@pytest.mark.breadth
@pytest.mark.parametrize(
    "run",
    [
        lambda s: X.clone().add_(A, alpha=s),
        lambda s: X.sub(A, alpha=s),
        lambda s: torch.add(X, A, alpha=s),
        lambda s: X.clone().addcmul_(A, B, value=s),
        lambda s: torch.addcdiv(X, A, B, value=s),
        lambda s: X.clone().lerp_(A, s),
        lambda s: torch.lerp(X, A, weight=s),
        lambda s: torch._foreach_add([X, A], [A, B], alpha=s),
        lambda s: torch._foreach_addcdiv([X, A], [A, B], [B, X], value=s),
        lambda s: torch._foreach_addcmul([X, A], [A, B], [B, X], s),
    ],
)
def test_scalar_arguments_may_be_tensors(run: Any) -> None:
    with ScalarTensors():
        found = run(HALF)
    same(found, run(0.5), "result")


def test_a_bfloat16_term_is_scaled_in_the_dtype_of_the_sum() -> None:
    """Muon's update is bfloat16; rounding lr * update to it would lose its last 16 bits."""
    update = torch.tensor([1.0, 3.0]).bfloat16()
    with ScalarTensors():
        found = torch.zeros(2).add_(update, alpha=torch.tensor(-0.001, dtype=torch.float64))  # pyrefly: ignore[bad-argument-type]
    same(found, torch.zeros(2).add_(update, alpha=-0.001), "sum")


def test_item_stays_a_tensor() -> None:
    with ScalarTensors():
        assert isinstance(torch.ones(1).item(), Tensor)


def test_comparisons_of_settings_are_decided_and_remembered() -> None:
    at = Slot(0, 0, key="momentum")
    mode = ScalarTensors([(at, HALF, 0.5)])
    with mode:
        assert HALF != 0
        assert not HALF > 1
        assert mode.truth(HALF)
    assert mode.comparisons == [
        Comparison(at, "ne", 0, True),
        Comparison(at, "gt", 1, False),
        Comparison(at, "ne", 0, True),
    ]
    assert [c.holds(0.0) for c in mode.comparisons] == [False, True, False]
    with pytest.raises(TypeError, match="branches on the value"):
        mode.truth(X[0])


def test_assigning_data_writes_into_the_parameter() -> None:
    p = torch.zeros(3)
    alias = p.view(3)
    with ScalarTensors():
        p.data = X
    same(alias, X, "parameter", exact=True)
