"""Optimizers of others: numbers in param groups, branches on values, a first step unlike the later ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxpass import MixedPrecision, OptimizerError
from tests.support.helpers import Mlp, Training, clone, compare, same

Make = Callable[[list[Tensor]], Optimizer]


class Own(Optimizer):
    """One group, no closure."""

    start: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Any, lr: float = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **self.start, **settings})

    @torch.no_grad()
    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])

    def update(self, group: dict[str, Any], params: list[Any]) -> None:
        raise NotImplementedError


class Averaged(Own):
    """A weight in the group, in the manner of schedule-free; division by a sum that may be zero."""

    start: ClassVar = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "warmup": 3}

    def update(self, group: dict[str, Any], params: list[Any]) -> None:
        k = group["k"]
        rate = group["lr"] * ((k + 1) / group["warmup"] if k < group["warmup"] else 1.0)
        highest = group["lr_max"] = max(rate, group["lr_max"])
        weight = highest**2
        group["weight_sum"] += weight
        try:
            part = weight / group["weight_sum"]
        except ZeroDivisionError:
            part = 0
        for p in params:
            if "z" not in self.state[p]:
                self.state[p]["z"] = p.clone()
            p.lerp_(self.state[p]["z"], weight=part)
            self.state[p]["z"].sub_(p.grad, alpha=rate)
        k += 1  # a number of its own: the group's is written below
        group["k"] = k


class Absent(Own):
    """A count that the first step makes, as a tensor, in the manner of timm."""

    def update(self, group: dict[str, Any], params: list[Any]) -> None:
        if "step" in group:
            group["step"] += 1
        else:
            group["step"] = torch.tensor(1.0)
        for p in params:
            p.sub_(group["lr"] * p.grad / group["step"])


class Rectified(Own):
    """A branch per parameter on its step count, another on a value."""

    def update(self, group: dict[str, Any], params: list[Any]) -> None:
        for p in params:
            state = self.state[p]
            if len(state) == 0:
                state["step"], state["m"] = 0, torch.zeros_like(p)
            state["step"] += 1
            state["m"].lerp_(p.grad, 0.5)
            if state["step"] >= 3:
                p.sub_(state["m"] / (1 - 0.5 ** state["step"]), alpha=group["lr"])
            elif p.grad.norm() > 0.1:
                p.sub_(p.grad, alpha=group["lr"])


class Estimating(Own):
    """A step size estimated over all parameters, in the manner of Prodigy; a step that may end early."""

    start: ClassVar = {"d": 1e-3}

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        d = group["d"]
        total = 0.0
        for p in group["params"]:
            state = self.state[p]
            if "start" not in state:
                state["start"], state["s"] = p.detach().clone(), torch.zeros_like(p)
            state["s"].add_(p.grad, alpha=d)
            total += state["s"].abs().sum().item()
        if total == 0:
            return
        d *= 1.5  # a number: nothing but the name is changed
        group["d"] = min(d, max(group["d"], total))
        for p in group["params"]:
            p.sub_(p.grad, alpha=group["d"])


class FromGradient(Own):
    """State made from the first gradient, which the first step does not apply."""

    def update(self, group: dict[str, Any], params: list[Any]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["before"], state["n"] = p.grad.clone(), 1
                continue
            p.sub_(2 * p.grad - state["before"], alpha=group["lr"])
            state["before"].copy_(p.grad)
            state["n"] += 1


class Global(Own):
    """A global norm, and more conditions than can be followed at once if each parameter had its own."""

    def update(self, group: dict[str, Any], params: list[Any]) -> None:
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.sub_(p.grad / norm, alpha=group["lr"])
            if p.norm() > 1:
                p.mul_(0.9)


ALL: list[type[Own]] = [Averaged, Absent, Rectified, Estimating, FromGradient]


def built(make: Make, model: Callable[[], nn.Module] = Mlp) -> Callable[[], Training]:
    def build() -> Training:
        net = model()
        opt = make(list(net.parameters()))

        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            opt.step()
            return loss

        return Training(step, [net], [opt])

    return build


def numbers(opt: Optimizer) -> dict[str, float]:
    group = opt.param_groups[0]
    return {k: float(v) for k, v in group.items() if isinstance(v, (int, float, Tensor))}


@pytest.mark.breadth(5)
@pytest.mark.parametrize("codegen", ["inductor", "eager"])
@pytest.mark.parametrize("make", ALL, ids=lambda cls: cls.__name__)
def test_as_eager(make: Any, codegen: str) -> None:
    compare(built(make), handle=MixedPrecision(dtype="float32", loss_scale=None, codegen=codegen))


@pytest.mark.breadth(2)
@pytest.mark.parametrize("make", ALL, ids=lambda cls: cls.__name__)
def test_each_tensor_by_its_own_verdict(make: Any) -> None:
    handle = MixedPrecision(dtype="float32", loss_scale=1.0, codegen="eager", skip="tensor")
    compare(built(make), handle=handle)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Averaged, FromGradient], ids=lambda cls: cls.__name__)
def test_the_default_options(make: Any) -> None:
    torch.manual_seed(0)
    train, eager = built(make)(), built(make)()
    eager.models[0].load_state_dict(train.models[0].state_dict())
    start = clone(dict(eager.models[0].named_parameters()))
    mp = MixedPrecision(loss_scale=256.0)
    train.run(torch.compile(train.step, backend=mp))
    eager.run(eager.step)
    moved = [
        torch.cat([(p - start[n]).flatten() for n, p in t.models[0].named_parameters()])
        for t in (train, eager)
    ]
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm()
    assert (mp.stats().steps, mp.stats().skipped) == (len(train.calls), 0)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_division_by_a_sum_that_is_zero(rate: float) -> None:
    handle = MixedPrecision(dtype="float32", loss_scale=None, codegen="eager")
    compare(built(lambda p: Averaged(p, lr=rate)), handle=handle)


@pytest.mark.breadth(2)
@pytest.mark.parametrize("make", ALL, ids=lambda cls: cls.__name__)
def test_a_skipped_step_counts_nothing(make: Any) -> None:
    """Not even as the first step: what eager makes then is made by the next one."""
    torch.manual_seed(0)
    train, other = built(make)(), built(make)()
    other.models[0].load_state_dict(train.models[0].state_dict())
    mp = MixedPrecision(dtype="float32", loss_scale=1.0, codegen="eager")
    step = torch.compile(train.step, backend=mp)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    for bad in (True, False, False, True, False):
        before = clone([dict(train.models[0].named_parameters()), numbers(train.optimizers[0])])
        step(x * float("inf") if bad else x, y)
        if bad and mp.stats().steps > 1:
            now = [dict(train.models[0].named_parameters()), numbers(train.optimizers[0])]
            same(now, before, "skipped", exact=True)
        if not bad:
            other.step(x, y)
    same(dict(train.models[0].named_parameters()), dict(other.models[0].named_parameters()), "parameters")
    ours, theirs = numbers(train.optimizers[0]), numbers(other.optimizers[0])
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert (mp.stats().steps, mp.stats().skipped) == (5, 2)


@pytest.mark.breadth("first")
@pytest.mark.parametrize("make", ALL, ids=lambda cls: cls.__name__)
def test_a_checkpoint_of_eager_goes_on(make: Any) -> None:
    torch.manual_seed(0)
    eager, train = built(make)(), built(make)()
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    eager.step(x, y)
    eager.step(x, y)
    train.models[0].load_state_dict(eager.models[0].state_dict())
    train.optimizers[0].load_state_dict(copy.deepcopy(eager.optimizers[0].state_dict()))
    mp = MixedPrecision(dtype="float32", loss_scale=None, codegen="eager")
    step = torch.compile(train.step, backend=mp)
    for size in (6, 6, 5, 3):
        same(step(x[:size], y[:size]), eager.step(x[:size], y[:size]), "loss")
    assert numbers(train.optimizers[0]) == pytest.approx(numbers(eager.optimizers[0]), rel=1e-6)
    assert mp.stats().steps == 4
    assert len(mp.graphs) <= 2, "numbers that count compile nothing anew"


def test_random_state_is_drawn_as_eager_draws_it() -> None:
    class Noisy(Own):
        def update(self, group: dict[str, Any], params: list[Any]) -> None:
            for p in params:
                if not self.state[p]:
                    self.state[p]["v"] = torch.randn_like(p)
                p.sub_(self.state[p]["v"] + p.grad, alpha=group["lr"])

    compare(built(Noisy), handle=MixedPrecision(dtype="float32", loss_scale=None, codegen="eager"))


def test_conditions_of_many_parameters_that_depend_on_each_other() -> None:
    class Deep(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 2))

    train = built(Global, Deep)()
    with pytest.raises(OptimizerError, match=r"branches on too many values(.|\n)*torch\.where"):
        torch.compile(train.step, backend=MixedPrecision(codegen="eager"))(
            torch.randn(6, 4), torch.randn(6, 2)
        )


def test_tensors_in_containers_of_the_state() -> None:
    class Listed(Own):
        def update(self, group: dict[str, Any], params: list[Any]) -> None:
            for p in params:
                self.state[p].setdefault("both", [torch.zeros_like(p), torch.zeros_like(p)])

    train = built(Listed)()
    with pytest.raises(OptimizerError, match=r"keeps tensors in a list, state\['both'\]"):
        torch.compile(train.step, backend=MixedPrecision(codegen="eager"))(
            torch.randn(6, 4), torch.randn(6, 2)
        )


def _lerp(param: Tensor, grad: Tensor, mean: Tensor, lr: float) -> None:
    param.sub_(mean.lerp_(grad, 0.1), alpha=lr)


class Compiling(Own):
    """Compiles what it does to one parameter, as torchao's optimizers do."""

    def update(self, group: dict[str, Any], params: list[Any]) -> None:
        one = torch.compile(_lerp, fullgraph=True, backend="eager")
        for p in params:
            state = self.state[p]
            if not state:
                state["mean"] = torch.zeros_like(p)
            one(p.detach(), p.grad, state["mean"], group["lr"])


def test_a_step_that_compiles_its_own_parts() -> None:
    compare(built(Compiling), handle=MixedPrecision(dtype="float32", codegen="eager"))


class Quantized(Tensor):
    """A class of its own, known for what an optimizer keeps in it."""


def test_a_state_in_tensors_of_their_own_class_is_refused_by_name() -> None:
    class Quantizing(Own):
        def update(self, group: dict[str, Any], params: list[Any]) -> None:
            for p in params:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p).as_subclass(Quantized)
                p.sub_(p.grad, alpha=group["lr"])

    train = built(Quantizing)()
    with pytest.raises(OptimizerError, match=r"Quantizing keeps state\['mean'\] in a Quantized(.|\n)*AdamW"):
        torch.compile(train.step, backend=MixedPrecision(codegen="eager"))(
            torch.randn(6, 4), torch.randn(6, 2)
        )
    compare(built(torch.optim.AdamW), handle=MixedPrecision(dtype="float32", codegen="eager"))
