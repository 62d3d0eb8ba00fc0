"""Functions of torch.nn that ask a tensor for a number, by others that keep it on the device.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Each
gives what the original gives; what it replaces would break the graph.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.variables import base, builder, ctx_manager, functions, user_defined
from torch._dynamo.variables import torch as in_graph
from torch.amp import GradScaler
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.nn.modules import batchnorm, rnn, transformer
from torch.nn.utils import rnn as packing

from . import opaque
from .dynamo_common import object_of
from .dynamo_hooks import refuse_unhooked

VariableTracker = base.VariableTracker


def call_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``UserFunctionVariable.call_function``: trace the substitute of a function that has one."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        substitute = _SUBSTITUTES.get(self.fn)
        if substitute is None:
            return original(self, tx, args, kwargs)
        given = [*self.self_args(), *args]
        applies, function = substitute
        if not applies(*given, **kwargs):
            return original(self, tx, args, kwargs)
        return original(VariableTracker.build(tx, function), tx, given, kwargs)

    return call_function


def skipped_call_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``SkipFunctionVariable.call_function``: likewise for what Dynamo does not look into."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if _is_matching(self.value):
            return VariableTracker.build(tx, _matching).call_function(tx, list(args), dict(kwargs))
        applies, function = _SUBSTITUTES.get(self.value, (None, None))
        if applies is None or not applies(*args, **kwargs):
            return original(self, tx, args, kwargs)
        return VariableTracker.build(tx, function).call_function(tx, list(args), dict(kwargs))

    return call_function


def class_call_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``UserDefinedClassVariable.call_function``: likewise for a class."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        applies, function = _CLASSES.get(self.value, (None, None))
        if applies is None or not applies(*args, **kwargs):
            return original(self, tx, args, kwargs)
        return VariableTracker.build(tx, function).call_function(tx, list(args), dict(kwargs))

    return call_function


def sourceless_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``SourcelessBuilder.create``: what ``@torch.no_grad()`` calls, on a module made inside the step."""

    def create(tx: Any, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        if isinstance(value, types.MethodType) and value.__name__ == "clone" and type(owner) in _GRAD_MODES:
            return in_graph.TorchCtxManagerClassVariable(type(owner))
        return original(tx, value)

    return create


_GRAD_MODES = (torch.no_grad, torch.enable_grad)
_FLAGS = ("retain_graph", "create_graph", "allow_unused", "is_grads_batched", "materialize_grads")


def graph_call_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``TorchInGraphFunctionVariable.call_function``: likewise for what would become one node."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value is torch.autograd.grad:  # Dynamo looks for its flags by name
            named = zip(_FLAGS, args[3:], strict=False)
            args, kwargs = args[:3], {**dict(named), **kwargs}
            refuse_unhooked(args[0] if args else kwargs["outputs"])
        function = _IN_GRAPH.get(self.value)
        if function is None or (function is _no_switch and not {"enabled", "benchmark"}.issuperset(kwargs)):
            return original(self, tx, args, kwargs)
        return VariableTracker.build(tx, function).call_function(tx, list(args), dict(kwargs))

    return call_function


# ---------------------------------------------------------------- masks, statistics


def _no_hint(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether a mask is causal is only a hint: the mask is passed on beside it."""
    return is_causal is True


def _cumulative_norm(self: Any, input: Tensor) -> Tensor:
    """Batch norm with ``momentum=None`` in training: the average of all batches so far."""
    self._check_input_dim(input)
    self.num_batches_tracked.add_(1)
    share = 1.0 / self.num_batches_tracked
    mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
    batch_norm = torch.nn.functional.batch_norm
    out = batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
    self.running_mean.lerp_(mean, share.to(mean.dtype))
    self.running_var.lerp_(var, share.to(var.dtype))
    return out


def _is_cumulative(module: Any, *_: Any, **__: Any) -> bool:
    norm = object_of(module)
    if not isinstance(norm, batchnorm._BatchNorm):
        return False
    return norm.training and norm.momentum is None and norm.num_batches_tracked is not None


# ---------------------------------------------------------------- packed sequences


def _pack(
    input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
) -> packing.PackedSequence:
    """``pack_padded_sequence``: the elements within their lengths, step by step, longest sequence first."""
    if isinstance(lengths, (list, tuple)):
        lengths = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in lengths])
    padded = input.transpose(0, 1) if batch_first else input
    lengths, order = torch.sort(lengths, descending=True, stable=True)
    here = order.to(input.device)
    padded = padded.index_select(1, here)
    within = torch.arange(padded.shape[0], device=lengths.device)[:, None] < lengths[None, :]
    data = padded[within.to(input.device)]
    steps = within.any(1)
    batch_sizes = within.sum(1)[steps].cpu()
    return packing.PackedSequence(data, batch_sizes, here, torch.argsort(here))


def _unpack(
    sequence: packing.PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``pad_packed_sequence``: where each element of the padded tensor stands in the packed one."""
    data, batch_sizes, _, unsorted = sequence
    assert unsorted is not None, "packed inside of the step, a sequence knows its order"
    sizes = batch_sizes.to(data.device)
    first = sizes.cumsum(0) - sizes
    column = torch.arange(unsorted.shape[0], device=data.device)
    within = column[None, :] < sizes[:, None]
    lengths = within.sum(0)
    at = torch.where(within, first[:, None] + column[None, :], 0)
    shown = within.view(*within.shape, *[1] * (data.ndim - 1))
    padded = torch.where(shown, data[at], padding_value)
    if total_length is not None:
        rest = torch.full(
            (total_length, *padded.shape[1:]), padding_value, dtype=data.dtype, device=data.device
        )
        padded = rest.index_copy(0, torch.arange(sizes.shape[0], device=data.device), padded)
    padded, lengths = padded.index_select(1, unsorted), lengths[unsorted].cpu()
    return (padded.transpose(0, 1) if batch_first else padded), lengths


def _knows_its_order(sequence: Any, *_: Any, **__: Any) -> bool:
    fields = getattr(sequence, "items", None) or getattr(getattr(sequence, "_tuple_vt", None), "items", None)
    return fields is not None and isinstance(fields[-1], VariableTracker) and not _is_none(fields[-1])


def _pad(
    sequences: Any, batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Tensor:
    """``pad_sequence``, whose longest one is found without asking which it is."""
    if isinstance(sequences, Tensor):
        sequences = sequences.unbind(0)
    longest: Any = sequences[0].shape[0]
    for sequence in sequences[1:]:
        longest = torch.sym_max(longest, sequence.shape[0])
    rows = []
    for sequence in sequences:
        row = torch.full((longest, *sequence.shape[1:]), padding_value)  # pyrefly: ignore[no-matching-overload]
        row = row.to(sequence.device, sequence.dtype)
        at = torch.arange(sequence.shape[0], device=sequence.device)
        at = at + (longest - sequence.shape[0]) if padding_side == "left" else at
        rows.append(row.index_copy(0, at, sequence))
    return torch.stack(rows, 0 if batch_first else 1)


def _has_unbacked(sequences: Any, *_: Any, **__: Any) -> bool:
    items = getattr(sequences, "items", None) or []
    fakes = [i.as_proxy().node.meta.get("example_value") for i in items if hasattr(i, "as_proxy")]
    return any(isinstance(f, Tensor) and has_free_unbacked_symbols(f) for f in fakes)


def _is_none(variable: Any) -> bool:
    return variable.is_python_constant() and variable.as_python_constant() is None


def _packed_rnn(self: Any, input: packing.PackedSequence, hx: Any = None) -> Any:
    """An LSTM, GRU or RNN over a packed sequence: one opaque operator."""
    data, batch_sizes, order, back = input
    assert order is not None, "see _knows_its_order"
    assert back is not None, "see _knows_its_order"
    directions = 2 if self.bidirectional else 1
    shape = (self.num_layers * directions, order.shape[0])
    if hx is None:
        first = torch.zeros(*shape, self.proj_size or self.hidden_size, dtype=data.dtype, device=data.device)
        states = [first, torch.zeros(*shape, self.hidden_size, dtype=data.dtype, device=data.device)]
        states = states if self.mode == "LSTM" else states[:1]
    else:
        states = [h.index_select(1, order) for h in (hx if self.mode == "LSTM" else (hx,))]
    out, *states, _ = torch.ops.fxpass.packed_rnn(
        data,
        batch_sizes,
        states,
        self._flat_weights,
        self.mode,
        self.bias,
        self.num_layers,
        self.dropout,
        self.training,
        self.bidirectional,
    )
    result = packing.PackedSequence(out, batch_sizes, order, back)
    states = [h.index_select(1, back) for h in states]
    return result, (tuple(states[:2]) if self.mode == "LSTM" else states[0])


def _takes_packed(_: Any, sequence: Any = None, *__: Any, **kwargs: Any) -> bool:
    return _knows_its_order(kwargs.get("input", sequence))


def _ctc(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``ctc_loss``, whose kernels read the lengths on the host."""
    single = log_probs.dim() == 2
    probs = log_probs.unsqueeze(1) if single else log_probs
    targets = targets.unsqueeze(0) if single else targets
    if isinstance(input_lengths, (list, tuple)):
        input_lengths = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in input_lengths])
    if isinstance(target_lengths, (list, tuple)):
        target_lengths = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in target_lengths])
    inputs, lengths = input_lengths.reshape(-1), target_lengths.reshape(-1)
    loss = torch.ops.fxpass.ctc_loss(probs, targets, inputs, lengths, blank, zero_infinity)
    if reduction == "mean":
        return (loss / lengths.to(loss.device, loss.dtype).clamp_min(1)).mean()
    if reduction == "sum":
        return loss.sum()
    return loss.squeeze(0) if single else loss


def _is_matching(function: Any) -> bool:
    """Whether this is the Hungarian algorithm, which detection losses take from scipy."""
    return getattr(sys.modules.get("scipy.optimize"), "linear_sum_assignment", None) is function


def _matching(cost_matrix: Any, maximize: bool = False) -> Any:
    """``scipy.optimize.linear_sum_assignment`` of an array or a tensor."""
    cost = torch.as_tensor(cost_matrix).detach()
    rows, columns = torch.ops.fxpass.linear_sum_assignment(cost, maximize)
    return rows.numpy(), columns.numpy()


def _variable(data: Tensor, requires_grad: bool = False, volatile: Any = None) -> Tensor:
    """``torch.autograd.Variable``, of the days before tensors knew autograd."""
    return data.detach().requires_grad_() if requires_grad else data.detach()


def _buffer(data: Tensor, *, persistent: bool = True) -> Tensor:
    """``torch.nn.Buffer``, for a module that is made inside the step and lives no longer: a tensor."""
    return data.detach()


def _no_switch(enabled: bool = False, benchmark: bool = False) -> Any:
    """``torch.backends.cudnn.flags``: which library computes is the compiler's to choose."""
    return contextlib.nullcontext()


def _binds_to_context(function: Any, owner: Any) -> bool:
    """Whether ``contextlib.ExitStack`` binds the ``__exit__`` of a context manager that Dynamo knows."""
    own = isinstance(owner, ctx_manager.GenericContextWrappingVariable)  # Dynamo does it itself
    return isinstance(owner, ctx_manager.ContextWrappingVariable) and not own


# ---------------------------------------------------------------- a GradScaler that is switched off


def _off(scaler: Any, *_: Any, **__: Any) -> bool:
    """Such a scaler passes on what it is given; one that is on is refused where the step first meets it."""
    return not scaler.value.is_enabled()


def _scale_off(self: Any, outputs: Any) -> Any:
    return None if self._enabled else outputs  # asked, for Dynamo's guard on it


def _step_off(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    return optimizer.step(*args, **kwargs)


def _nothing(self: Any, *_: Any) -> None:
    return None


def _always(*_: Any, **__: Any) -> bool:
    return True


# by function: whether it applies to these arguments, and what is traced instead
_SUBSTITUTES: dict[Any, tuple[Callable[..., bool], Callable[..., Any]]] = {
    transformer._detect_is_causal_mask: (_always, _no_hint),
    batchnorm._BatchNorm.forward: (_is_cumulative, _cumulative_norm),
    packing.pack_padded_sequence: (_always, _pack),
    packing.pad_sequence: (_has_unbacked, _pad),
    packing.pad_packed_sequence: (_knows_its_order, _unpack),
    rnn.LSTM.forward: (_takes_packed, _packed_rnn),
    rnn.GRU.forward: (_takes_packed, _packed_rnn),
    rnn.RNN.forward: (_takes_packed, _packed_rnn),
    GradScaler.scale: (_off, _scale_off),
    GradScaler.step: (_off, _step_off),
    GradScaler.unscale_: (_off, _nothing),
    GradScaler.update: (_off, _nothing),
    GradScaler.get_scale: (_off, lambda self: 1.0),
    GradScaler.is_enabled: (_off, lambda self: self._enabled),
}
_CLASSES: dict[Any, tuple[Callable[..., bool], Callable[..., Any]]] = {
    torch.autograd.Variable: (_always, _variable),
    torch.nn.Buffer: (_always, _buffer),
    types.MethodType: (_binds_to_context, functools.partial),
}
_IN_GRAPH: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.ctc_loss: _ctc,
    torch.backends.cudnn.flags: _no_switch,
    torch.nn.Buffer: _buffer,  # as transformers wants it
}
_ = opaque  # registers the operators
HOOKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (functions.UserFunctionVariable, "call_function", call_hook),
    (functions.SkipFunctionVariable, "call_function", skipped_call_hook),
    (in_graph.TorchInGraphFunctionVariable, "call_function", graph_call_hook),
    (user_defined.UserDefinedClassVariable, "call_function", class_call_hook),
    (builder.SourcelessBuilder, "create", sourceless_hook),
]
