"""What people do in a step: accumulate, log, schedule, average, stop early, checkpoint."""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from collections import defaultdict, deque
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.programs.blocks import Block, Gpt, conv_net, mlp
from bench.programs.program import CALLS, Training, program
from bench.programs.transformers_table import ids

log = logging.getLogger(__name__)


def _classes(rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 8), torch.randint(4, (rows,))) for _ in range(CALLS)]


@program("habits", "own, gradient accumulation", quick=True)
def accumulation() -> Training:
    """Four micro-batches of a list, losses divided, a linear warmup."""
    net = mlp(8, 24, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)

    def step(batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(())
        for x, y in batch:
            loss = F.cross_entropy(net(x), y) / len(batch)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return total

    return Training(step, [(_classes()[:4],) for _ in range(CALLS)])


@program("habits", "own, meters and logs", quick=True)
def meters() -> Training:
    """Accuracy, a smoothed loss, a history of a fixed length, log lines and a warning."""
    net = mlp(8, 24, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    history: dict[str, Any] = defaultdict(list)
    window: deque[float] = deque(maxlen=4)

    def step(x: Tensor, y: Tensor) -> dict[str, Any]:
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = (logits.argmax(1) == y).float().mean().item()
        window.append(loss.item())
        history["loss"].append(loss.item())
        log.info("loss %.4f, accuracy %.2f, mean %.4f", loss.item(), accuracy, sum(window) / len(window))
        if accuracy < 0:
            warnings.warn("no accuracy", stacklevel=2)
        return {"loss": loss}

    return Training(step, _classes())


@program("habits", "own, in the shape of DETR's engine")
def stops_at_nan() -> Training:
    """The loss is looked at before backward, and training ends where it is not finite."""
    net = mlp(8, 24, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(net(x), y)
        if not math.isfinite(loss.item()):
            print(f"Loss is {loss.item()}, stopping training")
            sys.exit(1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        return loss

    return Training(step, _classes())


@program("habits", "own, an exponential moving average and SWA")
def averages() -> Training:
    """A copy that follows, with a decay that warms up; cosine restarts."""
    net = conv_net(3, 4)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4)

    def step(x: Tensor, y: Tensor, i: int) -> Tensor:
        loss = F.cross_entropy(net(x), y, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        decay = min(0.99, (1 + i) / (10 + i))
        with torch.no_grad():
            for e, s in zip(ema.state_dict().values(), net.state_dict().values(), strict=True):
                if e.dtype.is_floating_point:
                    e.mul_(decay).add_(s.detach(), alpha=1 - decay)
                else:
                    e.copy_(s)
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.randint(4, (8,)), i) for i in range(CALLS)])


@program("habits", "own, mixup and label smoothing")
def mixup() -> Training:
    """Pairs of images by a permutation, both labels in the loss."""
    net = conv_net(3, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(x: Tensor, y: Tensor, order: Tensor, lam: float) -> Tensor:
        out = net(lam * x + (1 - lam) * x[order])
        loss = lam * criterion(out, y) + (1 - lam) * criterion(out, y[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    batch = lambda i: (torch.rand(8, 3, 12, 12), torch.randint(4, (8,)), torch.randperm(8), 0.5 + 0.05 * i)  # noqa: E731
    return Training(step, [batch(i) for i in range(CALLS)])


@program("habits", "own, activation checkpointing")
def checkpointed() -> Training:
    """Blocks run again in backward, as the user asks for."""
    words, blocks, head = nn.Embedding(64, 32), nn.ModuleList(Block(32) for _ in range(2)), nn.Linear(32, 64)
    model = nn.ModuleList([words, blocks, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        h = words(x)
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False)
        loss = F.cross_entropy(head(h).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(step, [(ids(), ids()) for _ in range(CALLS)])


@program("habits", "own, discriminative fine-tuning", quick=True)
def frozen_layers() -> Training:
    """A frozen body in eval mode, a head; rates by layer."""
    body, neck, head = conv_net(3, 16).eval(), nn.Linear(16, 16), nn.Linear(16, 4)
    for p in body.parameters():
        p.requires_grad = False
    groups = [{"params": neck.parameters(), "lr": 1e-3}, {"params": head.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.Adam(groups)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            features = body(x)
        loss = F.cross_entropy(head(F.relu(neck(features))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.rand(8, 3, 12, 12), torch.randint(4, (8,))) for _ in range(CALLS)])


@program("habits", "own, a loop for autocast and GradScaler, both switched off")
def disabled_scaler() -> Training:
    """nanoGPT's habit: a null context and scaler.scale() of a scaler that does nothing."""
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler, ctx = torch.amp.GradScaler("cpu", enabled=False), nullcontext()

    def step(x: Tensor, y: Tensor) -> Tensor:
        with ctx:
            _, loss = model(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return Training(step, [(ids(), ids()) for _ in range(CALLS)])


@program("habits", "own, losses weighted by learned uncertainty")
def multi_task() -> Training:
    """Two heads, one optimizer over three modules, parameters of the loss."""
    body, a, b = mlp(8, 16, 16), nn.Linear(16, 4), nn.Linear(16, 1)
    log_vars = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adamax([*body.parameters(), *a.parameters(), *b.parameters(), log_vars], lr=2e-3)

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = body(x)
        losses = torch.stack([F.cross_entropy(a(h), y), F.mse_loss(b(h).squeeze(1), y.float() / 4)])
        total = (torch.exp(-log_vars) * losses + log_vars).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return {"total": total, "first": losses[0], "second": losses[1]}

    return Training(step, _classes())


@program("habits", "own, an auxiliary loss from a forward hook")
def hooked_activations() -> Training:
    """Activations collected by hooks, their sparsity in the loss; gradients changed before the update."""
    net = mlp(8, 24, 24, 4)
    kept: list[Any] = []
    for layer in net:
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda module, inputs, out: kept.append(out))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> Tensor:
        kept.clear()
        loss = F.cross_entropy(net(x), y) + 0.01 * sum(h.abs().mean() for h in kept)
        optimizer.zero_grad()
        loss.backward()
        for p in net.parameters():
            if p.grad is not None:
                p.grad.add_(p.detach(), alpha=1e-3)
        optimizer.step()
        return loss

    return Training(step, _classes())


@program("habits", "own, a reduce-on-plateau loop", quick=True)
def plateau() -> Training:
    """The scheduler reads the loss as a number, after the update."""
    net = mlp(8, 24, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        value = loss.item()
        scheduler.step(value)
        return value

    return Training(step, _classes())


@program("habits", "own, shapes that change")
def changing_sizes() -> Training:
    """Texts of another length in each batch, a smaller batch at the end."""
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    sizes = [(4, 12), (4, 9), (4, 14), (3, 12), (4, 7), (2, 10), (4, 13), (3, 8)]
    return Training(step, [(ids(*size), ids(*size)) for size in sizes])


@program("habits", "own, a class with everything in it", quick=True)
def trainer_class() -> Training:
    """The step as a method that counts, keeps the best loss and calls other methods."""

    class Trainer:
        def __init__(self) -> None:
            self.net = mlp(8, 24, 4)
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
            self.global_step, self.best = 0, float("inf")
            self.logs: dict[str, Any] = {}

        def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            logits = self.net(batch["x"])
            return F.cross_entropy(logits, batch["y"]), logits

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            loss, _ = self.compute_loss(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.global_step += 1
            self.logs["loss"], self.logs["step"] = loss.detach(), self.global_step
            return loss

    trainer = Trainer()
    return Training(trainer.training_step, [({"x": x, "y": y},) for x, y in _classes()])


@program("habits", "accelerate", quick=True)
def accelerate_loop() -> Training:
    """The documented loop over micro-batches: prepare, accumulate, backward, clip."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    net = mlp(8, 24, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net, optimizer = accelerator.prepare(net, optimizer)

    def step(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        for x, y in batches:
            with accelerator.accumulate(net):
                loss = F.cross_entropy(net(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return loss

    return Training(step, [(_classes()[:2],) for _ in range(CALLS)])
