"""Float16 matrix products for CPUs that have none.

Without AVX512-FP16 or AMX-FP16, oneDNN multiplies float16 matrices up to 40
times slower than float32 ones. These operators have float16 inputs and outputs,
as the graph says, but multiply float32 copies of one block at a time: the same
rounding as a float16 kernel with float32 accumulation, in a small scratch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map_only  # public in all but name

from ..ir.graph import StepGraph, tensor

aten = torch.ops.aten
BLOCK = (
    1 << 17
)  # elements of one float32 scratch block at least (0.5 MB), an eighth of the operands if that is more

# Without it Inductor copies an argument to the strides of the traced graph, once for each reader:
# a gradient that two products read would be stored in float32 and rounded twice.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)
_library = torch.library.Library("fxpass", "FRAGMENT")
_library.define("half_mm(Tensor a, Tensor b) -> Tensor", tags=_ANY_LAYOUT)
_library.define("half_addmm(Tensor bias, Tensor a, Tensor b) -> Tensor", tags=_ANY_LAYOUT)


def _blocked(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    block_size = max(BLOCK, (m + n) * k // 8)
    if max(m * k, k * n, m * n) <= block_size:  # one block: nothing to cut, and less to call
        block = torch.mm(a.float(), b.float())
        return (block if bias is None else block.add_(bias)).half()
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    rows = max(1, min(m, block_size // max(k, 1)))
    for top in range(0, m, rows):
        left = a[top : top + rows].float()
        columns = max(1, min(n, block_size // max(k, left.shape[0], 1)))
        for start in range(0, n, columns):
            block = torch.mm(left, b[:, start : start + columns].float())
            if bias is not None:
                block += bias[..., start : start + columns] if bias.shape[-1] == n else bias
            out[top : top + rows, start : start + columns] = block
    return out


def _half_mm(a: Tensor, b: Tensor) -> Tensor:
    return _blocked(a, b, None)


def _half_addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _blocked(a, b, bias)


def _fake_mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _fake_addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _fake_mm(a, b)


_library.impl("half_mm", _half_mm, "CPU")
_library.impl("half_addmm", _half_addmm, "CPU")
torch.library.register_fake("fxpass::half_mm", _fake_mm, lib=_library)
torch.library.register_fake("fxpass::half_addmm", _fake_addmm, lib=_library)

# Other products: computed from float32 copies of all their operands, which are activations.
# For each, which outputs are float16 (the others, such as logsumexp, keep their dtype).
WIDENED = {
    aten.bmm.default: (True,),
    aten.baddbmm.default: (True,),
    aten.convolution.default: (True,),
    aten.convolution_backward.default: (True, True, True),
    aten.mkldnn_rnn_layer.default: (True, True, True, False),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (True, False),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (True, True, True),
}


def _define_widened(target: torch._ops.OpOverload, half_outputs: tuple[bool, ...]) -> torch._ops.OpOverload:
    """An operator of ``target``'s schema that computes it in float32.

    One call, not casts around a call: Inductor would fuse the casts of forward
    and backward and keep the float32 copies from one to the other.
    """
    name = "half_" + target._schema.name.split("::")[1]
    _library.define(name + str(target._schema).split(target._schema.name)[1], tags=_ANY_LAYOUT)

    def wide(*args: Any, **kwargs: Any) -> Any:
        widen = lambda a: a.float() if _is_half_tensor(a) else a  # noqa: E731
        out = target(*map(widen, args), **tree_map_only(Tensor, widen, kwargs))
        outs = out if isinstance(out, tuple) else (out,)
        dtype = next(a.dtype for a in args if _is_half_tensor(a))
        narrow = tuple(
            o.to(dtype) if h and o is not None else o for o, h in zip(outs, half_outputs, strict=True)
        )
        return narrow if isinstance(out, tuple) else narrow[0]

    _library.impl(name, wide, "CPU")
    torch.library.register_fake(
        f"fxpass::{name}", lambda *args, **kwargs: target(*args, **kwargs), lib=_library
    )
    return getattr(torch.ops.fxpass, name).default


def _is_half_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float16


REPLACEMENTS: dict[Any, Any] = {
    aten.mm.default: torch.ops.fxpass.half_mm.default,
    **{target: _define_widened(target, outputs) for target, outputs in WIDENED.items()},
}


def replace_half_gemms(step: StepGraph) -> int:
    """Rewrite every float16 product of ``step`` for such a CPU; returns how many."""
    count = 0
    for node in step.nodes():
        if not any(_is_half(n) for n in node.all_input_nodes):
            continue
        if node.target in REPLACEMENTS:
            node.target = REPLACEMENTS[node.target]
        elif node.target is aten.addmm.default and not node.kwargs and tensor(node.args[0]).ndim == 1:
            node.target = torch.ops.fxpass.half_addmm.default
        else:
            continue
        count += 1
    return count


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and _is_half_tensor(value) and value.device.type == "cpu"
