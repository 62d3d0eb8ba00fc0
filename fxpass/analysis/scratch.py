"""Bytes that a library call allocates and frees inside, beyond its results.

Each formula follows the allocations that PyTorch 2.13 makes in its CPU kernels,
as the profiler's memory events show them; those of the operators in
lower/half_gemm.py follow their Python. An operator that is not listed needs
nothing beyond its results. Not counted: where the CPU multiplies float16 itself
(AVX512-FP16), the buffers in which oneDNN does so, 17 KB to 2.4 MB a product as
seen with one thread; its convolutions are counted as in float32, an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ..ir.sizes import expression, numel, storage_bytes
from .policy import op_name

PROMOTING = frozenset("add sub mul div where addcmul addcdiv lerp maximum minimum pow".split())
ZERO = sympy.Integer(0)
BLOCK = 1 << 17  # elements of one float32 block of a half product: lower/half_gemm.py
CONV_WORKSPACE = 96 << 10  # bytes: oneDNN's scratchpad for a convolution's backward, the most that was seen
PLAIN_CHANNELS = 4  # images of so few channels are convolved as they are, without a copy


class half_product_scratch(sympy.Function):
    """Bytes of float32 blocks while ``fxpass::half_mm`` multiplies [m, k] by [k, n]; last 1: with a bias."""

    @classmethod
    def eval(cls, *args: Any) -> Any:
        if not all(a.is_Integer for a in args):
            return None
        m, k, n, bias = map(int, args)
        return sympy.Integer(_half_product(m, k, n, bool(bias)))


def _half_product(m: int, k: int, n: int, bias: bool) -> int:
    """The peak of the loops of ``_blocked`` in lower/half_gemm.py, with their allocations in their order."""
    size = max(BLOCK, (m * k + k * n) // 8)
    if max(m * k, k * n, m * n) <= size:  # the result, 2 bytes an element, is made last
        return max(4 * (m * k + k * n + m * n) - 2 * m * n, 4 * m * n)
    rows = max(1, min(m, size // max(k, 1)))
    left = block = peak = 0
    for top in range(0, m, rows):
        height = min(rows, m - top)
        peak = max(peak, left + block + height * k)
        left = height * k
        columns = max(1, min(n, size // max(k, height, 1)))
        for start in range(0, n, columns):
            width = min(columns, n - start)
            peak = max(peak, left + block + width * k + height * width)
            block = height * width
            peak = max(peak, left + block + (width if bias else 0))
    return 4 * peak


def scratch(node: Node) -> sympy.Expr:
    """Bytes beyond inputs and results that ``node`` needs while it runs; 0 for operators not listed."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if not any(isinstance(v, Tensor) and v.device.type == "cpu" for v in values):
        return ZERO
    name = op_name(node.target)
    operands = [n.meta.get("val") if isinstance(n, Node) else n for n in node.args]
    if name in ("half_mm", "half_addmm"):
        a, b = (v for v in operands[-2:] if isinstance(v, Tensor))
        sizes = (*a.shape, b.shape[1], int(name == "half_addmm"))
        size: Any = half_product_scratch(*map(expression, sizes))
        return size
    results = _tensors(node.meta.get("val"))
    if name.startswith("half_"):
        return _widened(name.removeprefix("half_"), operands, results)
    if name in PROMOTING and len(results) == 1:
        return _promoted(operands, results[0])
    return INSIDE[name](operands, results) if name in INSIDE else ZERO


def _promoted(operands: list[Any], result: Tensor) -> sympy.Expr:
    """Operands of another dtype than the result's, a 0-d one too, are copied to it first."""
    other = [v for v in _tensors(operands) if v.dtype not in (result.dtype, torch.bool)]
    return sum((numel(v) * result.dtype.itemsize for v in other), ZERO)


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _widened(name: str, operands: list[Any], results: list[Tensor]) -> sympy.Expr:
    """Float32 copies of the operands, the float32 results, and what the float32 kernel needs itself."""
    copies = sum((4 * numel(v) for v in _tensors(operands) if v.dtype is torch.float16), ZERO)
    wide = [v.float() if v.dtype is torch.float16 else v for v in results]
    extra = INSIDE[name](operands, wide) if name in INSIDE else ZERO
    made = sum((storage_bytes(v) for v in wide), ZERO)
    narrow = sum((storage_bytes(v) for v in results), ZERO)
    same = sum((storage_bytes(v) for v in results if v.dtype is not torch.float16), ZERO)
    return sympy.Max(copies + extra + made, made + narrow - same) - narrow


def _split(length: sympy.Expr) -> sympy.Expr:
    """Rows of queries that flash attention on CPUs takes at once."""
    return sympy.Piecewise((256, length >= 768), (64, length >= 192), (32, True))


def _attention(operands: list[Any], results: list[Tensor]) -> sympy.Expr:
    """Per thread, scores of a block of queries and keys, two statistics a row, the block's output."""
    query, key = operands[:2]
    length, keys, head = expression(query.shape[-2]), expression(key.shape[-2]), expression(query.shape[-1])
    rows, columns = sympy.Min(_split(length), length), sympy.Min(512, keys)
    return 4 * torch.get_num_threads() * rows * (columns + 2 + head)


def _attention_backward(operands: list[Any], results: list[Tensor]) -> sympy.Expr:
    """Per thread, scores and their gradients of a block; the output's gradient again if laid out apart."""
    grad, query, key = operands[:3]
    length, keys = expression(query.shape[-2]), expression(key.shape[-2])
    rows, columns = sympy.Min(_split(length), length), sympy.Min(512, keys)
    copy = ZERO if grad.transpose(1, 2).is_contiguous() else 4 * numel(grad)
    return 4 * torch.get_num_threads() * rows * (2 * columns + 1) + copy


def _reordered(image: Tensor) -> sympy.Expr:
    """oneDNN's copy of an image in its own layout."""
    channels = image.shape[1]
    if isinstance(channels, int) and channels <= PLAIN_CHANNELS:
        return ZERO
    return 4 * numel(image)


def _convolution(operands: list[Any], results: list[Tensor]) -> sympy.Expr:
    """Image, weight and result in oneDNN's layout, then the result once in each layout."""
    image, weight = operands[:2]
    result = 4 * numel(results[0])
    return sympy.Max(_reordered(image) + 4 * numel(weight), result)


def _convolution_backward(operands: list[Any], results: list[Tensor]) -> sympy.Expr:
    """The gradient of the image, reordered twice, then that of the weight; operands in oneDNN's layout.

    Images that are channels-last already need less: this is then an upper bound.
    """
    grad, image, weight = operands[:3]
    mask = operands[10] if len(operands) > 10 else (True, True, True)
    g, x, w = 4 * numel(grad), 4 * numel(image), 4 * numel(weight)
    of_image = sympy.Max(g + w + x + CONV_WORKSPACE, 3 * x) if mask[0] else ZERO
    kept = x if mask[0] else ZERO
    of_weight = kept + sympy.Max(_reordered(image) + g + w, 2 * w)
    made = sum((storage_bytes(v) for v in results), ZERO)
    return sympy.Max(sympy.Max(of_image, of_weight) - made, 0)


Inside = Callable[[list[Any], list[Tensor]], sympy.Expr]
INSIDE: dict[str, Inside] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
