"""Eager PyTorch with what fxpass adds to a step: clip, verdict, exact skip, loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from tests.fuzz.built import Built, as_tensor


@dataclass
class Call:
    """What one call of the step left behind."""

    state: dict[str, Tensor]
    outputs: list[Tensor]
    skipped: bool
    grads: dict[str, Tensor]  # what `.grad` holds
    largest: float = 0.0  # magnitude of the gradients that the optimizers read
    huge: bool = False  # an input is more than float16 holds


@dataclass
class Run:
    """All calls of a program, and what there was before them."""

    start: dict[str, Tensor]
    calls: list[Call]
    autocast: bool = False


class Eager:
    """Runs a program's own step, with ``optimizer.step`` guarded.

    Args:
        options: the program's options for fxpass.
        verdicts: skip exactly these calls instead of looking at the gradients. Nothing is taken
            back then, and what the step itself writes to parameters stays.
    """

    def __init__(self, built: Built, options: Mapping[str, Any], verdicts: list[bool] | None = None) -> None:
        self.built = built
        self.options = options
        self.verdicts = verdicts
        self.calls = 0
        self.bad = False
        self.largest = 0.0
        self.partly = False  # some parameters of a call were stepped: which extras follow is not modelled
        self._coefficient: Tensor | None = None
        for number, optimizer in enumerate(built.optimizers):
            optimizer.step = self._guarded(number, optimizer)  # pyrefly: ignore[bad-assignment]

    def call(self, args: tuple[Any, ...]) -> Call:
        """One call of the step; on an overflow all it wrote from gradients gets its old value back."""
        built = self.built
        built.before(self.calls)
        self.bad, self.largest, self._coefficient = False, 0.0, None
        old = Saved(built)
        outputs = outputs_of(built.step(*args))
        if self.bad and self.options.get("skip") != "tensor" and self.verdicts is None:
            old.restore()  # an optimizer before the one that found it has stepped
        elif self.bad:
            old.restore_extras()
            self.partly |= self.options.get("skip") == "tensor"
        self.calls += 1
        grads = gradients(built) if self.options.get("grads") == "keep" else {}
        huge = any(bool((t.abs() > 6e4).any()) for t in args)
        unknown = tuple(f"extra {name} " for name in built.tainted) if self.partly else ()
        state = {name: value for name, value in built.snapshot().items() if not name.startswith(unknown)}
        return Call(state, outputs, self.bad, grads, self.largest, huge)

    def _guarded(self, number: int, optimizer: Optimizer) -> Callable[[], None]:
        plain = optimizer.step

        def step() -> None:
            params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            finite = [bool(g.isfinite().all()) for g in grads]
            magnitudes = [float(g.abs().max()) if f else math.inf for g, f in zip(grads, finite, strict=True)]
            self.largest = max([self.largest, *magnitudes])
            if self.verdicts is not None:
                bad = self.verdicts[self.calls]
            else:
                bad = not all(finite)
            self.bad |= bad
            vars(optimizer)["_opt_called"] = True  # for schedulers
            if self.options.get("skip") == "tensor":
                self._apply(
                    number,
                    optimizer,
                    params,
                    [p if f else None for p, f in zip(params, finite, strict=True)],
                    plain,
                )
            elif not bad:
                self._apply(number, optimizer, params, params, plain)

        return step

    def _apply(
        self, number: int, optimizer: Optimizer, params: list[Any], stepped: list[Any], plain: Any
    ) -> None:
        """Step with clipped gradients, and put the gradients back as they were."""
        own = [p.grad for p in params]
        for param, kept in zip(params, stepped, strict=True):
            param.grad = None if kept is None else param.grad.clone()
        if any(kept is not None for kept in stepped):
            self._clip(number, optimizer)
            plain()
        for param, grad in zip(params, own, strict=True):
            param.grad = grad

    def _clip(self, number: int, optimizer: Optimizer) -> None:
        options = self.options
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if (ratio := options.get("adaptive_clip")) is not None:
            for p in params:
                _clip_rows(p, ratio)
        if (value := options.get("clip_value")) is not None:
            nn.utils.clip_grad_value_(params, value)
        limit, kind = options.get("max_norm"), options.get("norm_type", 2.0)
        if limit is None:
            return
        per = options.get("clip_per", "global")
        if per == "parameter":
            sets = [[p] for p in params]
        elif per == "group":
            sets = [[p for p in g["params"] if p.grad is not None] for g in optimizer.param_groups]
        elif per == "global" and self.built.together:
            self._clip_together(params, limit, kind)
            return
        else:
            sets = [params]
        for chosen in sets:
            nn.utils.clip_grad_norm_(chosen, limit, kind)

    def _clip_together(self, params: list[nn.Parameter], limit: float, kind: float) -> None:
        if self._coefficient is None:
            every = [p for o in self.built.optimizers for g in o.param_groups for p in g["params"]]
            norm = nn.utils.get_total_norm([p.grad for p in every if p.grad is not None], kind)
            self._coefficient = (limit / (norm + 1e-6)).clamp(max=1.0)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(self._coefficient)


class Saved:
    """The values of all that a skipped step leaves alone."""

    def __init__(self, built: Built) -> None:
        params = [p for o in built.optimizers for g in o.param_groups for p in g["params"]]
        self.params = [(p, p.detach().clone()) for p in params]
        self.states = [(o, {p: dict(s) for p, s in _cloned(o).items()}) for o in built.optimizers]
        named = [built.extras[name] for name in built.tainted]
        tensors = [t for value in named for t in (value if isinstance(value, list) else [value])]
        self.extras = [(t, t.clone()) for t in tensors]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, old in self.params:
                tensor.copy_(old)
        for optimizer, states in self.states:
            optimizer.state.clear()
            optimizer.state.update(states)
        self.restore_extras()

    def restore_extras(self) -> None:
        with torch.no_grad():
            for tensor, old in self.extras:
                tensor.copy_(old)


def _cloned(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    copy = lambda v: v.clone() if isinstance(v, Tensor) else v  # noqa: E731
    return {p: {k: copy(v) for k, v in state.items()} for p, state in optimizer.state.items()}


def _clip_rows(param: nn.Parameter, ratio: float) -> None:
    """NFNets' adaptive clipping; see docs/clipping.md."""
    assert param.grad is not None
    dims = tuple(range(1, param.ndim)) or None
    norm = lambda t: torch.linalg.vector_norm(t, dim=dims, keepdim=dims is not None)  # noqa: E731
    limit = ratio * norm(param.detach()).clamp(min=1e-3)
    grad = norm(param.grad)
    param.grad.mul_(torch.where(grad > limit, limit / grad.clamp(min=1e-6), torch.ones(())))


def outputs_of(returned: Any) -> list[Tensor]:
    """Everything that the step returned, as tensors."""
    return [as_tensor(leaf) for leaf in tree_leaves(returned) if leaf is not None]


def gradients(built: Built) -> dict[str, Tensor]:
    """What is in ``.grad`` of the parameters that are trained."""
    params = [p for o in built.optimizers for g in o.param_groups for p in g["params"]]
    return {str(index): as_tensor(p.grad) for index, p in enumerate(params) if p.grad is not None}


def scales(skipped: list[bool], init: float, interval: int) -> list[float]:
    """torch.amp.GradScaler's scale after each call."""
    scale, tracker, found = init, 0, []
    for bad in skipped:
        if bad:
            scale, tracker = max(scale * 0.5, 1.0), 0
        else:
            tracker += 1
            if tracker == interval:  # ours stops below max_scale, GradScaler does not
                scale, tracker = scale * 2.0 if scale * 2.0 <= 2.0**24 else scale, 0
        found.append(scale)
    return found


def perturb(built: Built, relative: float, seed: int) -> None:
    """Move every parameter by noise of this size, to see how much of it the step makes."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in built.models:
            for p in model.parameters():
                p.mul_(1 + relative * torch.randn(p.shape, generator=draw))
                p.add_(
                    relative
                    * 1e-2
                    * p.norm()
                    / math.sqrt(max(p.numel(), 1))
                    * torch.randn(p.shape, generator=draw)
                )
