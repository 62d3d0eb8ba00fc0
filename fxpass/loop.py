"""A compiled step for training loops that are not functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .backend import MixedPrecision
from .errors import OptionError


class Step:
    """One call per batch; the update runs with every ``accumulate``-th. Made by ``step``."""

    def __init__(self, run: Callable[..., Tensor], accumulate: int, handle: MixedPrecision) -> None:
        self.handle = handle
        self._run = torch.compile(run, backend=handle)
        self._accumulate = accumulate
        self._held: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *batch: Any, **named: Any) -> Tensor | None:
        """Take one batch, as ``loss_fn`` wants it after the model.

        Returns the mean loss of the batches of an update, 0-d and detached; None while the batch waits.
        """
        self._held.append((batch, named))
        return self.flush() if len(self._held) == self._accumulate else None

    @property
    def waiting(self) -> int:
        """How many batches wait for their update."""
        return len(self._held)

    def flush(self) -> Tensor | None:
        """Update with the batches that wait, at the end of an epoch, say; None if there are none."""
        held, self._held = self._held, []
        return self._run(held) if held else None


def step(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    loss_fn: Callable[..., Tensor],
    *,
    accumulate: int = 1,
    **options: Any,
) -> Step:
    """A whole training step as a callable: forward, backward and update in one graph.

    Args:
        model: given to ``loss_fn`` first.
        optimizer: one, or several that step together.
        loss_fn: ``loss_fn(model, *batch, **named)`` returns the mean loss of one batch, 0-d.
        accumulate: batches for one update; their losses count as one mean. The gradients of all of them
            are summed in the graph.
        options: those of ``MixedPrecision``; ``fxpass.of`` gives the handle.

    Raises:
        OptionError: ``accumulate`` is no positive int, or an option is unknown.
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise OptionError(
            f"accumulate={accumulate!r}", hint="give how many batches one update takes: 1, 2, ..."
        )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)

    def run(batches: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Tensor:
        losses = []
        for batch, named in batches:
            loss = loss_fn(model, *batch, **named) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        for each in optimizers:
            each.step()
        for each in optimizers:
            each.zero_grad()
        return torch.stack(losses).sum()

    return Step(run, accumulate, MixedPrecision(**options))
