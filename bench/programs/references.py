"""A step run eagerly with torch.amp, without changing a line of it.

torch.amp asks for changes in the step: scale the loss, unscale before clipping, step through the scaler.
Here they are made from outside, with GradScaler's rules and numbers, so that any step can be run: gradients
of each backward are unscaled as they arrive, an optimizer with one that is not finite finds none, and the
scale moves after each call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Amp:
    """Autocast to ``dtype``; for float16 with a loss scale as GradScaler has it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.scale = 2.0**16 if dtype is torch.float16 else 1.0
        self.overflow, self.skipped = False, 0

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call of the step."""
        plain, self.overflow = torch.autograd.backward, False
        hook = register_optimizer_step_pre_hook(self._skip)
        # oneDNN has no float16 LSTM for every CPU
        native = torch.backends.mkldnn.flags(enabled=self.dtype is not torch.float16)
        torch.autograd.backward = self._scaled(plain)
        try:
            with torch.autocast("cpu", self.dtype), native:
                yield
        finally:
            torch.autograd.backward = plain
            hook.remove()
        self.scale *= 0.5 if self.overflow else 1.0
        self.skipped += self.overflow

    def _scaled(self, plain: Any) -> Any:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            unscale = lambda grad: grad / self.scale  # noqa: E731
            hooks = [leaf.register_hook(unscale) for leaf in _leaves(tensors)]
            try:
                plain([t.float() * self.scale for t in tensors], *args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()

        return backward

    def _skip(self, optimizer: Optimizer, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not all(p.grad.isfinite().all() for p in held):
            self.overflow = True
            for p in held:
                p.grad = None


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    """The leaves that a backward from ``tensors`` reaches."""
    seen, waiting, leaves = set(), [t.grad_fn for t in tensors], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves
