"""Generators and critics: two optimizers, losses that see each other, penalties on gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn
from torch.nn.utils.parametrizations import spectral_norm

from bench.programs.blocks import mlp
from bench.programs.program import CALLS, Training, program


def _adam(*models: nn.Module, lr: float = 2e-4) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for m in models for p in m.parameters()], lr=lr, betas=(0.5, 0.999))


def _data(width: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, width).tanh(), torch.randn(8, 4)) for _ in range(CALLS)]


@program("gans", "own, in the shape of pytorch/examples dcgan", quick=True)
def dcgan() -> Training:
    """Three backwards: real, fake (detached), generator."""
    g = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
        nn.Tanh(),
    )
    d = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4), nn.Sigmoid()
    )
    opt_g, opt_d, criterion = _adam(g), _adam(d), nn.BCELoss()

    def step(real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        d.zero_grad()
        label = torch.full((real.size(0),), 1.0)
        loss_real = criterion(d(real).view(-1), label)
        loss_real.backward()
        fake = g(noise)
        label.fill_(0.0)
        loss_fake = criterion(d(fake.detach()).view(-1), label)
        loss_fake.backward()
        opt_d.step()
        g.zero_grad()
        label.fill_(1.0)
        loss_g = criterion(d(fake).view(-1), label)
        loss_g.backward()
        opt_g.step()
        return loss_real + loss_fake, loss_g

    return Training(step, [(torch.rand(8, 1, 8, 8), torch.randn(8, 4, 1, 1)) for _ in range(CALLS)])


@program("gans", "own, in the shape of WGAN-GP", quick=True)
def wgan_gp() -> Training:
    """The penalty on the critic's gradient at points between, in a helper with create_graph."""
    g, d = mlp(4, 16, 8), mlp(8, 16, 1, act=nn.Tanh)
    opt_g, opt_d = _adam(g), _adam(d)

    def penalty(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        between = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        out = d(between)
        gradients = autograd.grad(
            outputs=out,
            inputs=between,
            grad_outputs=torch.ones_like(out),
            create_graph=True,
            retain_graph=True,
        )[0]
        return ((gradients.norm(2, dim=1) - 1) ** 2).mean()

    def step(real: Tensor, z: Tensor, alpha: Tensor) -> Tensor:
        opt_d.zero_grad()
        fake = g(z).detach()
        loss = -d(real).mean() + d(fake).mean() + 10 * penalty(real.data, fake.data, alpha)
        loss.backward()
        opt_d.step()
        opt_g.zero_grad()
        (-d(g(z)).mean()).backward()
        opt_g.step()
        return loss

    return Training(step, [(*pair, torch.rand(8, 1)) for pair in _data()])


@program("gans", "own, in the shape of StyleGAN's R1 penalty")
def r1_penalty() -> Training:
    """Softplus losses, the gradient at real images, a moving average of the generator."""
    g, d, average = mlp(4, 16, 8), mlp(8, 16, 1, act=nn.SiLU), mlp(4, 16, 8)
    opt_g, opt_d = _adam(g), _adam(d)

    def step(real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        real.requires_grad_()
        score = d(real)
        (grad,) = autograd.grad(score.sum(), real, create_graph=True)
        loss_d = (
            F.softplus(-score).mean() + F.softplus(d(g(z).detach())).mean() + 5 * grad.pow(2).sum(1).mean()
        )
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        loss_g = F.softplus(-d(g(z))).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), g.parameters(), strict=True):
                a.lerp_(p, 0.01)
        return loss_d, loss_g

    return Training(step, _data())


@program("gans", "own, in the shape of a clipped WGAN")
def wgan_clipped() -> Training:
    """The critic's weights clamped after its update, a generator step every other call."""
    g, d = mlp(4, 16, 8), mlp(8, 16, 1)
    opt_g, opt_d = torch.optim.RMSprop(g.parameters(), 5e-4), torch.optim.RMSprop(d.parameters(), 5e-4)

    def step(real: Tensor, z: Tensor, i: int) -> Tensor:
        opt_d.zero_grad()
        loss = F.softplus(d(g(z).detach())).mean() - d(real).mean()
        loss.backward()
        opt_d.step()
        for p in d.parameters():
            p.data.clamp_(-0.1, 0.1)
        if i % 2 == 1:
            opt_g.zero_grad()
            (-d(g(z)).mean()).backward()
            opt_g.step()
        return loss

    return Training(step, [(*pair, i) for i, pair in enumerate(_data())])


@program("gans", "own, in the shape of CycleGAN", quick=True)
def cycle_gan() -> Training:
    """Two generators in one optimizer, two critics switched off for it, identity and cycle losses."""
    a2b, b2a, da, db = mlp(8, 16, 8), mlp(8, 16, 8), mlp(8, 16, 1), mlp(8, 16, 1)
    opt_g, opt_d = _adam(a2b, b2a), _adam(da, db)

    def set_requires_grad(nets: list[nn.Module], on: bool) -> None:
        for net in nets:
            for p in net.parameters():
                p.requires_grad = on

    def step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        fake_b, fake_a = a2b(a), b2a(b)
        set_requires_grad([da, db], False)
        opt_g.zero_grad()
        fool = lambda d, x: F.mse_loss(d(x), torch.ones(8, 1))  # noqa: E731
        loss_g = fool(db, fake_b) + fool(da, fake_a)
        loss_g = loss_g + 10 * (F.l1_loss(b2a(fake_b), a) + F.l1_loss(a2b(fake_a), b))
        loss_g = loss_g + 5 * (F.l1_loss(b2a(a), a) + F.l1_loss(a2b(b), b))
        loss_g.backward()
        opt_g.step()
        set_requires_grad([da, db], True)
        opt_d.zero_grad()
        loss_d = torch.zeros(())
        for d, real, fake in ((da, a, fake_a), (db, b, fake_b)):
            one = 0.5 * (
                F.mse_loss(d(real), torch.ones(8, 1)) + F.mse_loss(d(fake.detach()), torch.zeros(8, 1))
            )
            one.backward()
            loss_d = loss_d + one.detach()
        opt_d.step()
        return loss_g, loss_d

    return Training(step, [(torch.randn(8, 8), torch.randn(8, 8)) for _ in range(CALLS)])


@program("gans", "own, in the shape of SNGAN")
def spectral_gan() -> Training:
    """Spectral normalisation of the critic, hinge losses, two critic steps a call."""
    g = mlp(4, 16, 8)
    d = nn.Sequential(spectral_norm(nn.Linear(8, 16)), nn.LeakyReLU(0.1), spectral_norm(nn.Linear(16, 1)))
    opt_g, opt_d = _adam(g), _adam(d)

    def step(real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            opt_d.zero_grad()
            loss_d = F.relu(1.0 - d(real)).mean() + F.relu(1.0 + d(g(z).detach())).mean()
            loss_d.backward()
            opt_d.step()
        opt_g.zero_grad()
        loss_g = 2.0 - d(g(z)).mean()
        loss_g.backward()
        opt_g.step()
        return loss_d, loss_g

    return Training(step, _data())


@program("gans", "own, in the shape of pix2pix")
def pix2pix() -> Training:
    """A conditional critic on pairs, an L1 term; the critic's gradients from the generator are dropped."""
    g = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
        nn.Tanh(),
    )
    d = nn.Sequential(nn.Conv2d(2, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 1, 1))
    opt_g, opt_d, bce = _adam(g), _adam(d), nn.BCEWithLogitsLoss()

    def step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        fake = g(a)
        opt_d.zero_grad()
        out_fake, out_real = d(torch.cat([a, fake], 1).detach()), d(torch.cat([a, b], 1))
        loss_d = 0.5 * (bce(out_fake, torch.zeros_like(out_fake)) + bce(out_real, torch.ones_like(out_real)))
        loss_d.backward()
        opt_d.step()
        opt_g.zero_grad()
        out = d(torch.cat([a, fake], 1))
        loss_g = bce(out, torch.ones_like(out)) + 100.0 * F.l1_loss(fake, b)
        loss_g.backward()
        opt_g.step()
        return loss_d, loss_g

    return Training(step, [(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)) for _ in range(CALLS)])
