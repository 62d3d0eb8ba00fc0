"""The operator that carries a value's role from the captured step into the ATen graph.

Dynamo and AOTAutograd rename, functionalise and reorder nodes; an operator is
the one thing they keep. ``fxpass::mark(x, role, index)`` is the identity on
values. Capture puts marks where a role is known (the seed of a backward, a
gradient as it leaves it, an optimizer's new value); ``fxpass.capture.step``
reads them off the ATen graph and erases them, so no mark is ever executed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SEED = "seed"  # the initial gradient of backward() number `index`
GRAD = "grad"  # gradient number `index` as it leaves backward()
READ = "read"  # gradient number `index` as an optimizer reads it
OLD = "old"  # the value that UPDATE `index` replaces, as the optimizer finds it
UPDATE = "update"  # new value number `index` written by an optimizer; carries the OLD one

TEXT = "fxpass_text"  # attribute of a function of ours in Dynamo's graph: what it does, in words

_SCHEMA = "(Tensor x, str role, int index, Tensor? old=None) -> Tensor"


@torch.library.custom_op("fxpass::mark", mutates_args=(), schema=_SCHEMA)
def _mark(x: Tensor, role: str, index: int, old: Tensor | None = None) -> Tensor:
    return x.clone()


@_mark.register_fake
def _(x: Tensor, role: str, index: int, old: Tensor | None = None) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _identity(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


_mark.register_autograd(_identity)


@_mark.register_vmap
def _(
    info: Any, in_dims: Any, x: Tensor, role: str, index: int, old: Tensor | None = None
) -> tuple[Tensor, Any]:
    return MARK(x, role, index, old), in_dims[0]  # gradients per sample: one mark on all of them


MARK = torch.ops.fxpass.mark.default


@torch.library.custom_op("fxpass::average", mutates_args=())
def _average(grad: Tensor, group: str, ranks: int, backward: int, name: str) -> Tensor:
    """The mean over a process group of parameter ``name``'s gradient of backward number ``backward``."""
    raise NotImplementedError("the pass data_parallel replaces it")


@_average.register_fake
def _(grad: Tensor, group: str, ranks: int, backward: int, name: str) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


AVERAGE = torch.ops.fxpass.average.default


def mark(x: Tensor, role: str, index: int, old: Tensor | None = None) -> Tensor:
    """The value of ``x`` (any shape and dtype), tagged with its role in the step."""
    return MARK(x, role, index, old)
