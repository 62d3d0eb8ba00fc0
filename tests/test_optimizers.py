"""Every optimizer, 20 steps in float32, against eager in the same run; and exact skips for each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxpass import MixedPrecision, OptimizerError
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers import clone, same

O = torch.optim  # noqa: E741 - the table below reads better
Make = Callable[[Any], Optimizer]

CASES: dict[str, Make] = {
    "adamw": lambda p: O.AdamW(p, lr=1e-2),
    "adamw foreach": lambda p: O.AdamW(p, lr=1e-2, foreach=True),
    "adamw for loop": lambda p: O.AdamW(p, lr=1e-2, foreach=False),
    "adamw tensor lr": lambda p: O.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adamw amsgrad": lambda p: O.AdamW(p, lr=1e-2, amsgrad=True),
    "adam": lambda p: O.Adam(p, lr=1e-2, weight_decay=0.1),
    "adam maximize": lambda p: O.Adam(p, lr=1e-2, maximize=True, amsgrad=True),
    "nadam": lambda p: O.NAdam(p, lr=1e-2),
    "nadam decoupled": lambda p: O.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: O.RAdam(p, lr=1e-2),
    "adamax": lambda p: O.Adamax(p, lr=1e-2),
    "sgd": lambda p: O.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: O.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "sgd nesterov": lambda p: O.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd dampening": lambda p: O.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.01, maximize=True),
    "rmsprop": lambda p: O.RMSprop(p, lr=1e-3),
    "rmsprop centered": lambda p: O.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "adagrad": lambda p: O.Adagrad(p, lr=1e-2, lr_decay=0.01),
    "adadelta": lambda p: O.Adadelta(p),
    "asgd": lambda p: O.ASGD(p, lr=1e-2),
    "rprop": lambda p: O.Rprop(p, lr=1e-3),
    "adafactor": lambda p: O.Adafactor(p, lr=1e-2),
    "two groups": lambda p: _two_groups(list(p)),
}


def _two_groups(params: list[nn.Parameter]) -> Optimizer:
    decay, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    return O.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 1e-3, "weight_decay": 0.0}])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def make_step(model: nn.Module, opt: Optimizer) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        opt.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        opt.step()
        return loss

    return step


def pair(make: Make, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    theirs = Net()
    ours = copy.deepcopy(theirs)
    opts = make(ours.parameters()), make(theirs.parameters())
    mp = MixedPrecision(**{"dtype": "float32", "codegen": "eager", **options})
    return ours, theirs, *opts, torch.compile(make_step(ours, opts[0]), backend=mp), make_step(theirs, opts[1]), mp


def agree(ours: nn.Module, theirs: nn.Module, our_opt: Optimizer, their_opt: Optimizer) -> None:
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    same(our_opt.state_dict()["state"], their_opt.state_dict()["state"], "state")


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_eager(name: str) -> None:
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(CASES[name])
    for _ in range(20):
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)
    assert len(mp.graphs) == 1
    for _ in range(2):  # the user goes on without fxpass
        x = torch.randn(6, 4)
        same(make_step(ours, our_opt)(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)


@pytest.mark.parametrize("name", ["adamw", "sgd nesterov", "adafactor", "radam", "two groups"])
def test_with_inductor(name: str) -> None:
    ours, theirs, our_opt, their_opt, step, eager, _ = pair(CASES[name], codegen="inductor")
    for _ in range(20):
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)


def test_muon() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    ours = copy.deepcopy(theirs)
    steps = []
    for model in (ours, theirs):
        steps.append(make_step(model, O.Muon(model.parameters(), lr=1e-2)))
    step = torch.compile(steps[0], backend=MixedPrecision(dtype="float32", codegen="eager"))
    for _ in range(20):
        x = torch.randn(6, 4)
        same(step(x), steps[1](x), "loss")
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")


@pytest.mark.parametrize("name", CASES)
def test_an_overflow_changes_no_bit(name: str) -> None:
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(CASES[name])
    for index in range(6):
        if index in (0, 3, 4):
            before = clone([dict(ours.named_parameters()), our_opt.state_dict()["state"]])
            step(torch.full((6, 4), float("inf")))
            after = clone([dict(ours.named_parameters()), our_opt.state_dict()["state"]])
            same(after[0], before[0], "parameters", exact=True)
            if index:
                same(after[1], before[1], "state", exact=True)
        else:
            x = torch.randn(6, 4)
            same(step(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)
    assert mp.stats().skipped == 3


@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "adafactor"])
def test_loaded_state_is_picked_up(name: str) -> None:
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(CASES[name])
    for index in range(6):
        if index in (0, 3):  # before the first step, and in between: new tensors each time
            for model, opt in ((ours, our_opt), (theirs, their_opt)):
                if index:
                    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                    for state in opt.state.values():
                        for value in state.values():
                            value.mul_(0.5)
                else:
                    make_step(model, opt)(torch.ones(6, 4))
                    opt.zero_grad()
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)
    assert len(mp.graphs) == 1


def test_add_param_group_after_compiling() -> None:
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(lambda p: O.AdamW(list(p)[:2], lr=1e-2))
    for index in range(4):
        if index == 2:
            for model, opt in ((ours, our_opt), (theirs, their_opt)):
                opt.add_param_group({"params": list(model.parameters())[2:], "lr": 1e-3})
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
        ours.zero_grad()
        theirs.zero_grad()
    agree(ours, theirs, our_opt, their_opt)
    assert len(mp.graphs) == 2


def test_two_optimizers_over_disjoint_parameters() -> None:
    torch.manual_seed(0)
    theirs = Net()
    ours = copy.deepcopy(theirs)
    steps, opts = [], []
    for model in (ours, theirs):
        first, second = O.AdamW(model.first.parameters(), lr=1e-2), O.SGD(model.last.parameters(), lr=0.1, momentum=0.9)
        opts.append((first, second))

        def step(x: Tensor, model: Net = model, first: Optimizer = first, second: Optimizer = second) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            first.step()
            second.step()
            model.zero_grad()
            return loss

        steps.append(step)
    mp = MixedPrecision(dtype="float32", codegen="eager")
    compiled = torch.compile(steps[0], backend=mp)
    for _ in range(10):
        x = torch.randn(6, 4)
        same(compiled(x), steps[1](x), "loss")
    for a, b in zip(*opts, strict=True):
        agree(ours, theirs, a, b)
    assert len(mp.graphs) == 1


# ---------------------------------------------------------------- optimizers of the user's own


class Lion(Optimizer):
    """Plain tensor maths, a step count that is a Python number, and a momentum that is rebound."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                    state["n"] = 0
                state["n"] += 1
                warm = 1 - 0.5 ** state["n"]
                p.add_(torch.sign(group["beta"] * state["m"] + p.grad), alpha=-group["lr"] * warm)
                state["m"] = group["beta"] * state["m"] + (1 - group["beta"]) * p.grad


class Counting(Lion):
    """Keeps a count on itself, which a compiled step cannot follow."""

    calls = 0

    def step(self) -> None:
        self.calls += 1
        super().step()


class Greedy(Lion):
    """Makes its first state from the gradient."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["m"] = 0.9 * state["m"] + p.grad if "m" in state else p.grad.clone()
            p.sub_(0.1 * state["m"])


def test_a_user_written_optimizer() -> None:
    ours, theirs, _, _, step, eager, mp = pair(Lion)
    for index in range(10):
        if index in (0, 4):
            step(torch.full((6, 4), float("inf")))
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    assert len(mp.graphs) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Counting, r"changes self\.calls"),
        (Greedy, r"creates state\['m'\] from the gradient"),
        (lambda p: O.AdamW(p, fused=True), "fused=True"),
        (lambda p: O.LBFGS(p), "LBFGS"),
        (lambda p: O.SparseAdam(p), "SparseAdam"),
        (lambda p: O.AdamW([q.detach().half().requires_grad_() for q in p]), "torch.float16|no gradient"),
    ],
)
def test_what_cannot_be_traced_is_an_error_that_changes_nothing(make: Make, message: str) -> None:
    ours, _, opt, _, step, _, _ = pair(make)
    before = clone(dict(ours.named_parameters()))
    with pytest.raises((OptimizerError, Exception), match=message) as error:
        step(torch.randn(6, 4))
    assert type(error.value).__module__ == "fxpass.errors"
    assert "test_optimizers.py:" in str(error.value)
    same(dict(ours.named_parameters()), before, "parameters", exact=True)
    assert all(p.grad is None for p in ours.parameters())
    assert not opt.state


def test_closure() -> None:
    model = Net()
    opt = O.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def step(x: Tensor) -> None:
        def closure() -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            return loss

        opt.step(closure)

    with pytest.raises(OptimizerError, match="closure"):
        step(torch.randn(6, 4))
