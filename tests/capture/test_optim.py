"""State made before the first step, and what of an optimizer is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from fxpass import MixedPrecision, OptimizerError
from fxpass.capture.assumptions import check
from fxpass.capture.optim_state import create_state, fit_state, state_of
from fxpass.capture.standin import undecorated
from fxpass.ir.slots import Slot
from tests.support.helpers import clone, same

PARAMS = [Slot(0, 0, position, name=name) for position, name in enumerate(("weight", "bias"))]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]


class Own(Optimizer):
    """Python numbers in its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(count=0, decay=1.0, mean=torch.zeros_like(p), nesterov=False)
            state["count"] += 1
            state["decay"] *= 0.1
            state["mean"].add_(p.grad)


@pytest.mark.breadth(2)
@pytest.mark.parametrize("make", [Adam, AdamW, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.Adafactor])
def test_state_is_as_eager_makes_it(make: Any) -> None:
    ours, theirs = make(parameters()), make(parameters())
    create_state(ours, PARAMS, "here")
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    theirs.step()
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert {k: (v.shape, v.dtype) for k, v in ours.state[p].items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.state[q].items()
        }


def test_numbers_become_tensors() -> None:
    opt = Own(parameters())
    before = clone([list(opt.param_groups[0]["params"])])
    create_state(opt, PARAMS, "here")
    state = opt.state[opt.param_groups[0]["params"][0]]
    assert state["nesterov"] is False
    same([state["count"], state["decay"]], [torch.tensor(0.0).double(), torch.tensor(1.0).double()], "state")
    same(state["mean"], torch.zeros(3, 2), "state", exact=True)
    same([opt.param_groups[0]["params"]], before, "parameters", exact=True)


@pytest.mark.parametrize("make", [Own, lambda p: SGD(p, lr=0.1, momentum=0.9), Adam])
def test_undo_takes_back_everything(make: Any) -> None:
    opt = make(parameters())
    first = opt.param_groups[0]["params"][0]
    opt.state[first] = {"mine": 1, "momentum_buffer": None}
    create_state(opt, PARAMS, "here")()
    assert dict(opt.state) == {first: {"mine": 1, "momentum_buffer": None}}


def test_dampened_momentum_is_the_first_gradient_even_if_that_is_zero() -> None:
    """-0.0 means "no buffer yet"; a zero gradient makes a buffer, so the second one is dampened."""
    models = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    opts = [SGD([p], lr=0.1, momentum=0.9, dampening=0.5, maximize=True) for p in models]

    def make(p: nn.Parameter, opt: SGD) -> Any:
        def step(slope: torch.Tensor) -> None:
            opt.zero_grad()
            (p * slope).sum().backward()
            opt.step()

        return step

    ours = torch.compile(make(models[0], opts[0]), backend=MixedPrecision(dtype="float32", codegen="eager"))
    for slope in ([0.0, 1.0], [1.0, 1.0], [1.0, -1.0]):
        ours(torch.tensor(slope))
        make(models[1], opts[1])(torch.tensor(slope))
        same(models[0], models[1], "parameter")


def test_replaced_state_is_brought_into_form() -> None:
    opt = Own(parameters())
    create_state(opt, PARAMS, "here")
    forms = state_of(opt, PARAMS)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # casts counts to the parameter's dtype
    first, second = opt.param_groups[0]["params"]
    assert opt.state[first]["count"].dtype is torch.float32
    opt.state[first]["mean"] = torch.ones(2, 3).T
    del opt.state[second]
    fit_state(opt, PARAMS, {}, forms, "here")
    assert opt.state[first]["count"].dtype is torch.float64
    assert opt.state[first]["mean"].is_contiguous()
    same(opt.state[first]["mean"], torch.ones(3, 2), "state", exact=True)
    assert set(opt.state[second]) == set(opt.state[first])


def test_loaded_state_of_another_shape() -> None:
    opt = Adam(parameters())
    create_state(opt, PARAMS, "here")
    forms = state_of(opt, PARAMS)
    opt.state[opt.param_groups[0]["params"][0]]["exp_avg"] = torch.zeros(5)
    with pytest.raises(OptimizerError, match=r"exp_avg.*\(5,\)"):
        fit_state(opt, PARAMS, {}, forms, "here")


def _hooked() -> Optimizer:
    opt = Adam(parameters())
    opt.register_step_post_hook(lambda *_: None)
    return opt


def _replaced() -> Optimizer:
    opt: Any = Adam(parameters())
    opt.step = lambda: None
    return opt


def _with_tensor() -> Optimizer:
    opt: Any = Own(parameters())
    opt.seen = [torch.zeros(())]
    return opt


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (lambda: Adam(parameters(), differentiable=True), "differentiable=True"),
        (lambda: Adam([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]), "complex parameter"),
        (lambda: Adam([torch.zeros(2, dtype=torch.float16, requires_grad=True)]), r"torch\.float16"),
        (lambda: Adam(parameters(), betas=(torch.tensor(0.9), torch.tensor(0.99)), capturable=True), "betas"),
        (_hooked, "step hooks"),
        (_replaced, "step method .* replaced"),
        (_with_tensor, r"tensors in self\.seen"),
    ],
)
def test_refused(opt: Any, message: str) -> None:
    with pytest.raises(OptimizerError, match=message) as error:
        check(opt(), "train.py:7", ())
    assert "train.py:7" in str(error.value)
    assert "to do:" in str(error.value)


def test_a_schedulers_wrapper_is_not_refused() -> None:
    opt = Adam(parameters())
    lr_scheduler.StepLR(opt, 1)
    check(opt, "here", ())


def test_only_torchs_own_decorators_are_removed() -> None:
    @torch.no_grad()
    def step() -> None: ...

    assert not hasattr(undecorated(step), "__wrapped__")
    assert undecorated(AdamW.step).__name__ == "step"
