"""Steps whose gradients come by other roads than ``loss.backward()``: forms for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, grad_and_value, jacrev, jvp, vmap
from torch.nn.functional import mse_loss

from tests.support.helpers import Mlp, Training

Step = Callable[..., Any]
Form = Callable[[nn.Module, Any], Step]


def smooth() -> nn.Module:
    """A model whose second derivatives are not zero."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def built(form: Form, model: Callable[[], nn.Module] = Mlp) -> Callable[[], Training]:
    def build() -> Training:
        net = model()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        return Training(form(net, opt), [net], [opt])

    return build


def give(net: nn.Module, grads: Any) -> None:
    for p, g in zip(net.parameters(), grads, strict=True):
        p.grad = g


# ---------------------------------------------------------------- first derivatives


def plain(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        give(net, grad(loss, list(net.parameters())))
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        opt.step()
        return loss

    return step


def by_name(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        out = net(x)
        named = dict(net.named_parameters())
        first = grad(outputs=mse_loss(out, y), inputs=list(named.values()), retain_graph=True)
        second = grad(out.square().mean(), list(named.values()))
        grads = {n: a + 0.5 * b for n, a, b in zip(named, first, second, strict=True)}
        for n, p in net.named_parameters():
            p.grad = grads[n]
        opt.step()
        return out

    return step


def unused(net: nn.Module, opt: Any) -> Step:
    idle = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [idle]})

    def step(x: Tensor, y: Tensor) -> None:
        params = [*net.parameters(), idle]
        loss = mse_loss(net(x), y)
        for p, g in zip(params, grad(loss, params, allow_unused=True), strict=True):
            p.grad = torch.zeros_like(p) if g is None else g
        opt.step()

    return step


def standing(net: nn.Module, opt: Any) -> Step:
    """Tensors in ``.grad`` that the step writes into: they stay there."""
    for p in net.parameters():
        p.grad = torch.zeros_like(p)

    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        for p, g in zip(net.parameters(), grad(loss, list(net.parameters())), strict=True):
            assert p.grad is not None
            p.grad.copy_(g)
        opt.step()

    return step


def projected(net: nn.Module, opt: Any) -> Step:
    """PCGrad: what two losses ask for, without what they disagree on."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        params, out = list(net.parameters()), net(x)
        losses = mse_loss(out[:, 0], y[:, 0]), out[:, 1].square().mean()
        a, b = (torch.cat([g.flatten() for g in grad(loss, params, retain_graph=True)]) for loss in losses)
        common = torch.dot(a, b).clamp(max=0)
        both = a + b - common * (b / b.square().sum() + a / a.square().sum())
        give(
            net, (g.view_as(p) for g, p in zip(both.split([p.numel() for p in params]), params, strict=True))
        )
        opt.step()
        return out

    return step


def per_sample(net: nn.Module, opt: Any) -> Step:
    """DP-SGD."""

    def loss_of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_call(net, params, (x[None],)), y[None])

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        params: dict[str, Tensor] = dict(net.named_parameters())
        grads, losses = vmap(grad_and_value(loss_of), in_dims=(None, 0, 0))(params, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factors = (0.3 / (norms + 1e-6)).clamp(max=1.0)
        give(net, (torch.einsum("b,b...->...", factors, g) / len(x) for g in grads.values()))
        opt.step()
        return norms, losses

    return step


def forward_gradient(net: nn.Module, opt: Any) -> Step:
    """A directional derivative in place of a gradient: no backward at all."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        params = {n: p.detach() for n, p in net.named_parameters()}
        towards = {n: torch.ones_like(p) for n, p in params.items()}
        loss_of = lambda p: mse_loss(functional_call(net, p, (x,)), y)  # noqa: E731
        loss, slope = jvp(loss_of, (params,), (towards,))  # pyrefly: ignore[bad-unpacking]
        give(net, (slope * t for t in towards.values()))
        opt.step()
        return loss

    return step


def attacked(net: nn.Module, opt: Any) -> Step:
    """FGSM: the sign of a gradient with respect to the data, no optimizer's."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        shift = torch.zeros_like(x, requires_grad=True)
        (slope,) = grad(mse_loss(net(x + shift), y), shift)
        loss = mse_loss(net(x + 0.1 * slope.sign()), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    return step


def perturbed(net: nn.Module, opt: Any) -> Step:
    """SAM, both gradients by torch.autograd.grad."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        params = list(net.parameters())
        first = grad(mse_loss(net(x), y), params)
        norm = torch.stack([g.norm() for g in first]).norm()
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p.add_(g * (0.05 / norm))
        second = grad(mse_loss(net(x), y), params)
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p.sub_(g * (0.05 / norm))
        give(net, second)
        opt.step()
        return norm

    return step


# ---------------------------------------------------------------- second derivatives


def penalised(net: nn.Module, opt: Any) -> Step:
    """WGAN-GP, by keyword as most write it."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        shift = torch.zeros_like(x, requires_grad=True)
        out = net(x + shift)
        (slope,) = grad(outputs=out, inputs=shift, grad_outputs=torch.ones_like(out), create_graph=True)
        loss = mse_loss(out, y) + (slope.norm(dim=1) - 1).square().mean()
        give(net, grad(loss, list(net.parameters())))
        opt.step()
        return loss

    return step


def physics(net: nn.Module, opt: Any) -> Step:
    """PINN: a second derivative with respect to the data in the loss."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        shift = torch.zeros_like(x, requires_grad=True)
        u = net(x + shift)
        (first,) = grad(u[:, 0].sum(), shift, create_graph=True)
        (second,) = grad(first[:, 0].sum(), shift, create_graph=True)
        loss = (second[:, 0] - y[:, 0]).square().mean() + u.square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    return step


def inner_step(net: nn.Module, opt: Any) -> Step:
    """MAML."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        params: dict[str, Tensor] = dict(net.named_parameters())
        inner = mse_loss(functional_call(net, params, (x[:3],)), y[:3])
        grads = grad(inner, list(params.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        outer = mse_loss(functional_call(net, fast, (x[3:],)), y[3:])
        opt.zero_grad()
        outer.backward()
        opt.step()
        return outer

    return step


def twice_backward(net: nn.Module, opt: Any) -> Step:
    """``backward(create_graph=True)``, and a second one over the gradients it left."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(net(x), y)
        loss.backward(create_graph=True)
        size = sum(p.grad.square().sum() for p in net.parameters() if p.grad is not None)
        assert isinstance(size, Tensor)
        size.backward()
        opt.step()
        opt.zero_grad()
        return loss

    return step


def curvature(net: nn.Module, opt: Any) -> Step:
    """Gradients over the diagonal of their own derivative: an optimizer reads both kinds at once."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        params = list(net.parameters())
        loss = mse_loss(net(x), y)
        grads = grad(loss, params, create_graph=True)
        bent = grad(grads, params, grad_outputs=[torch.ones_like(p) for p in params])
        give(net, ((g / (b.abs() + 1.0)).detach() for g, b in zip(grads, bent, strict=True)))
        opt.step()
        return loss

    return step


def jacobian(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(net(x), y) + 0.1 * vmap(jacrev(net))(x).square().sum((1, 2)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    return step


FIRST = [
    *(plain, by_name, unused, standing, projected, per_sample, forward_gradient, attacked, perturbed),
    *(inner_step, twice_backward, curvature),
]
SECOND = [penalised, physics, jacobian]
ALL = [(form, Mlp) for form in FIRST] + [(form, smooth) for form in SECOND]
