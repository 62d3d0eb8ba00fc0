"""Steps that differentiate twice, per sample, or by functions."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from bench.programs.blocks import conv_net, mlp
from bench.programs.program import CALLS, Training, program


@program("derivatives", "own, in the shape of MAML", quick=True)
def maml() -> Training:
    """Two inner steps by autograd.grad with create_graph, the outer loss at the adapted weights."""
    net = mlp(1, 24, 24, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for task in range(xs.shape[0]):
            fast = dict(net.named_parameters())
            for _ in range(2):
                inner = F.mse_loss(functional_call(net, fast, (xs[task],)), ys[task])
                grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
                fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            total = total + F.mse_loss(functional_call(net, fast, (xq[task],)), yq[task])
        loss = total / xs.shape[0]
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [tuple(torch.randn(2, 8, 1) for _ in range(4)) for _ in range(CALLS)])


@program("derivatives", "own, in the shape of Reptile")
def reptile() -> Training:
    """A copy trained for two steps, its difference as the gradient of the model."""
    net = mlp(1, 16, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)

    def step(x: Tensor, y: Tensor) -> Tensor:
        fast = dict(net.named_parameters())
        for _ in range(2):
            loss = F.mse_loss(functional_call(net, fast, (x,)), y)
            grads = torch.autograd.grad(loss, list(fast.values()))
            fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        optimizer.zero_grad()
        for n, p in net.named_parameters():
            p.grad = (p - fast[n]).detach()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(8, 1), torch.randn(8, 1)) for _ in range(CALLS)])


@program("derivatives", "own, in the shape of a physics-informed network", quick=True)
def pinn() -> Training:
    """Burgers' equation: first and second derivatives by the inputs."""
    net = mlp(2, 16, 16, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(x: Tensor, t: Tensor, x0: Tensor, u0: Tensor) -> Tensor:
        x.requires_grad_(True)
        t.requires_grad_(True)
        u = net(torch.cat([x, t], 1))
        ones = torch.ones_like(u)
        u_t = torch.autograd.grad(u, t, grad_outputs=ones, retain_graph=True, create_graph=True)[0]
        u_x = torch.autograd.grad(u, x, grad_outputs=ones, retain_graph=True, create_graph=True)[0]
        u_xx = torch.autograd.grad(
            u_x, x, grad_outputs=torch.ones_like(u_x), retain_graph=True, create_graph=True
        )[0]
        f = u_t + u * u_x - (0.01 / torch.pi) * u_xx
        loss = f.pow(2).mean() + F.mse_loss(net(torch.cat([x0, torch.zeros_like(x0)], 1)), u0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        x0 = torch.rand(8, 1) * 2 - 1
        return torch.rand(16, 1) * 2 - 1, torch.rand(16, 1), x0, -torch.sin(torch.pi * x0)

    return Training(step, [batch() for _ in range(CALLS)])


@program("derivatives", "own, in the shape of DP-SGD", quick=True)
def dp_sgd() -> Training:
    """Per-sample gradients by vmap, clipped one by one, summed into `.grad`."""
    net = mlp(6, 16, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def sample_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (x[None],)), y[None])

    def step(x: Tensor, y: Tensor) -> Tensor:
        params = {n: p.detach() for n, p in net.named_parameters()}
        grads = vmap(grad(sample_loss), in_dims=(None, 0, 0))(params, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factor = (1.0 / (norms + 1e-6)).clamp(max=1.0)
        optimizer.zero_grad()
        for n, p in net.named_parameters():
            p.grad = torch.einsum("i,i...->...", factor, grads[n]) / len(x)
        optimizer.step()
        with torch.no_grad():
            return F.cross_entropy(net(x), y)

    return Training(step, [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(CALLS)])


@program("derivatives", "own, in the shape of SAM", quick=True)
def sharpness_aware() -> Training:
    """Up the gradient, a second backward there, back down, then the update."""
    net = conv_net(3, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
            moves = [p.grad * (0.05 / (norm + 1e-12)) for p in net.parameters()]
            for p, e in zip(net.parameters(), moves, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p, e in zip(net.parameters(), moves, strict=True):
                p.sub_(e)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.randint(5, (8,))) for _ in range(CALLS)])


@program("derivatives", "own, in the shape of adversarial training (PGD)", quick=True)
def adversarial() -> Training:
    """Two ascent steps on the input by autograd.grad, training on what they found."""
    net = conv_net(1, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step(x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        net.eval()
        delta = start.clone().requires_grad_(True)
        for _ in range(2):
            loss = F.cross_entropy(net(x + delta), y)
            (g,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() + 0.02 * g.sign()).clamp(-0.05, 0.05).requires_grad_(True)
        net.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x + delta.detach()), y)
        loss.backward()
        optimizer.step()
        return loss

    batch = lambda: (torch.rand(8, 1, 12, 12), torch.randint(5, (8,)), torch.rand(8, 1, 12, 12) * 0.1 - 0.05)  # noqa: E731
    return Training(step, [batch() for _ in range(CALLS)])


@program("derivatives", "own, in the shape of elastic weight consolidation", quick=True)
def ewc() -> Training:
    """A quadratic pull to old weights, weighted by their Fisher information."""
    net = mlp(8, 16, 4)
    fisher = [torch.rand_like(p) for p in net.parameters()]
    old = [p.detach().clone() + 0.1 for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        penalty = sum(
            (f * (p - o).pow(2)).sum() for f, p, o in zip(fisher, net.parameters(), old, strict=True)
        )
        loss = F.cross_entropy(net(x), y) + 0.5 * penalty
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(8, 8), torch.randint(4, (8,))) for _ in range(CALLS)])


@program("derivatives", "own, in the shape of PyTorch's model ensembling tutorial")
def ensemble() -> Training:
    """Three models in one by stack_module_state and vmap."""
    nets = [mlp(6, 16, 3) for _ in range(3)]
    params, buffers = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    optimizer = torch.optim.Adam(list(params.values()), lr=1e-2)

    def call(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (p, b), (x,))

    def step(x: Tensor, y: Tensor) -> Tensor:
        out = vmap(call, in_dims=(0, 0, None))(params, buffers, x)
        loss = F.cross_entropy(out.flatten(0, 1), y.repeat(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(CALLS)])


@program("derivatives", "own, in the shape of sliced score matching")
def score_matching() -> Training:
    """Forward-mode products of the score's Jacobian with random directions."""
    net = mlp(4, 24, 4, act=nn.Softplus)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(x: Tensor, v: Tensor) -> Tensor:
        score, product = jvp(net, (x,), (v,))
        loss = ((v * product).sum(-1) + 0.5 * score.pow(2).sum(-1)).mean() + 10
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(16, 4), torch.randn(16, 4).sign()) for _ in range(CALLS)])
