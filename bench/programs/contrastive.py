"""Self-supervised and metric learning, distillation."""

from __future__ import annotations

import copy
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.blocks import conv_net, mlp
from bench.programs.program import CALLS, Training, program


def _views(rows: int = 8, side: int = 12) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for _ in range(CALLS):
        x = torch.rand(rows, 3, side, side)
        pairs.append((x, x + 0.1 * torch.randn_like(x)))
    return pairs


@program("contrastive", "own, in the shape of SimCLR")
def simclr() -> Training:
    """NT-Xent over both views, its own view masked out by boolean indexing."""
    model = nn.Sequential(conv_net(3, 16), nn.ReLU(), nn.Linear(16, 16))
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

    def info_nce(features: Tensor) -> tuple[Tensor, Tensor]:
        n = features.shape[0] // 2
        labels = torch.cat([torch.arange(n) for _ in range(2)])
        labels = (labels[None] == labels[:, None]).float()
        features = F.normalize(features, dim=1)
        similarity = features @ features.T
        mask = torch.eye(labels.shape[0], dtype=torch.bool)
        labels = labels[~mask].view(labels.shape[0], -1)
        similarity = similarity[~mask].view(similarity.shape[0], -1)
        positives = similarity[labels.bool()].view(labels.shape[0], -1)
        negatives = similarity[~labels.bool()].view(similarity.shape[0], -1)
        logits = torch.cat([positives, negatives], dim=1)
        return logits / 0.07, torch.zeros(logits.shape[0], dtype=torch.long)

    def step(a: Tensor, b: Tensor) -> Tensor:
        logits, labels = info_nce(model(torch.cat([a, b])))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    return Training(step, _views())


class MoCo(nn.Module):
    """A momentum encoder and a queue of keys with its pointer as buffers."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder_q = conv_net(3, 16)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        for p in self.encoder_k.parameters():
            p.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(16, 32), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _update(self, keys: Tensor) -> None:
        ptr = int(self.queue_ptr)
        self.queue[:, ptr : ptr + keys.shape[0]] = keys.T
        self.queue_ptr[0] = (ptr + keys.shape[0]) % 32

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        q = F.normalize(self.encoder_q(a), dim=1)
        with torch.no_grad():
            for k, p in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
                k.data = k.data * 0.99 + p.data * 0.01
            key = F.normalize(self.encoder_k(b), dim=1)
        positive = torch.einsum("nc,nc->n", [q, key]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        self._update(key)
        return torch.cat([positive, negative], dim=1) / 0.2


@program("contrastive", "own, in the shape of MoCo")
def moco() -> Training:
    """The pointer is read from its buffer with int(), the queue written at it."""
    model = MoCo()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9)

    def step(a: Tensor, b: Tensor) -> Tensor:
        logits = model(a, b)
        loss = F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, _views())


@program("contrastive", "own, in the shape of BYOL", quick=True)
def byol() -> Training:
    """Predictor and target network; the target follows after the update."""
    online, predictor = conv_net(3, 16), mlp(16, 16, 16)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(chain(online.parameters(), predictor.parameters()), lr=1e-3)

    def regression(x: Tensor, y: Tensor) -> Tensor:
        return 2 - 2 * (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1)

    def step(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            ta, tb = target(a), target(b)
        loss = (regression(predictor(online(a)), tb) + regression(predictor(online(b)), ta)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for t, p in zip(target.parameters(), online.parameters(), strict=True):
                t.mul_(0.99).add_(p, alpha=0.01)
        return loss

    return Training(step, _views())


@program("contrastive", "own, in the shape of SimSiam")
def simsiam() -> Training:
    """Stop-gradient, two learning rates."""
    encoder, predictor = nn.Sequential(conv_net(3, 16), nn.BatchNorm1d(16, affine=False)), mlp(16, 8, 16)
    groups = [{"params": encoder.parameters()}, {"params": predictor.parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)

    def step(a: Tensor, b: Tensor) -> Tensor:
        z1, z2 = encoder(a), encoder(b)
        p1, p2 = predictor(z1), predictor(z2)
        loss = (
            1
            - (F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean())
            * 0.5
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, _views())


@program("contrastive", "own, in the shape of Barlow Twins")
def barlow_twins() -> Training:
    """Cross-correlation of normalised embeddings, its off-diagonal by strides."""
    model, norm = conv_net(3, 16), nn.BatchNorm1d(16, affine=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def off_diagonal(x: Tensor) -> Tensor:
        n = x.shape[0]
        return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()

    def step(a: Tensor, b: Tensor) -> Tensor:
        c = norm(model(a)).T @ norm(model(b))
        c.div_(a.shape[0])
        loss = torch.diagonal(c).add_(-1).pow_(2).sum() + 0.005 * off_diagonal(c).pow_(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, _views())


@program("contrastive", "own, in the shape of VICReg")
def vicreg() -> Training:
    """Variance, invariance and covariance terms."""
    model = conv_net(3, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(a: Tensor, b: Tensor) -> Tensor:
        x, y = model(a), model(b)
        loss = 25 * F.mse_loss(x, y)
        for z in (x, y):
            z = z - z.mean(0)
            loss = loss + 12.5 * F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()
            cov = (z.T @ z) / (z.shape[0] - 1)
            loss = loss + (cov - torch.diag(torch.diag(cov))).pow(2).sum() / 16
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(step, _views())


@program("contrastive", "own, in the shape of DINO")
def dino() -> Training:
    """Student and teacher over crops of two sizes, a centre, gradients of the last layer dropped early on."""
    student = nn.Sequential(
        conv_net(3, 16), nn.GELU(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 24, bias=False))
    )
    teacher = nn.Sequential(conv_net(3, 16), nn.GELU(), nn.Linear(16, 24, bias=False)).requires_grad_(False)
    center = torch.zeros(1, 24)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    def step(large: list[Tensor], small: list[Tensor], epoch: int) -> Tensor:
        with torch.no_grad():
            goals = [((teacher(x) - center) / 0.04).softmax(-1) for x in large]
        outputs = [student(x) / 0.1 for x in large + small]
        total, terms = torch.zeros(()), 0
        for i, goal in enumerate(goals):
            for j, out in enumerate(outputs):
                if i != j:
                    total = total + torch.sum(-goal * F.log_softmax(out, dim=-1), dim=-1).mean()
                    terms += 1
        loss = total / terms
        optimizer.zero_grad()
        loss.backward()
        if epoch < 1:
            for n, p in student.named_parameters():
                if n.startswith("2."):
                    p.grad = None
        optimizer.step()
        with torch.no_grad():
            center.mul_(0.9).add_(torch.cat(goals).mean(0, keepdim=True), alpha=0.1)
            for s, t in zip(student[0].parameters(), teacher[0].parameters(), strict=True):
                t.data.mul_(0.99).add_((1 - 0.99) * s.detach().data)
        return loss

    crops = lambda n, side: [torch.rand(4, 3, side, side) for _ in range(n)]  # noqa: E731
    return Training(step, [(crops(2, 12), crops(2, 8), i // 4) for i in range(CALLS)])


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = conv_net(3, 16), nn.EmbeddingBag(40, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a, b = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return self.logit_scale.exp() * a @ b.t()


@program("contrastive", "own, in the shape of OpenCLIP", quick=True)
def clip() -> Training:
    """Both directions, a learned temperature that is clamped after the update."""
    model = Clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)

    def step(image: Tensor, text: Tensor) -> Tensor:
        logits = model(image, text)
        labels = torch.arange(logits.shape[0])
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss

    return Training(step, [(torch.rand(6, 3, 12, 12), torch.randint(40, (6, 5))) for _ in range(CALLS)])


@program("contrastive", "own, in the shape of supervised contrastive learning")
def supervised_contrastive() -> Training:
    """Positives by label, a loop over anchors left to masks."""
    model = conv_net(3, 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(model(x), dim=1)
        logits = z @ z.T / 0.1
        logits = logits - logits.max(1, keepdim=True).values.detach()
        others = ~torch.eye(len(y), dtype=torch.bool)
        positive = (y[:, None] == y[None]) & others
        log_prob = logits - torch.log((logits.exp() * others).sum(1, keepdim=True))
        per_anchor = (positive * log_prob).sum(1) / positive.sum(1).clamp(min=1)
        loss = -per_anchor[positive.any(1)].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.randint(3, (8,))) for _ in range(CALLS)])


@program("contrastive", "own, in the shape of hard-triplet mining")
def hard_triplets() -> Training:
    """Distances of all pairs, the hardest positive and negative of each anchor."""
    model = conv_net(3, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        d = torch.cdist(model(x), model(x))
        same = y[:, None] == y[None]
        hardest_positive = (d * same).max(1).values
        hardest_negative = (d + 1e3 * same).min(1).values
        loss = F.relu(hardest_positive - hardest_negative + 0.3).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.arange(8) % 2) for _ in range(CALLS)])


@program("contrastive", "own, in the shape of ArcFace")
def arcface() -> Training:
    """An angular margin on the true class, written into the logits."""
    body, weight = conv_net(3, 16), nn.Parameter(torch.randn(5, 16))
    optimizer = torch.optim.SGD([*body.parameters(), weight], 0.05, momentum=0.9, weight_decay=5e-4)

    def step(x: Tensor, y: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(body(x)), F.normalize(weight))
        sine = torch.sqrt((1.0 - cosine.pow(2)).clamp(1e-6, 1))
        phi = cosine * 0.8776 - sine * 0.4794
        phi = torch.where(cosine > -0.8776, phi, cosine - 0.2397)
        one_hot = torch.zeros(cosine.size())
        one_hot.scatter_(1, y.view(-1, 1).long(), 1)
        loss = F.cross_entropy((one_hot * phi + (1.0 - one_hot) * cosine) * 10.0, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.randint(5, (8,))) for _ in range(CALLS)])


@program("contrastive", "own, in the shape of knowledge distillation", quick=True)
def distillation() -> Training:
    """A frozen teacher in eval mode, temperature, hard and soft losses, features."""
    teacher, student = conv_net(3, 10, 16).eval(), conv_net(3, 10, 8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            soft = teacher(x)
        out = student(x)
        t = 4.0
        kd = (
            F.kl_div(F.log_softmax(out / t, dim=1), F.softmax(soft / t, dim=1), reduction="batchmean") * t * t
        )
        loss = 0.5 * kd + 0.5 * F.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.randint(10, (8,))) for _ in range(CALLS)])


@program("contrastive", "pytorch-metric-learning")
def metric_learning() -> Training:
    """A miner's hard pairs to a triplet loss."""
    from pytorch_metric_learning import losses

    model, loss_func = conv_net(3, 16), losses.NTXentLoss(temperature=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(data: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_func(model(data), labels)
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.randint(3, (8,))) for _ in range(CALLS)])
