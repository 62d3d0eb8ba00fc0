"""Architectures of our own: experts, state spaces, graphs, segmentation, detection, point clouds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.blocks import Block, conv_net, mlp
from bench.programs.program import CALLS, Training, program
from bench.programs.transformers_table import ids


class Experts(nn.Module):
    """Tokens to their two best experts, each of which sees its own alone."""

    def __init__(self, width: int = 16, count: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(mlp(width, 32, width, act=nn.SiLU) for _ in range(count))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        flat = h.flatten(0, 1)
        shares = self.gate(flat).softmax(-1)
        weights, chosen = shares.topk(2, -1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        load = F.one_hot(chosen, shares.shape[-1]).sum(1).float().mean(0)
        return out.view_as(h), (load * shares.mean(0)).sum() * shares.shape[-1]


@program("layers", "own, in the shape of a mixture of experts", quick=True)
def mixture_of_experts() -> Training:
    """Rows chosen by data, a balancing loss."""
    words, experts, head = nn.Embedding(64, 16), Experts(), nn.Linear(16, 64)
    model = nn.ModuleList([words, experts, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        h = words(x)
        mixed, balance = experts(h)
        loss = F.cross_entropy(head(h + mixed).flatten(0, 1), y.flatten()) + 0.01 * balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(ids(), ids()) for _ in range(CALLS)])


class StateSpace(nn.Module):
    """A diagonal state space, run as a scan over time."""

    def __init__(self, width: int = 16, states: int = 4) -> None:
        super().__init__()
        self.into, self.rate, self.out = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.b, self.c = nn.Linear(width, states), nn.Linear(width, states)
        self.a_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.into(x).chunk(2, -1)
        delta, b, c = F.softplus(self.rate(x)), self.b(x), self.c(x)
        decay = torch.exp(-delta[..., None] * self.a_log.exp())
        state, out = torch.zeros_like(decay[:, 0]), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + (delta[:, i] * x[:, i])[..., None] * b[:, i, None]
            out.append((state * c[:, i, None]).sum(-1))
        return self.out(torch.stack(out, 1) * F.silu(gate))


@program("layers", "own, in the shape of Mamba")
def state_space() -> Training:
    """Tokens through a scan in Python."""
    words, body, head = nn.Embedding(64, 16), StateSpace(), nn.Linear(16, 64)
    model = nn.ModuleList([words, body, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))

    def step(x: Tensor, y: Tensor) -> Tensor:
        h = words(x)
        loss = F.cross_entropy(head(h + body(h)).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(step, [(ids(4, 6), ids(4, 6)) for _ in range(CALLS)])


class UNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))  # noqa: E731
        self.down1, self.down2, self.up1 = block(3, 8), block(8, 16), block(24, 8)
        self.grow, self.head = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(8, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        return self.head(self.up1(torch.cat([self.grow(b), a], 1)))


@program("layers", "own, in the shape of U-Net", quick=True)
def u_net() -> Training:
    """Cross entropy and Dice, RMSprop, gradients clipped by norm."""
    model = UNet()
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=1e-4, weight_decay=1e-8, momentum=0.9, foreach=True
    )

    def step(images: Tensor, masks: Tensor) -> Tensor:
        pred = model(images)
        p, t = F.softmax(pred, dim=1).float(), F.one_hot(masks, 3).permute(0, 3, 1, 2).float()
        inter, sets = 2 * (p * t).sum((-1, -2)), p.sum((-1, -2)) + t.sum((-1, -2))
        sets = torch.where(sets == 0, inter, sets)
        loss = F.cross_entropy(pred, masks) + 1 - ((inter + 1e-6) / (sets + 1e-6)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return Training(step, [(torch.rand(2, 3, 16, 16), torch.randint(3, (2, 16, 16))) for _ in range(CALLS)])


@program("layers", "own, in the shape of RetinaNet")
def focal_detector() -> Training:
    """Focal loss over all places, boxes where an object is."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 7, 3, 2, 1))
    optimizer = torch.optim.SGD(body.parameters(), lr=0.01, momentum=0.9)

    def step(x: Tensor, classes: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        out = body(x).flatten(2).transpose(1, 2)
        logits, found = out[..., :3], out[..., 3:]
        positive = classes > 0
        target = F.one_hot(classes, 4)[..., 1:].float()
        p, ce = logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        weight = (1 - (p * target + (1 - p) * (1 - target))) ** 2
        count = max(1, int(positive.sum()))
        loss_cls = (weight * ce).sum() / count
        loss_box = F.smooth_l1_loss(found[positive], boxes[positive], reduction="sum") / count
        losses = {"classes": loss_cls, "boxes": loss_box}
        total = loss_cls + loss_box
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return losses

    batch = lambda: (torch.rand(2, 3, 16, 16), torch.randint(4, (2, 16)), torch.rand(2, 16, 4))  # noqa: E731
    return Training(step, [batch() for _ in range(CALLS)])


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn, self.points = (
            mlp(3, 16, 9),
            nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU()),
        )
        self.head = mlp(16, 16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turn = self.turn(x.mean(2)).view(-1, 3, 3) + torch.eye(3)
        h = self.points(torch.bmm(turn, x))
        return F.log_softmax(self.head(h.max(2).values), dim=1), turn


@program("layers", "own, in the shape of PointNet", quick=True)
def point_net() -> Training:
    """A learned rotation kept orthogonal."""
    model = PointNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        out, turn = model(x)
        apart = torch.eye(3) - torch.bmm(turn, turn.transpose(1, 2))
        loss = F.nll_loss(out, y) + 0.001 * apart.norm(dim=(1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(8, 3, 12), torch.randint(4, (8,))) for _ in range(CALLS)])


@program("layers", "own, in the shape of a graph convolutional network", quick=True)
def graph_convolution() -> Training:
    """Edges by index_add, labels where a mask says so."""
    first, second = nn.Linear(8, 16), nn.Linear(16, 4)
    model = nn.ModuleList([first, second])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)

    def spread(h: Tensor, edges: Tensor) -> Tensor:
        degree = torch.zeros(len(h)).index_add_(0, edges[1], torch.ones(edges.shape[1])).clamp(min=1)
        return torch.zeros_like(h).index_add_(0, edges[1], h[edges[0]]) / degree[:, None]

    def step(x: Tensor, edges: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        model.train()
        optimizer.zero_grad()
        out = F.log_softmax(second(spread(F.relu(first(spread(x, edges))), edges)), dim=1)
        loss = F.nll_loss(out[mask], y[mask])
        loss.backward()
        optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        return torch.randn(12, 8), torch.randint(12, (2, 30)), torch.randint(4, (12,)), torch.rand(12) < 0.6

    return Training(step, [batch() for _ in range(CALLS)])


@program("layers", "own, in the shape of a masked autoencoder")
def masked_autoencoder() -> Training:
    """Patches kept and put back by gather."""
    into, places = nn.Linear(16, 32), nn.Parameter(torch.randn(1, 9, 32) * 0.02)
    token = nn.Parameter(torch.zeros(1, 1, 32))
    body, head = Block(32, causal=False), nn.Linear(32, 16)
    model = nn.ModuleList([into, body, head])
    optimizer = torch.optim.AdamW([*model.parameters(), places, token], lr=1e-3, betas=(0.9, 0.95))

    def step(patches: Tensor, noise: Tensor) -> Tensor:
        order = noise.argsort(1)
        back = order.argsort(1)
        h = into(patches) + places
        seen = h.gather(1, order[:, :4, None].expand(-1, -1, 32))
        h = torch.cat([body(seen), token.expand(len(h), 5, -1)], 1).gather(
            1, back[..., None].expand(-1, -1, 32)
        )
        mask = (back >= 4).float()
        loss = (((head(h + places) - patches) ** 2).mean(-1) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(4, 9, 16), torch.rand(4, 9)) for _ in range(CALLS)])


@program("layers", "own, in the shape of YOLO", quick=False)
def yolo() -> Training:
    """Three anchors, objects found by where(), a loss on the boxes' overlap."""
    net = nn.Sequential(conv_net(3, 3 * 4 * 7)[:-3], nn.Conv2d(16, 3 * 7, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def step(x: Tensor, obj: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        out = net(x).view(2, 3, 7, 4, 4).permute(0, 1, 3, 4, 2)
        b, a, i, j = torch.where(obj > 0.5)
        ps = out[b, a, i, j]
        low, high = ps[:, :2].sigmoid() * 0.5, 0.5 + ps[:, 2:4].sigmoid() * 0.5
        t = boxes[b, a, i, j]
        inter = (torch.min(high, t[:, 2:]) - torch.max(low, t[:, :2])).clamp(min=0).prod(1)
        union = (high - low).prod(1) + (t[:, 2:] - t[:, :2]).prod(1) - inter
        iou = inter / (union + 1e-7)
        tobj = torch.zeros_like(obj)
        tobj[b, a, i, j] = iou.detach().clamp(0).type(tobj.dtype)
        loss = (1 - iou).mean() + F.binary_cross_entropy_with_logits(out[..., 4], tobj)
        loss = loss + F.cross_entropy(ps[:, 5:], labels[b, a, i, j])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        shape = 2, 3, 4, 4
        corners = torch.cat([torch.rand(*shape, 2) * 0.4, 0.6 + torch.rand(*shape, 2) * 0.4], -1)
        return torch.rand(2, 3, 16, 16), (torch.rand(shape) < 0.2).float(), corners, torch.randint(2, shape)

    return Training(step, [batch() for _ in range(CALLS)])
