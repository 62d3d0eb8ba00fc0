"""Weights of which each rank holds some rows: how they are split, and the operators that stand for messages.

``fxpass::gather_rows`` makes the whole of a part, ``fxpass::average_rows``, its derivative, a part of the
mean of gradients. No step executes them: the pass ``shard`` puts collectives in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """How the rows of a parameter are spread over the ranks of a process group, as DTensor's Shard(0)."""

    group: str  # name of the process group
    ranks: int
    rank: int  # of this process, in the group
    rows: int  # of the whole parameter
    whole: bool = False  # too few rows: every rank holds all of them

    @property
    def chunk(self) -> int:
        """Rows of every rank's part, but for the last ones."""
        return -(-self.rows // self.ranks)

    @property
    def start(self) -> int:
        """The first row of this rank's part."""
        return 0 if self.whole else self.rank * self.chunk

    @property
    def own(self) -> int:
        """Rows of this rank's part."""
        return self.rows if self.whole else min(self.chunk, self.rows - self.start)

    @property
    def even(self) -> bool:
        """Whether every rank gets a row."""
        return self.rows > 0 and (self.ranks - 1) * self.chunk < self.rows


@torch.library.custom_op("fxpass::gather_rows", mutates_args=())
def _gather(part: Tensor, group: str, ranks: int, rank: int, rows: int, name: str) -> Tensor:
    """The whole of parameter ``name``, of which every rank has a part."""
    raise NotImplementedError("the pass shard replaces it")


@_gather.register_fake
def _(part: Tensor, group: str, ranks: int, rank: int, rows: int, name: str) -> Tensor:
    return part.new_empty((rows, *part.shape[1:]))


@torch.library.custom_op("fxpass::average_rows", mutates_args=())
def _average(grad: Tensor, group: str, ranks: int, rank: int, own: int, name: str) -> Tensor:
    """This rank's rows of the mean over the ranks of parameter ``name``'s gradient."""
    raise NotImplementedError("the pass shard replaces it")


@_average.register_fake
def _(grad: Tensor, group: str, ranks: int, rank: int, own: int, name: str) -> Tensor:
    return grad.new_empty((own, *grad.shape[1:]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    part, ctx.group, ctx.ranks, ctx.rank, _, ctx.name = inputs
    ctx.own = part.shape[0]


def _average_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    part = AVERAGE_ROWS(grad, ctx.group, ctx.ranks, ctx.rank, ctx.own, ctx.name)
    return (part, *[None] * 5)


_gather.register_autograd(_average_of, setup_context=_keep)

GATHER_ROWS = torch.ops.fxpass.gather_rows.default
AVERAGE_ROWS = torch.ops.fxpass.average_rows.default
