"""Every optimizer, 20 steps in float32, against eager in the same run; and exact skips for each of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxpass import MixedPrecision, OptimizerError
from tests.support.helpers import clone, same

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
    "sgd dampening": lambda p: O.SGD(
        p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.01, maximize=True
    ),
    "rmsprop": lambda p: O.RMSprop(p, lr=1e-3),
    "rmsprop centered": lambda p: O.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "rmsprop foreach": lambda p: O.RMSprop(p, lr=1e-3, centered=True, momentum=0.9, foreach=True),
    "adagrad": lambda p: O.Adagrad(p, lr=1e-2, lr_decay=0.01),
    "adadelta": lambda p: O.Adadelta(p),
    "asgd": lambda p: O.ASGD(p, lr=1e-2),
    "rprop": lambda p: O.Rprop(p, lr=1e-3),
    "adafactor": lambda p: O.Adafactor(p, lr=1e-2),
    "two groups": lambda p: _two_groups(list(p)),
}
CAPTURABLE: list[Any] = [O.Adam, O.AdamW, O.NAdam, O.RAdam, O.Adamax, O.RMSprop, O.Adadelta, O.ASGD, O.Rprop]


def _two_groups(params: list[nn.Parameter]) -> Optimizer:
    decay, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    return O.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 1e-3, "weight_decay": 0.0}]
    )


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
    mp = MixedPrecision(**{"dtype": "float32", "codegen": "eager", **options})  # pyrefly: ignore[bad-argument-type]
    return (
        ours,
        theirs,
        *opts,
        torch.compile(make_step(ours, opts[0]), backend=mp),
        make_step(theirs, opts[1]),
        mp,
    )


def agree(ours: nn.Module, theirs: nn.Module, our_opt: Optimizer, their_opt: Optimizer) -> None:
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    same(our_opt.state_dict()["state"], their_opt.state_dict()["state"], "state")


def _tensors(opt: Optimizer) -> list[Tensor]:
    return [value for state in opt.state.values() for value in state.values() if isinstance(value, Tensor)]


def relative(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Each tensor to 1e-5 of its own norm: second moments are far below ``same``'s absolute tolerance."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is b.dtype
        assert (a - b).double().norm() <= 1e-5 * b.double().norm()


@pytest.mark.breadth(8)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_eager(name: str) -> None:
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(CASES[name])
    for _ in range(20):
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)
    relative([*ours.parameters(), *_tensors(our_opt)], [*theirs.parameters(), *_tensors(their_opt)])
    assert len(mp.graphs) == 1
    for _ in range(2):  # the user goes on without fxpass
        x = torch.randn(6, 4)
        same(make_step(ours, our_opt)(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)


@pytest.mark.breadth
@pytest.mark.parametrize("kind", CAPTURABLE)
def test_capturable(kind: Any) -> None:
    """Eager refuses it on a CPU; a compiled step computes what eager does without it."""
    torch.manual_seed(0)
    theirs = Net()
    ours = copy.deepcopy(theirs)
    our_opt, their_opt = kind(ours.parameters(), capturable=True), kind(theirs.parameters())
    step = torch.compile(make_step(ours, our_opt), backend=MixedPrecision(dtype="float32", codegen="eager"))
    for _ in range(10):
        x = torch.randn(6, 4)
        same(step(x), make_step(theirs, their_opt)(x), "loss")
    agree(ours, theirs, our_opt, their_opt)


def test_a_scalar_parameter_and_a_group_without_gradients() -> None:
    torch.manual_seed(0)
    runs = []
    for _ in range(2):
        scale, unused = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))
        opt = O.AdamW([{"params": [scale]}, {"params": [unused], "lr": 0.1}], lr=1e-2)
        runs.append((make_step(_Scale(scale), opt), opt))
    step = torch.compile(runs[0][0], backend=MixedPrecision(dtype="float32", codegen="eager"))
    for _ in range(5):
        x = torch.randn(6, 4)
        same(step(x), runs[1][0](x), "loss")
    same(runs[0][1].state_dict()["state"], runs[1][1].state_dict()["state"], "state")


class _Scale(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.breadth(5)
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
    steps, opts = [], []
    for model in (ours, theirs):
        opts.append(O.Muon(model.parameters(), lr=1e-2))
        steps.append(make_step(model, opts[-1]))
    step = torch.compile(steps[0], backend=MixedPrecision(dtype="float32", codegen="eager"))
    for index in range(20):
        if index in (0, 5):
            before = clone(dict(ours.named_parameters()))
            step(torch.full((6, 4), float("inf")))
            same(dict(ours.named_parameters()), before, "parameters", exact=True)
        x = torch.randn(6, 4)
        same(step(x), steps[1](x), "loss")
    agree(ours, theirs, *opts)
    relative([*ours.parameters(), *_tensors(opts[0])], [*theirs.parameters(), *_tensors(opts[1])])


@pytest.mark.breadth(8)
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


def test_an_overflow_of_one_parameter_alone_skips_all() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    opt = O.AdamW(weights, lr=0.1)

    @torch.compile(backend=MixedPrecision(dtype="float32", codegen="eager"))
    def step(slopes: Tensor) -> None:
        opt.zero_grad()
        (slopes[0] * weights[0] + slopes[1] * weights[1]).sum().backward()
        opt.step()

    step(torch.ones(2, 3))
    before = clone([weights, opt.state_dict()["state"]])
    for bad in (float("inf"), float("-inf"), float("nan")):
        slopes = torch.ones(2, 3)
        slopes[1, 2] = bad
        step(slopes)
        same([weights, opt.state_dict()["state"]], before, "state", exact=True)


@pytest.mark.breadth
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
        first, second = (
            O.AdamW(model.first.parameters(), lr=1e-2),
            O.SGD(model.last.parameters(), lr=0.1, momentum=0.9),
        )
        opts.append((first, second))

        def step(
            x: Tensor, model: Net = model, first: Optimizer = first, second: Optimizer = second
        ) -> Tensor:
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


def test_one_optimizer_steps_twice_in_a_step() -> None:
    torch.manual_seed(0)
    theirs = Net()
    ours = copy.deepcopy(theirs)
    opts = [O.AdamW(model.parameters(), lr=1e-2) for model in (ours, theirs)]
    inner = [make_step(model, opt) for model, opt in zip((ours, theirs), opts, strict=True)]
    twice = [lambda x, y, step=step: (step(x), step(y)) for step in inner]
    step = torch.compile(twice[0], backend=MixedPrecision(dtype="float32", codegen="eager"))
    for index in range(4):
        x, y = torch.randn(2, 6, 4)
        if index in (0, 2):  # the second half overflows: the whole step is skipped
            before = clone([dict(ours.named_parameters()), opts[0].state_dict()["state"]])
            step(x, y / 0)  # pyrefly: ignore[division-by-zero]
            after = [dict(ours.named_parameters()), opts[0].state_dict()["state"]]
            same(after[0], before[0], "parameters", exact=True)
            if index:
                same(after[1], before[1], "state", exact=True)
        same(step(x, y), twice[1](x, y), "losses")
    agree(ours, theirs, *opts)


def test_dampened_momentum_that_eager_left_at_minus_zero() -> None:
    ours, theirs, our_opt, their_opt, step, eager, _ = pair(CASES["sgd dampening"])
    x = torch.randn(6, 4)
    same(make_step(ours, our_opt)(x), eager(x), "loss")
    for opt in (our_opt, their_opt):
        for state in opt.state.values():
            state["momentum_buffer"].view(-1)[0] = -0.0
    for _ in range(3):
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)


# ---------------------------------------------------------------- optimizers of the user's own


class Lion(Optimizer):
    """Plain tensor maths, a step count that is a Python number, and a momentum that is rebound."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self) -> None:  # pyrefly: ignore[bad-override]
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
    """Keeps a count on itself."""

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


class OwnAdam(Optimizer):
    """As it is usually written: a Python step count, math.sqrt, p.data."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8})
        self.decay = 1.0

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["m"], state["v"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                state["step"] += 1
                grad = p.grad.data
                state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
                state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.data.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-size * self.decay)


class OwnSGD(Optimizer):
    """Assigns to p.data."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.data = p.data - group["lr"] * p.grad


class Halved(O.AdamW):
    """Torch's step, called from a step of its own."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.grad.mul_(0.5)
        return super().step(closure)


class Named(O.SGD):
    """Torch's step under another name."""


class Normed(Optimizer):
    """State that ``get`` defaults, read values as numbers, one norm over all gradients, no lr."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack(torch._foreach_norm([p.grad for p in params])).norm()
        for p in params:
            state = self.state[p]
            state["n"] = state.get("n", 0) + 1
            state["seen"] = state.get("seen", 0.0) + p.grad.norm().item()
            rate = min(0.9, (1 + state["n"]) / (10 + state["n"])) / (1 + state["seen"])
            p.sub_(p.grad / (norm + 1e-6) * rate)


@pytest.mark.breadth
@pytest.mark.parametrize("make", [OwnAdam, OwnSGD, Halved, Normed, lambda p: Named(p, lr=0.1, momentum=0.9)])
def test_optimizers_of_the_users_own(make: Make) -> None:
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(make)
    for index in range(22):
        if index in (0, 7):
            step(torch.full((6, 4), float("inf")))
        x = torch.randn(6, 4)
        if index < 20:
            same(step(x), eager(x), "loss")
        else:  # the user goes on without fxpass
            same(make_step(ours, our_opt)(x), eager(x), "loss")
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    for mine, other in zip(our_opt.state.values(), their_opt.state.values(), strict=True):
        same(_as_tensors(mine), _as_tensors(other), "state")
    assert len(mp.graphs) == 1


def _as_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: torch.as_tensor(value, dtype=torch.float64) for key, value in state.items()}


def test_an_attribute_that_changes_after_compiling() -> None:
    _, _, opt, _, step, _, _ = pair(OwnAdam)
    step(torch.randn(6, 4))
    opt.decay = 0.5
    with pytest.raises(OptimizerError, match=r"self\.decay of OwnAdam changed"):
        step(torch.randn(6, 4))


class Branching(Lion):
    """Reads a value to decide what to do."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad.norm() > 1:
                p.sub_(p.grad)


class Flagging(Lion):
    """A flag in the state turns after the first step."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * (2 if self.state[p].get("first", True) else 1))
            self.state[p]["first"] = not self.state[p].get("first", True)


class Grouping(Lion):
    """Counts in its param group."""

    def step(self) -> None:
        self.param_groups[0]["n"] = self.param_groups[0].get("n", 0) + 1
        super().step()


class Idle(Lion):
    """Reads no gradient."""

    def step(self) -> None:
        self.param_groups[0]["n"] = self.param_groups[0].get("n", 0) + 1


class Listing(Lion):
    """Grows a list of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.log: list[int] = []

    def step(self) -> None:
        self.log.append(1)


class Tallying(Lion):
    """Counts in an object of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.tally = SimpleNamespace(inner=Tally())

    def step(self) -> None:
        self.tally.inner.count += 1
        super().step()


class Tally:
    count = 0


class Starting(Lion):
    """Counts its first step when it makes the state."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if "n" in state:
                state["n"] += 1
            else:
                state["n"] = 1
            p.sub_(p.grad / state["n"])


class Wrapping(Optimizer):
    """Leaves the step to another optimizer."""

    def __init__(self, params: Any) -> None:
        self.inner = O.SGD(params, lr=0.1)
        super().__init__(self.inner.param_groups, {})

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        self.inner.step()


class Sharing(Lion):
    """Keeps state that belongs to no parameter."""

    def step(self) -> None:
        self.state["all"]["n"] = 1  # pyrefly: ignore[bad-index]


class Peeking(Lion):
    """Reads another parameter of its group."""

    def step(self) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                neighbour = group["params"][i - 1 if i else 1]
                p.sub_(p.grad * neighbour.abs().max())


FUSED: dict[str, Make] = {
    "Adam": lambda p: O.Adam(p, lr=1e-2, fused=True),
    "AdamW, amsgrad": lambda p: O.AdamW(p, lr=1e-2, amsgrad=True, fused=True),
    "SGD, momentum": lambda p: O.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "Adagrad": lambda p: O.Adagrad(p, lr=1e-2, fused=True),
    "AdamW, foreach": lambda p: O.AdamW(p, lr=1e-2, foreach=True),
    "NAdam, foreach": lambda p: O.NAdam(p, lr=1e-2, foreach=True),
}


@pytest.mark.breadth
@pytest.mark.parametrize(("name", "codegen"), [*((name, "eager") for name in FUSED), ("Adam", "inductor")])
def test_fused_and_foreach_updates_are_those_of_the_formula(name: str, codegen: str) -> None:
    ours, theirs, opt, their_opt, step, eager, mp = pair(FUSED[name], codegen=codegen)
    for _ in range(3):
        x = torch.randn(6, 4)
        step(x)
        eager(x)
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    same(opt.state_dict()["state"], their_opt.state_dict()["state"], "state")
    assert mp.stats().steps == 3


@pytest.mark.breadth
@pytest.mark.parametrize("make", [Counting, Greedy, Branching, Grouping, Starting])
def test_counts_branches_and_first_steps(make: Make) -> None:
    ours, theirs, opt, their_opt, step, eager, mp = pair(make)
    for _ in range(5):
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    agree(ours, theirs, opt, their_opt)
    assert float(getattr(opt, "calls", 0)) == getattr(their_opt, "calls", 0)
    assert float(opt.param_groups[0].get("n", 0)) == their_opt.param_groups[0].get("n", 0)
    assert mp.stats().steps == 5


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Flagging, r"changes state\['first'\]"),
        (Listing, r"changes self\.log"),
        (Tallying, r"changes self\.tally"),
        (Idle, r"Idle\.step\(\) reads no gradient"),
        (Wrapping, r"holds another SGD in self\.inner"),
        (Sharing, "keeps state under 'all'"),
        (Peeking, r"failed where it was tried on one parameter alone.*test_optimizers\.py:\d+: .*neighbour"),
        (lambda p: O.AdamW(p, differentiable=True), "differentiable=True"),
        (lambda p: O.LBFGS(p), "LBFGS"),
        (lambda p: O.SparseAdam(p), "SparseAdam"),
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
    assert "While executing" not in str(error.value)
    assert not getattr(opt, "log", [])
    assert not opt.tally.inner.count if isinstance(opt, Tallying) else True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    opt = O.AdamW([weight])

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def step(x: Tensor) -> None:
        opt.zero_grad()
        (weight * x).abs().sum().float().backward()
        opt.step()

    weight.grad = torch.ones_like(weight)
    with pytest.raises(OptimizerError, match=r"complex|torch\.b?float16") as error:
        step(torch.ones(3))
    assert "test_optimizers.py:" in str(error.value)
    assert not opt.state
    same([weight, weight.grad], [torch.ones_like(weight)] * 2, "parameter", exact=True)


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


class Averaging(Lion):
    """Like ASGD: an average weighted by what another write of the update replaces, a count nobody reads."""

    @torch.no_grad()
    def step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            if not state:
                state["calls"] = torch.zeros(())
                state["weight"], state["lag"] = torch.ones(()), torch.zeros(())
                state["mean"] = torch.zeros_like(p)
            p.sub_(0.1 * (p.grad + state["lag"]))
            state["mean"].add_((p - state["mean"]) * state["weight"])
            state["lag"].copy_(0.01 * state["weight"])
            state["weight"].copy_(1 / (1 / state["weight"] + 1))
            state["calls"] += 1


class Odd(nn.Module):
    """Weights of one shape, of a shape of their own, and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 2)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(3))
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = torch.tanh(layer(x)) * scale
        return self.last(x) * self.scales[0] * self.one


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["step", "tensor"])
@pytest.mark.parametrize("make", [Averaging, lambda p: O.ASGD(p, lr=0.1, t0=1, lambd=0.1)])
def test_state_that_another_write_replaces_is_read_before(make: Make, skip: str) -> None:
    torch.manual_seed(0)
    theirs = Odd()
    ours = copy.deepcopy(theirs)
    opts = [make(model.parameters()) for model in (ours, theirs)]
    mp = MixedPrecision(dtype="float32", skip=skip)
    step = torch.compile(make_step(ours, opts[0]), backend=mp)
    for index in range(5):
        if index == 2:
            step(torch.full((6, 4), float("inf")))
        x = torch.randn(6, 4)
        same(step(x), make_step(theirs, opts[1])(x), "loss")
    agree(ours, theirs, *opts)
    assert mp.stats().steps == 6


@pytest.mark.breadth
@pytest.mark.parametrize("kind", [O.Rprop, O.RMSprop, O.Adadelta, O.ASGD, O.Adam])
def test_a_step_count_follows_its_own_parameter(kind: Any) -> None:
    """With skip="tensor" another parameter's overflow holds it back no more than the parameter itself."""
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    opt = kind(weights)
    mp = MixedPrecision(dtype="float32", codegen="eager", skip="tensor")

    @torch.compile(backend=mp)
    def step(slopes: Tensor) -> None:
        opt.zero_grad()
        (slopes[0] * weights[0] + slopes[1] * weights[1]).sum().backward()
        opt.step()

    for bad in (1.0, float("inf"), 1.0, float("nan")):
        step(torch.tensor([[1.0, 1.0, 1.0], [1.0, bad, 1.0]]))
    assert [int(opt.state[w]["step"]) for w in weights] == [4, 2]
    assert mp.stats().steps == 4
