"""Sizes as sympy expressions: an int is a constant, a symbolic size stays a symbol."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """``size`` as sympy sees it."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def resolver(values: Iterable[object]) -> Callable[[sympy.Expr], sympy.Expr]:
    """What turns a size into one of the symbols that are left.

    While a step is traced and lowered, torch learns that sizes are equal and
    replaces one symbol by another; expressions made before still hold the old one.
    """
    sizes = (s for v in values for s in (v.shape if isinstance(v, Tensor) else [v]))
    env = next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)
    return (lambda size: size) if env is None else (lambda size: env.replace(size))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two fake tensors have one shape; sizes that depend on data and may be equal are."""
    return a.ndim == b.ndim and all(guard_or_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def product(sizes: Iterable[int | torch.SymInt]) -> sympy.Expr:
    """The product of ``sizes``."""
    total = sympy.Integer(1)
    for size in sizes:
        total = total * expression(size)
    return total


def numel(value: Tensor) -> sympy.Expr:
    """How many elements a tensor has."""
    return product(value.shape)


def storage_bytes(value: Tensor) -> sympy.Expr:
    """Bytes that a tensor of this size and these strides needs, as freshly allocated."""
    shape, strides = list(value.shape), list(value.stride())
    if any(isinstance(s, int) and s == 0 for s in shape):
        return sympy.Integer(0)
    last = sum(
        ((expression(n) - 1) * expression(s) for n, s in zip(shape, strides, strict=True)), sympy.Integer(0)
    )
    return sympy.expand((last + 1) * value.dtype.itemsize)
