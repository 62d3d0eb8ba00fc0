"""``loss.backward()`` while Dynamo traces: ``autograd.grad`` with marked seed and gradients.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import BaseListVariable, TupleVariable

from ..errors import CaptureError
from ..ir.marks import GRAD, MARK, SEED
from . import debugging
from .data_sizes import no_pending
from .dynamo_common import call, fail, is_none, no_grad, record_of_frame, store_grad, user_line
from .dynamo_hooks import after_accumulation, has_hooks, hooked_gradient
from .frame_record import LeafGrad
from .gradient_calls import behind
from .replicas import averaged, refuse_parts, replica_of


def _leaves(self: Any, tx: Any, inputs: Any) -> list[Any]:
    if inputs is None or is_none(inputs):
        created = list(getattr(tx.output, "leaf_var_creation_order", ()))
        return self._collect_backward_inputs([*created, *tx.output.input_source_to_var.values()]) or []
    provided = inputs.items if isinstance(inputs, BaseListVariable) else [inputs]
    return self._collect_backward_inputs(provided, error_on_non_leaf=True) or []


def backward(
    self: Any,
    tx: Any,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: Any = None,
    inputs: Any = None,
) -> Any:
    """``loss.backward()`` as ``autograd.grad`` over the frame's leaves, gradients added to ``.grad``."""
    record = record_of_frame()
    if torch.is_anomaly_enabled():
        raise fail(debugging.anomaly(user_line()))
    if retain_graph is not None and is_none(retain_graph):
        retain_graph = None
    # differentiable gradients get no marks here: capture decides which of them have a scale
    again = create_graph is not None and bool(create_graph.as_python_constant())
    leaves = [v for v in _leaves(self, tx, inputs) if v.dtype.is_floating_point]
    number = len(record.backwards)
    record.backwards.append(user_line())
    loss = self.as_proxy().node.meta["example_value"]
    record.traversed |= behind([loss])
    if not leaves:
        return ConstantVariable.create(None)
    with no_grad(tx):
        seed = gradient if gradient is not None and not is_none(gradient) else call(tx, torch.ones_like, self)
        seed = seed if again else call(tx, MARK, seed, SEED, number)
    kwargs = {"allow_unused": True, "grad_outputs": seed, **({"create_graph": True} if again else {})}
    if retain_graph is not None:
        kwargs["retain_graph"] = retain_graph
    with no_pending(tx.output.fake_mode):
        grads = call(tx, torch.autograd.grad, self, TupleVariable(leaves), **kwargs)
    with contextlib.nullcontext() if again else no_grad(tx):
        for position, leaf in enumerate(leaves):
            grad = grads.call_method(tx, "__getitem__", [ConstantVariable.create(position)], {})
            if is_none(grad):
                continue
            record.reached = True
            name, replica = leaf.as_proxy().node.name, replica_of(leaf)
            refuse_parts(leaf, again)
            # as stored in low precision, where nothing comes between autograd and the reduction
            early = replica is not None and replica.syncs and name not in record.owed and not has_hooks(leaf)
            if replica is not None and again:
                hint = "call what DistributedDataParallel wraps (ddp.module), or leave create_graph out"
                found = "backward(create_graph=True) through DistributedDataParallel"
                raise fail(CaptureError(found, where=user_line(), hint=hint))
            if replica is not None and early:
                grad = averaged(tx, grad, replica, number, name)
            if not again:
                grad = call(tx, MARK, grad, GRAD, len(record.leaf_grads))
                record.leaf_grads.append(LeafGrad(number, name))
            grad = hooked_gradient(tx, leaf, grad)
            old = leaf.var_getattr(tx, "grad")
            if not is_none(old):
                record.earlier_grads.setdefault(name, old.as_proxy().node.name)
                grad = call(tx, torch.add, old, grad)
            if replica is not None and not early:
                grad = averaged(tx, grad, replica, number, name) if replica.syncs else grad
                (record.owed.discard if replica.syncs else record.owed.add)(name)
            store_grad(tx, leaf, grad)
            after_accumulation(tx, leaf)
    return ConstantVariable.create(None)
