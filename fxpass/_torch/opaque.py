"""What there is only as a kernel that reads the host: one opaque operator each.

Backward runs the kernel again with autograd and differentiates it; random
numbers are drawn as in forward, whose generator state is one of its results.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_CELLS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator's kernel, which is called with it switched off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for backend in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
        exclude = exclude.remove(backend)
    exclude = exclude.remove(torch._C.DispatchKey.ADInplaceOrView)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _run_rnn(
    data: Tensor, sizes: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], mode: str, *settings: Any
) -> list[Tensor]:
    states = list(hx) if mode == "LSTM" else hx[0]
    return list(_CELLS[mode](data, sizes, states, list(weights), *settings))


@torch.library.custom_op("fxpass::packed_rnn", mutates_args=())
def packed_rnn(
    data: Tensor,
    batch_sizes: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    mode: str,
    bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> list[Tensor]:
    """Output, last states and the generator's state before, of a recurrent net over a packed sequence."""
    state = _generator_state(data.device)
    settings = (bias, layers, dropout, train, bidirectional)
    results = _run_rnn(data, batch_sizes, hx, weights, mode, *settings)
    return [*(r.clone() for r in results), state]


@packed_rnn.register_fake
def _(data: Tensor, batch_sizes: Tensor, hx: list[Tensor], *rest: Any) -> list[Tensor]:
    directions = 2 if rest[-1] else 1
    out = data.new_empty(data.shape[0], directions * hx[0].shape[-1])
    return [out, *map(torch.empty_like, hx), torch.empty(_state_size(data), dtype=torch.uint8, device="cpu")]


def _state_size(data: Tensor) -> int:
    return 16 if data.device.type == "cuda" else _CPU_STATE


_CPU_STATE = torch.get_rng_state().numel()


@torch.library.custom_op("fxpass::packed_rnn_backward", mutates_args=())
def packed_rnn_backward(
    grads: list[Tensor],
    data: Tensor,
    batch_sizes: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    state: Tensor,
    mode: str,
    bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> list[Tensor]:
    """Gradients of the data, the first states and the weights."""
    settings = (bias, layers, dropout, train, bidirectional)
    leaves = [t.detach().clone().requires_grad_() for t in (data, *hx, *weights)]
    count = 1 + len(hx)
    devices = [data.device] if data.device.type == "cuda" else []
    with _autograd(), torch.random.fork_rng(devices):
        torch.cuda.set_rng_state(state, data.device) if devices else torch.set_rng_state(state)
        results = _run_rnn(leaves[0], batch_sizes, leaves[1:count], leaves[count:], mode, *settings)
        gradients = torch.autograd.grad(results, leaves, list(grads), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.clone() for g, t in zip(gradients, leaves, strict=True)]


@packed_rnn_backward.register_fake
def _(
    grads: list[Tensor],
    data: Tensor,
    batch_sizes: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (data, *hx, *weights)]


def _keep_rnn(ctx: Any, inputs: Any, output: Any) -> None:
    data, sizes, hx, weights, *ctx.settings = inputs
    ctx.states, ctx.shapes = len(hx), [(o.shape, o.dtype, o.device) for o in output[:-1]]
    ctx.save_for_backward(data, sizes, output[-1], *hx, *weights)


def _rnn_backward(ctx: Any, grads: Any) -> Any:
    data, sizes, state, *rest = ctx.saved_tensors
    hx, weights = rest[: ctx.states], rest[ctx.states :]
    known = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(grads, ctx.shapes, strict=False)
    ]
    gradients = torch.ops.fxpass.packed_rnn_backward(known, data, sizes, hx, weights, state, *ctx.settings)
    count = 1 + len(hx)
    return gradients[0], None, gradients[1:count], gradients[count:], *[None] * len(ctx.settings)


packed_rnn.register_autograd(_rnn_backward, setup_context=_keep_rnn)


@torch.library.custom_op("fxpass::ctc_loss", mutates_args=())
def ctc_loss(
    log_probs: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    """The CTC loss of each sequence."""
    kind = torch.nn.functional.ctc_loss
    return kind(log_probs, targets, inputs.cpu(), lengths.cpu(), blank, "none", zero_infinity)


@ctc_loss.register_fake
def _(log_probs: Tensor, *_: Any) -> Tensor:
    return log_probs.new_empty(log_probs.shape[1])


@torch.library.custom_op("fxpass::ctc_loss_backward", mutates_args=())
def ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    inputs: Tensor,
    lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """The gradient of the log-probabilities."""
    leaf = log_probs.detach().clone().requires_grad_()
    with _autograd():
        loss = ctc_loss._init_fn(leaf, targets, inputs, lengths, blank, zero_infinity)
        return torch.autograd.grad(loss, leaf, grad)[0].clone()


@ctc_loss_backward.register_fake
def _(grad: Tensor, log_probs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _keep_ctc(ctx: Any, inputs: Any, output: Any) -> None:
    log_probs, targets, input_lengths, lengths, *ctx.settings = inputs
    ctx.save_for_backward(log_probs, targets, input_lengths, lengths)


def _ctc_backward(ctx: Any, grad: Tensor) -> Any:
    gradient = torch.ops.fxpass.ctc_loss_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return gradient, None, None, None, None, None


ctc_loss.register_autograd(_ctc_backward, setup_context=_keep_ctc)


@torch.library.custom_op("fxpass::linear_sum_assignment", mutates_args=())
def linear_sum_assignment(cost: Tensor, maximize: bool) -> tuple[Tensor, Tensor]:
    """Which row goes to which column, by scipy, in whose own step it is called."""
    rows, columns = sys.modules["scipy.optimize"].linear_sum_assignment(cost.cpu().numpy(), maximize)
    return torch.from_numpy(rows), torch.from_numpy(columns)


@linear_sum_assignment.register_fake
def _(cost: Tensor, maximize: bool) -> tuple[Tensor, Tensor]:
    pairs: Any = torch.sym_min(*cost.shape)
    rows = torch.empty(pairs, dtype=torch.int64, device="cpu")
    return rows, torch.empty_like(rows)


@torch.library.custom_op("fxpass::number", mutates_args=())
def number(value: int) -> Tensor:
    """A number that is known when the step runs, in a buffer: Inductor may read one before it is there."""
    return torch.tensor(value)


@number.register_fake
def _(value: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")
