"""Numbers without a GPU: what would run on the device runs on the CPU, on the same memory.

Needs the stub, whose device memory is host memory, and ``TRITON_INTERPRET=1``:
Triton's kernels run in its interpreter, and an operator of aten's on CUDA
tensors is led to its kernel for the CPU on tensors over the same bytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_map
from triton.language.extra import libdevice
from triton.runtime import interpreter

aten = torch.ops.aten
CPU = torch.device("cpu")
_library = torch.library.Library("aten", "IMPL")

# Operators of CUDA's own that already do the right thing on the stub: they allocate, or change how
# bytes are looked at. cuDNN's have no kernel for the CPU.
STAY = (
    *("_copy_from", "_cudnn", "_efficientzerotensor", "_empty", "_local_scalar_dense", "_pin_memory"),
    *("_reshape_alias", "_to_copy", "_use_cudnn", "as_strided", "cudnn", "empty", "is_pinned", "is_set_to"),
    *("miopen", "new_empty", "record_stream", "resize_", "set_", "unfold", "view"),
)


def install() -> None:
    """Lead CUDA's operators to the CPU, for the rest of this process."""
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace != "aten" or base.startswith(STAY) or not hasattr(aten, base):
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            _implement(rest, _on_cpu(getattr(getattr(aten, base), overload or "default")))
    _implement("copy_", _copy)
    _implement("_scaled_dot_product_flash_attention", _flash)
    _implement("_scaled_dot_product_flash_attention_backward", _flash_backward)
    _implement("_scaled_dot_product_efficient_attention", _efficient)
    _implement("_scaled_dot_product_efficient_attention_backward", _efficient_backward)
    for name, function in _NUMPY.items():
        setattr(libdevice, name, _lifted(name, function))


def _implement(name: str, function: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a kernel that is replaced
        _library.impl(name, function, "CUDA", allow_override=True)


# ------------------------------------------------------------ tensors


def _to_cpu(value: Any) -> Any:
    """A CUDA tensor as a tensor of the CPU over the same bytes."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    storage = value.untyped_storage()
    size = storage.nbytes()
    bytes_ = (
        torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, size)
        if size
        else torch.UntypedStorage(0)
    )
    out = torch.empty(0, dtype=value.dtype)
    out.set_(bytes_, value.storage_offset(), value.size(), value.stride())
    out.cuda_twin = value
    return out


def _to_cuda(value: Any) -> Any:
    """Back: the tensor it was, or a new one with the same numbers."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return value
    twin = getattr(value, "cuda_twin", None)
    if twin is not None and twin.shape == value.shape:
        return twin
    if twin is not None:  # an `out=` that was resized
        twin.resize_(value.shape)
    else:
        twin = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
    _to_cpu(twin).copy_(value)
    return twin


def _on_cpu(operator: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_to_cpu, (args, kwargs))
        return tree_map(_to_cuda, operator(*args, **kwargs))

    return run


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _to_cpu(to).copy_(_to_cpu(source))
    return to


# ------------------------------------------------------------ attention, by the CPU's flash attention

_forward = aten._scaled_dot_product_flash_attention_for_cpu
_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert dropout_p == 0.0, "random numbers are not emulated"
    q, k, v = (_to_cpu(t) for t in (q, k, v))
    out, sums = _forward(q, k, v, dropout_p, is_causal, scale=scale)
    _, heads, length, width = q.shape
    strides = (heads * length * width, width, heads * width, 1)  # as the CUDA kernel lays it out
    mine = torch.empty_strided(q.shape, strides, dtype=q.dtype, device="cuda")
    _to_cpu(mine).copy_(out)
    seed, offset = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    unused = torch.empty(0, dtype=q.dtype)
    rest = tuple(_to_cuda(t) for t in (seed, offset, unused))
    return (mine, _to_cuda(sums.contiguous()), None, None, length, k.shape[2], *rest)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    cum_q: Any,
    cum_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    seed: Tensor,
    offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    tensors = [_to_cpu(t) for t in (grad, q, k, v, out, sums)]
    return tuple(map(_to_cuda, _backward(*tensors, dropout_p, is_causal, scale=scale)))


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    assert bias is None, "a mask is not emulated"
    out, sums, *_ = _flash(q, k, v, dropout_p, is_causal, scale=scale)
    padded = torch.nn.functional.pad(_to_cpu(sums), (0, -q.shape[2] % 32))  # rows in blocks of 32
    if not compute_log_sumexp:
        padded = padded[..., :0].contiguous()
    seed, offset = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2))
    return out, _to_cuda(padded), seed, offset


def _efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sums: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout_p: float,
    wanted: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    sums = sums[:, :, : q.shape[2]].contiguous()
    tensors = [_to_cpu(t) for t in (grad, q, k, v, out, sums)]
    return (*map(_to_cuda, _backward(*tensors, dropout_p, is_causal, scale=scale)), None)


# ------------------------------------------------------------ libdevice, which the interpreter has not

_erf = np.vectorize(math.erf, otypes=[np.float64])
_NUMPY: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in ("cos", "exp", "exp2", "expm1", "floor", "ceil", "isinf")},
    **{name: getattr(np, name) for name in ("isnan", "log", "log1p", "log2", "sin", "sqrt", "tanh", "trunc")},
    **{name: getattr(np, name) for name in ("abs", "copysign", "fmod", "rint", "signbit")},
    **{"pow": np.power, "fdiv": np.divide, "div_rn": np.divide, "sqrt_rn": np.sqrt, "nearbyint": np.rint},
    **{"mul_rn": np.multiply, "add_rn": np.add, "sub_rn": np.subtract, "llrint": np.rint, "erf": _erf},
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "fma": lambda a, b, c: a * b + c,
}
_INTEGERS = {"isnan": tl.int32, "isinf": tl.int32, "signbit": tl.int32, "llrint": tl.int64}


def _lifted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numpy arrays as one of the interpreter's tensors."""
    semantic = interpreter.interpreter_semantic

    def run(*args: Any) -> Any:
        tensors = [semantic.to_tensor(a) for a in args]
        if len(tensors) == 2:
            tensors = list(semantic.broadcast_impl_value(*tensors))
        kind = tensors[0].type
        with np.errstate(all="ignore"):
            data = np.asarray(function(*(t.handle.data for t in tensors)))
        scalar = _INTEGERS.get(name)
        wanted = tensors[0].handle.data.dtype
        if scalar is not None:
            wanted = np.dtype(str(scalar))
        scalar = scalar or kind.scalar
        shape = tl.block_type(scalar, kind.get_block_shapes()) if kind.is_block() else scalar
        return tl.tensor(interpreter.TensorHandle(data.astype(wanted), scalar), shape)

    return run
