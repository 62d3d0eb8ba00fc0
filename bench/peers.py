"""The contenders: how people train in mixed precision today, and fxpass.

Every factory takes a float32 model and a Recipe and returns a Contender. All start from the same
weights, clip at the same norm and drop their gradients at the end of the step, so that a step
begins with nothing but what persists. Optimizers are the fastest stock kind each may use: fused
AdamW, except for the plain torch.amp loop (defaults) and ours (fused is what fxpass replaces).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

import fxpass

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What all contenders agree on."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float16
    max_norm: float = 1.0
    lr: float = 3e-4
    weight_decay: float = 0.1
    graphs: bool = False  # what is compiled is replayed as CUDA graphs

    def compile(self, model: nn.Module) -> Callable[..., Tensor]:
        """Return the model compiled by itself."""
        return torch.compile(model, options={"triton.cudagraphs": True} if self.graphs else None)  # pyrefly: ignore[no-matching-overload]

    def adamw(self, parameters: list[nn.Parameter], **options: Any) -> AdamW:
        """Return AdamW over the parameters."""
        return AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, **options)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a GradScaler, at work only for float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


@dataclass(frozen=True)
class Contender:
    """One training step, and the tensors that live from one step to the next."""

    step: Step
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compiled: bool
    scale: Callable[[], float]  # the loss scale now; each skipped step has halved it

    def persistent(self) -> Iterator[Tensor]:
        """Yield weights, buffers, masters, optimizer states, and gradients if any are left."""
        yield from self.model.buffers()
        masters = (p for group in self.optimizer.param_groups for p in group["params"])
        for p in (*self.model.parameters(), *masters):
            yield p
            if p.grad is not None:
                yield p.grad
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


Factory = Callable[[nn.Module, Recipe], Contender]


def eager_amp(model: nn.Module, recipe: Recipe) -> Contender:
    """Train as the torch.amp tutorial does: autocast, GradScaler, clip_grad_norm_, AdamW."""
    optimizer = recipe.adamw(list(model.parameters()))
    return _amp(model, model, optimizer, recipe)


def compiled_amp(model: nn.Module, recipe: Recipe) -> Contender:
    """Train as the torch.amp tutorial does, with the model compiled and AdamW fused."""
    optimizer = recipe.adamw(list(model.parameters()), fused=True)
    return _amp(recipe.compile(model), model, optimizer, recipe)


def torchao_8bit(model: nn.Module, recipe: Recipe) -> Contender:
    """Train as compiled_amp does, with torchao's AdamW, whose states have 8 bits."""
    from torchao.optim import AdamW8bit  # pyrefly: ignore[missing-import]

    optimizer = AdamW8bit(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return _amp(recipe.compile(model), model, optimizer, recipe)


def flashoptim(model: nn.Module, recipe: Recipe) -> Contender:
    """Train low-precision weights with FlashOptim's AdamW, which keeps what they lack and 8-bit states."""
    from flashoptim import FlashAdamW, cast_model  # pyrefly: ignore[missing-import]

    if recipe.dtype is torch.float16:
        raise NotImplementedError("GradScaler does not unscale float16 gradients")
    cast_model(model, dtype=recipe.dtype)
    optimizer = FlashAdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return _plain(recipe.compile(model), model, optimizer, recipe)


def compiled_fp32(model: nn.Module, recipe: Recipe) -> Contender:
    """Train in float32 with the model compiled and AdamW fused."""
    optimizer = recipe.adamw(list(model.parameters()), fused=True)
    return _plain(recipe.compile(model), model, optimizer, recipe)


def o2_keep(model: nn.Module, recipe: Recipe) -> Contender:
    """Train low-precision weights with fp32 masters; both gradients live at the update (20 bytes)."""
    return _o2(model, recipe, keep=True)


def o2_drop(model: nn.Module, recipe: Recipe) -> Contender:
    """Train as o2_keep, but free each gradient as its fp32 copy is born (18 bytes)."""
    return _o2(model, recipe, keep=False)


def ours(model: nn.Module, recipe: Recipe, **chosen: Any) -> Contender:
    """Train with an ordinary float32 step, compiled by fxpass with the options ``chosen``."""
    optimizer = recipe.adamw(list(model.parameters()))

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    options: dict[str, Any] = {"max_norm": recipe.max_norm, **chosen}
    if recipe.dtype is not torch.float16:
        options["dtype"] = recipe.dtype
    if recipe.graphs:
        options["inductor"] = {"triton.cudagraphs": True}
    backend = fxpass.MixedPrecision(**options)
    step = torch.compile(train_step, backend=backend)
    return Contender(step, model, optimizer, compiled=True, scale=lambda: float(backend.scale))


# What fxpass offers for memory. Without a global norm gradients need not wait for one another.
MODES: dict[str, dict[str, Any]] = {
    "fxpass": {},
    "fxpass release": {"release": True},
    "fxpass tensor": {"skip": "tensor", "max_norm": None},
    "fxpass budget": {"memory_budget": 0.3},
}

PEERS: dict[str, Factory] = {
    "eager-amp": eager_amp,
    "compiled-amp": compiled_amp,
    "compiled-fp32": compiled_fp32,
    "o2-keep": o2_keep,
    "o2-drop": o2_drop,
    "fxpass": ours,
}
BASELINE = "compiled-amp"
# where the package that each is named by is installed
OPTIONAL: dict[str, tuple[str, Factory]] = {
    "torchao-8bit": ("torchao", torchao_8bit),
    "flashoptim": ("flashoptim", flashoptim),
}


def _plain(
    forward: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> Contender:
    """A step without autocast and without a loss scale."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = forward(x, y)
        loss.backward()
        clip_grad_norm_(model.parameters(), recipe.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contender(step, model, optimizer, compiled=True, scale=lambda: 1.0)


def _amp(
    forward: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> Contender:
    scaler = recipe.scaler()

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(recipe.device.type, recipe.dtype):
            loss = forward(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), recipe.max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return Contender(step, model, optimizer, compiled=forward is not model, scale=scaler.get_scale)


def _o2(model: nn.Module, recipe: Recipe, *, keep: bool) -> Contender:
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model.to(recipe.dtype)
    weights = list(model.parameters())
    optimizer, scaler = recipe.adamw(masters, fused=True), recipe.scaler()

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        scaler.scale(loss).backward()
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            if not keep:
                weight.grad = None
        scaler.unscale_(optimizer)
        clip_grad_norm_(masters, recipe.max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.zero_grad()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        return loss.detach()

    return Contender(step, model, optimizer, compiled=False, scale=scaler.get_scale)
