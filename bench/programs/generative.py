"""Diffusion, flows, energy models and codebooks of our own, and packages for them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.blocks import mlp
from bench.programs.program import CALLS, Training, program


def _points(rows: int = 16, width: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, width), torch.randn(rows, width)) for _ in range(CALLS)]


@program("generative", "own, in the shape of DDPM", quick=True)
def ddpm() -> Training:
    """Noise predicted at random times, a moving average of the weights."""
    net, average = mlp(5, 32, 4, act=nn.SiLU), mlp(5, 32, 4, act=nn.SiLU)
    average.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100), 0)

    def step(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        loss = F.mse_loss(net(torch.cat([noisy, t[:, None] / 100], 1)), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for e, p in zip(average.parameters(), net.parameters(), strict=True):
                e.mul_(0.995).add_(p.data, alpha=0.005)
        return loss

    return Training(step, [(*pair, torch.randint(100, (16,))) for pair in _points()])


@program("generative", "own, in the shape of flow matching")
def flow_matching() -> Training:
    """Straight paths from noise to data, a weight of the moving average that counts."""
    net = mlp(5, 32, 4, act=nn.SiLU)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        loss = F.mse_loss(net(torch.cat([t * x1 + (1 - t) * x0, t], 1)), x1 - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        return loss

    return Training(step, [(*pair, torch.rand(16, 1)) for pair in _points()])


class Coupling(nn.Module):
    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip, self.net = flip, mlp(2, 16, 4, act=nn.Tanh)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        a, b = (b, a) if self.flip else (a, b)
        s, t = self.net(a).chunk(2, 1)
        s = torch.tanh(s)
        b = b * s.exp() + t
        return torch.cat([b, a] if self.flip else [a, b], 1), s.sum(1)


@program("generative", "own, in the shape of RealNVP")
def real_nvp() -> Training:
    """Likelihood through coupling layers."""
    flows = nn.ModuleList(Coupling(i % 2 == 1) for i in range(3))
    optimizer = torch.optim.Adam(flows.parameters(), lr=1e-3, weight_decay=1e-5)

    def step(x: Tensor, _: Tensor) -> Tensor:
        log_det = torch.zeros(len(x))
        for flow in flows:
            x, one = flow(x)
            log_det = log_det + one
        loss = (0.5 * (x**2).sum(1) + 2 * math.log(2 * math.pi) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, _points())


@program("generative", "nflows")
def masked_autoregressive_flow() -> Training:
    """The README's moons."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.permutations import ReversePermutation

    transforms = []
    for _ in range(2):
        transforms += [
            ReversePermutation(features=4),
            MaskedAffineAutoregressiveTransform(features=4, hidden_features=8),
        ]
    flow = Flow(CompositeTransform(transforms), StandardNormal(shape=[4]))
    optimizer = torch.optim.Adam(flow.parameters())

    def step(x: Tensor, _: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = -flow.log_prob(inputs=x).mean()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, _points())


class Codes(nn.Module):
    """Nearest codes, straight-through gradients, codebook and commitment losses."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.codes = mlp(16, 16, 8), mlp(8, 16, 16), nn.Embedding(12, 8)
        nn.init.uniform_(self.codes.weight, -0.5, 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.down(x)
        d = z.pow(2).sum(1, keepdim=True) + self.codes.weight.pow(2).sum(1) - 2 * z @ self.codes.weight.t()
        chosen = torch.argmin(d, dim=1).unsqueeze(1)
        one_hot = torch.zeros(chosen.shape[0], 12).scatter_(1, chosen, 1)
        q = one_hot @ self.codes.weight
        loss = F.mse_loss(q.detach(), z) * 0.25 + F.mse_loss(q, z.detach())
        share = one_hot.mean(0)
        perplexity = torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        return self.up(z + (q - z).detach()), loss, perplexity


@program("generative", "own, in the shape of VQ-VAE", quick=True)
def vq_vae() -> Training:
    """The reconstruction error over the data's variance; perplexities kept as floats."""
    model = Codes()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=False)
    perplexities: list[float] = []

    def step(x: Tensor, _: Tensor) -> Tensor:
        optimizer.zero_grad()
        recon, vq_loss, perplexity = model(x)
        loss = F.mse_loss(recon, x) + vq_loss
        loss.backward()
        optimizer.step()
        perplexities.append(perplexity.item())
        return loss

    return Training(step, _points(16, 16))


@program("generative", "vector-quantize-pytorch")
def vector_quantize() -> Training:
    """A codebook that follows its vectors by moving averages."""
    from vector_quantize_pytorch import VectorQuantize

    down, vq, up = (
        mlp(8, 16, 8),
        VectorQuantize(dim=8, codebook_size=12, decay=0.8, commitment_weight=1.0),
        mlp(8, 16, 8),
    )
    optimizer = torch.optim.AdamW([*down.parameters(), *up.parameters()], lr=1e-3)

    def step(x: Tensor, _: Tensor) -> Tensor:
        q, _, commit = vq(down(x)[None])
        loss = F.l1_loss(up(q[0]), x) + 10 * commit.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, _points(32, 8))


@program("generative", "own, in the shape of a contractive energy model")
def energy_model() -> Training:
    """Langevin steps on samples by autograd.grad of the energy, then contrastive divergence."""
    net = mlp(4, 24, 1, act=nn.SiLU)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.999))

    def step(real: Tensor, fake: Tensor) -> Tensor:
        for p in net.parameters():
            p.requires_grad = False
        fake = fake.detach().clone().requires_grad_(True)
        for _ in range(3):
            (g,) = torch.autograd.grad(net(fake).sum(), fake)
            fake = (fake.detach() - 0.1 * g.clamp(-0.3, 0.3)).requires_grad_(True)
        for p in net.parameters():
            p.requires_grad = True
        out_real, out_fake = net(real), net(fake.detach())
        loss = 0.1 * (out_real**2 + out_fake**2).mean() + F.softplus(out_real.mean() - out_fake.mean())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        return loss

    return Training(step, _points())


@program("generative", "own, in the shape of a neural ODE")
def neural_ode() -> Training:
    """Runge-Kutta through the network, the loss over the whole path."""
    net = mlp(2, 24, 2, act=nn.Tanh)
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-3)

    def rk4(y: Tensor, h: float) -> Tensor:
        k1 = net(y**3)
        k2 = net((y + h / 2 * k1) ** 3)
        k3 = net((y + h / 2 * k2) ** 3)
        k4 = net((y + h * k3) ** 3)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def step(y: Tensor, goal: Tensor) -> Tensor:
        path = [y]
        for _ in range(4):
            path.append(rk4(path[-1], 0.1))
        loss = (torch.stack(path) - goal).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(8, 2), torch.randn(5, 8, 2)) for _ in range(CALLS)])


@program("generative", "torchdiffeq")
def torchdiffeq_ode() -> Training:
    """odeint with a fixed grid, backward through its steps."""
    from torchdiffeq import odeint

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 24, 2, act=nn.Tanh)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(y**3)

    func, times = Field(), torch.linspace(0, 1, 5)
    optimizer = torch.optim.RMSprop(func.parameters(), lr=1e-3)

    def step(y0: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        path: Any = odeint(func, y0, times, method="rk4")
        loss = torch.mean(torch.abs(path - y))
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(8, 2), torch.randn(5, 8, 2)) for _ in range(CALLS)])


@program("generative", "own, in the shape of NeRF")
def nerf() -> Training:
    """Frequencies of positions, colours composed along rays."""
    net = mlp(3 + 3 * 2 * 4, 32, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)

    def encode(x: Tensor) -> Tensor:
        return torch.cat([x] + [f(2.0**i * x) for i in range(4) for f in (torch.sin, torch.cos)], -1)

    def step(origins: Tensor, directions: Tensor, target: Tensor) -> Tensor:
        depth = torch.linspace(0.5, 2, 8)
        raw = net(encode(origins[:, None] + directions[:, None] * depth[:, None]))
        gaps = torch.cat([depth[1:] - depth[:-1], torch.tensor([1e10])])
        alpha = 1 - torch.exp(-F.relu(raw[..., 3]) * gaps)
        through = torch.cumprod(torch.cat([torch.ones(len(alpha), 1), 1 - alpha + 1e-10], -1), -1)[:, :-1]
        colour = ((alpha * through)[..., None] * torch.sigmoid(raw[..., :3])).sum(1)
        loss = F.mse_loss(colour, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.99
        return loss

    return Training(
        step, [(torch.randn(8, 3), F.normalize(torch.randn(8, 3)), torch.rand(8, 3)) for _ in range(CALLS)]
    )
