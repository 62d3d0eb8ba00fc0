"""Inductor keeps the order of a step: what KeepOrder needs of torch, and that it is scoped to us."""

from __future__ import annotations

import inspect

import torch
import torch._inductor.config as inductor_config
from torch._inductor.choices import InductorChoices
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.virtualized import V

from fxpass._torch.fusion import KeepOrder, keep_order


def test_the_extension_point_is_as_known() -> None:
    parameters = list(inspect.signature(InductorChoices.can_fuse).parameters)
    assert parameters == ["scheduler", "node1", "node2", "shared_data_score"]
    assert {"min_order", "max_order", "ancestors"} <= set(BaseSchedulerNode.__annotations__) | set(
        vars(BaseSchedulerNode)
    ) | set(inspect.getsource(BaseSchedulerNode).split())


def test_is_set_inside_only_and_never_over_the_users_own() -> None:
    with keep_order():
        assert type(V.choices) is KeepOrder
    assert type(V.choices) is not KeepOrder

    class Mine(InductorChoices):
        pass

    with V.set_choices_handler(Mine()), keep_order():
        assert type(V.choices) is Mine


def test_kernels_on_both_sides_of_a_product_stay_apart() -> None:
    """Both read x alone: without KeepOrder they become one kernel before the product."""

    def f(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.mm(x.sin(), w)
        return y, x.cos() + y.sum() * 0

    from torch._inductor.utils import run_and_get_code

    x, w = torch.randn(16, 16), torch.randn(16, 16)
    with inductor_config.patch(fx_graph_cache=False), keep_order():
        result, (code, *_) = run_and_get_code(torch.compile(f), x, w)
    assert code.count("sin") >= 1
    body = code[code.index("def call") :]
    calls = [line for line in body.splitlines() if "cpp_fused" in line or "extern_kernels.mm" in line]
    assert len(calls) == 3, calls
    torch.testing.assert_close(result, f(x, w))
