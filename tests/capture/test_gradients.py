"""Gradients by other roads than ``backward()``: scaled, checked, unscaled where an optimizer reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, hessian, jacrev, stack_module_state, vmap
from torch.nn.functional import mse_loss

from fxpass import CaptureError, MixedPrecision
from tests.support.gradients import (
    ALL,
    Form,
    Step,
    attacked,
    built,
    penalised,
    per_sample,
    perturbed,
    plain,
    smooth,
    standing,
)
from tests.support.helpers import EAGER, FP32, Mlp, batches, clone, compare, parameters, same

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")

each = pytest.mark.parametrize(("form", "model"), ALL, ids=[form.__name__ for form, _ in ALL])


@pytest.mark.breadth
@each
def test_as_eager_whatever_the_scale(form: Form, model: Any) -> None:
    # a scale without casts: were anything scaled and not unscaled again, it would show
    build = built(form, model)
    if form is not standing:
        compare(build, handle=MixedPrecision(**EAGER, loss_scale=1024.0))
        return
    eager, compiled = build(), build()
    compiled.models[0].load_state_dict(eager.models[0].state_dict())
    mp = MixedPrecision(**EAGER, loss_scale=1024.0)
    compiled.run(torch.compile(compiled.step, backend=mp))
    eager.run(eager.step)
    for (name, ours), (_, theirs) in zip(parameters(compiled), parameters(eager), strict=True):
        same(ours, theirs, name)
        same(ours.grad, theirs.grad, f"{name}.grad")
    assert mp.stats().steps == 3


@pytest.mark.breadth
@each
def test_float16_follows_float32(form: Form, model: Any) -> None:
    torch.manual_seed(0)
    eager = built(form, model)()
    start = clone(dict(eager.models[0].named_parameters()))
    eager.run(eager.step)
    torch.manual_seed(0)
    compiled = built(form, model)()
    mp = MixedPrecision(loss_scale=128.0, codegen="eager")
    compiled.run(torch.compile(compiled.step, backend=mp))
    moved = [
        torch.cat([(p - start[n]).flatten() for n, p in t.models[0].named_parameters()])
        for t in (eager, compiled)
    ]
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()
    assert (mp.stats().steps, mp.stats().skipped) == (3, 0)


@pytest.mark.breadth(2)
@pytest.mark.parametrize(("form", "model"), [(per_sample, Mlp), (penalised, smooth)])
def test_with_the_default_code_generator(form: Form, model: Any) -> None:
    compare(built(form, model), handle=MixedPrecision(**FP32, loss_scale=1024.0))


def test_an_ensemble_of_stacked_modules() -> None:
    base = Mlp()

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stacked, _ = stack_module_state([Mlp() for _ in range(3)])
            self.names = list(stacked)
            self.weights = nn.ParameterList([nn.Parameter(p.detach()) for p in stacked.values()])

        def forward(self, x: Tensor) -> Tensor:
            params = dict(zip(self.names, self.weights, strict=True))
            return vmap(lambda p, x: functional_call(base, p, (x,)), in_dims=(0, None))(params, x)

    def form(net: nn.Module, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            opt.step()
            return loss

        return step

    compare(built(form, Ensemble), handle=MixedPrecision(**EAGER, loss_scale=1024.0))


@pytest.mark.breadth(4)
@pytest.mark.parametrize("form", [plain, per_sample, attacked, perturbed])
def test_an_overflow_skips_the_step_exactly(form: Form) -> None:
    """Of the gradient of an attack too, which its sign would hide."""
    training = built(form)()
    before = clone(dict(training.models[0].named_parameters()))
    mp = MixedPrecision(loss_scale=2.0**24, codegen="eager")
    torch.compile(training.step, backend=mp)(*batches(1)[0])
    assert (mp.stats().steps, mp.stats().skipped) == (1, 1)
    same(dict(training.models[0].named_parameters()), before, "parameters", exact=True)


def test_flags_by_position() -> None:
    def form(net: nn.Module, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            out = net(x)
            (slope,) = grad(out.sum(), x, None, True, True)
            loss = mse_loss(out, y) + slope.square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        return step

    compare(built(form, smooth), handle=MixedPrecision(**EAGER, loss_scale=1024.0))


def test_gradients_reported_by_name() -> None:
    training = built(plain)()
    mp = MixedPrecision(**EAGER, loss_scale=1024.0)
    torch.compile(training.step, backend=mp)(*batches(1)[0])
    assert {row.name for row in mp.diagnosis()} == {n for n, _ in training.models[0].named_parameters()}


@pytest.mark.slow
def test_gradients_that_nobody_differentiates_have_low_precision_products() -> None:
    """What is differentiated again is computed in float32 instead, without a scale."""
    kinds = {}
    for form in (plain, penalised):
        mp = MixedPrecision(loss_scale=128.0, codegen="eager")
        training = built(form, smooth)()
        torch.compile(training.step, backend=mp)(*batches(1)[0])
        lines = [line for line in mp.graphs[0].after.splitlines() if " mm(" in line or "mm.default" in line]
        kinds[form] = {"f32" in line or "float32" in line for line in lines}
    assert kinds[penalised] != kinds[plain], kinds


# ---------------------------------------------------------------- what is refused


def refused(form: Form, *, model: Callable[[], nn.Module] = smooth) -> str:
    training = built(form, model)()
    before = clone(dict(training.models[0].named_parameters()))
    with pytest.raises(CaptureError) as error:
        torch.compile(training.step, backend=MixedPrecision(codegen="eager"))(*batches(1)[0])
    same(dict(training.models[0].named_parameters()), before, "parameters", exact=True)
    assert "test_gradients.py:" in str(error.value) or "HERE" in str(error.value)
    return str(error.value)


def test_updates_by_hand() -> None:
    def form(net: nn.Module, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> None:
            params = list(net.parameters())
            with torch.enable_grad():
                grads = grad(mse_loss(net(x), y), params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p.sub_(0.1 * g)  # HERE

        return step

    assert "by hand" in refused(form)
    compare(built(plain), handle=MixedPrecision(**EAGER))  # what the message advises


def curved(derivative: Callable[[Any], Any]) -> Form:
    def form(net: nn.Module, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            bent = vmap(derivative(lambda z: net(z)[0]))(x)
            (bent.diagonal(dim1=1, dim2=2).sum(-1) - y[:, 0]).square().mean().backward()
            opt.step()

        return step

    return form


@pytest.mark.slow
def test_a_gradient_through_hessian() -> None:
    assert "jacrev(torch.func.jacrev(f))" in refused(curved(hessian))
    compare(built(curved(lambda f: jacrev(jacrev(f))), smooth), handle=MixedPrecision(**EAGER))
