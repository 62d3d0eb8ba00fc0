"""Float16 matrix products for CPUs that have none.

Without AVX512-FP16 or AMX-FP16, oneDNN multiplies float16 matrices up to 40
times slower than float32 ones. These operators have float16 inputs and outputs,
as the graph says, but multiply float32 copies of one block at a time: the same
rounding as a float16 kernel with float32 accumulation, in a small scratch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, tensor

aten = torch.ops.aten
BLOCK = (
    1 << 17
)  # elements of one float32 scratch block at least (0.5 MB), an eighth of the operands if that is more

_library = torch.library.Library("fxpass", "FRAGMENT")
_library.define("half_mm(Tensor a, Tensor b) -> Tensor")
_library.define("half_addmm(Tensor bias, Tensor a, Tensor b) -> Tensor")


def _blocked(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    block_size = max(BLOCK, (a.numel() + b.numel()) // 8)
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

# Computed in float32 between casts: these read activations, which are small next to weights.
WIDENED = (
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
REASON = "this CPU has no float16 matrix product"


def replace_half_gemms(step: StepGraph) -> int:
    """Rewrite every float16 product of ``step`` for such a CPU; returns how many."""
    edit = Editor(step, "half_gemm")
    count = 0
    for node in list(step.graph.nodes):
        halves = [n for n in node.all_input_nodes if _is_half(n)]
        if node.op != "call_function" or not halves:
            continue
        if node.target is aten.mm.default:
            node.target = torch.ops.fxpass.half_mm.default
        elif node.target is aten.addmm.default and not node.kwargs and tensor(node.args[0]).ndim == 1:
            node.target = torch.ops.fxpass.half_addmm.default
        elif node.target in WIDENED:
            _widen(step, edit, node)
        else:
            continue
        count += 1
    return count


def _is_half(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float16 and value.device.type == "cpu"


def _widen(step: StepGraph, edit: Editor, node: torch.fx.Node) -> None:
    when = node.meta["fxpass_phase"]
    old = node.meta["val"]
    with edit.before(node):
        for source in list(node.all_input_nodes):
            if _is_half(source):
                node.replace_input_with(source, edit.cast(source, torch.float32, when=when, reason=REASON))
    edit.refresh(node)
    if isinstance(old, torch.Tensor):
        _narrow(edit, node, old.dtype, when)
        return
    for item in list(node.users):
        index = item.args[1]
        if isinstance(old[index], torch.Tensor) and old[index].dtype is torch.float16:
            item.meta["val"] = node.meta["val"][index]
            _narrow(edit, item, torch.float16, when)
        else:
            item.meta["val"] = node.meta["val"][index]


def _narrow(edit: Editor, node: torch.fx.Node, dtype: torch.dtype, when: Phase) -> None:
    with edit.after(node):
        narrow = edit.cast(node, dtype, when=when, reason=REASON)
    edit.replace_uses(node, narrow, keep=lambda user: user is narrow)
