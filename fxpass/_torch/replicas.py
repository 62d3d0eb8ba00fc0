"""DistributedDataParallel inside the step: its gradients are averaged in the graph, as they are born.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. DDP reduces in hooks of
C++ autograd, which no trace sees: every rank would train alone. Here the wrapped module is called, and
``backward()`` (``dynamo_backward.py``) asks for the mean of each gradient, which the pass
``data_parallel`` turns into all-reduces. The verdict, the norm and the update then read what is the
same on every rank. Other wrappers that communicate behind autograd's back are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import nn_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import CaptureError
from ..ir.marks import AVERAGE
from .dtensors import is_dtensor, shard_of
from .dynamo_common import call, fail, no_grad, record_of_frame, user_line
from .dynamo_hooks import has_hooks

_ops: Any = torch.ops._c10d_functional
_REFUSED = ("FullyShardedDataParallel", "FSDPModule")
_HINT = "wrap it in DistributedDataParallel, or in nothing and all-reduce p.grad before optimizer.step()"
_INSTEAD = "leave that wrapper out and call fxpass.shard_(model, mesh) before the optimizer is made"


@dataclass
class Replica:
    """One DistributedDataParallel of a frame."""

    group: str  # name of its process group
    ranks: int
    syncs: bool = True  # whether its backwards reduce: not under no_sync()
    broadcasts: bool = True  # whether its next forward takes over rank 0's buffers


def call_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``UnspecializedNNModuleVariable.call_function``: a module is called."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        module = self.value
        if isinstance(module, DistributedDataParallel):
            return _replicated(self, tx, module).call_function(tx, args, kwargs)
        if (name := next((c.__name__ for c in type(module).__mro__ if c.__name__ in _REFUSED), None)) or (
            isinstance(module, DataParallel)
        ):
            found = f"{name or 'DataParallel'} inside the step: it communicates where no trace sees it"
            raise fail(CaptureError(found, where=user_line(), hint=_INSTEAD if name else _HINT))
        return original(self, tx, args, kwargs)

    return call_function


def _replicated(variable: Any, tx: Any, ddp: DistributedDataParallel) -> Any:
    """The wrapped module as a variable; what DDP would do around its forward is done."""
    _refuse_settings(ddp)
    record = record_of_frame()
    group: Any = ddp.process_group
    install_guard(AttrSource(variable.source, "process_group").make_guard(GuardBuilder.ID_MATCH))
    module = variable.var_getattr(tx, "module").realize()
    replica = record.replicas.setdefault(id(ddp), Replica(group.group_name, group.size()))
    replica.syncs = bool(variable.var_getattr(tx, "require_backward_grad_sync").as_python_constant())
    for name, parameter in ddp.module.named_parameters():
        if name not in ddp.parameters_to_ignore:
            record.replicated[id(parameter)] = replica
    if torch.is_grad_enabled():
        if replica.broadcasts and ddp.broadcast_buffers and ddp.modules_buffers:
            with no_grad(tx):
                call(tx, _broadcast, module, replica.group)
        replica.broadcasts = replica.syncs
    return module


def _broadcast(module: nn.Module, group: str) -> None:
    """Traced: every buffer becomes rank 0's, as before each forward of DDP's."""
    for buffer in module.buffers():
        buffer.copy_(_ops.wait_tensor(_ops.broadcast(buffer, 0, group)))


def _refuse_settings(ddp: DistributedDataParallel) -> None:
    """Raise for what DDP can be told and the graph would not do."""
    hooks = ddp._forward_hooks or ddp._forward_pre_hooks
    told = {
        "a communication hook": bool(ddp._comm_hooks),
        "mixed_precision": ddp.mixed_precision is not None,
        "join()": ddp._join_config.enable,
        "delay_all_reduce_named_params": bool(getattr(ddp, "_delay_all_reduce_params", None)),
        "forward hooks": bool(hooks),
    }
    for name, given in told.items():
        if given:
            hint = f"leave {name} out: fxpass reduces gradients in their own precision inside the graph"
            raise fail(CaptureError(f"DistributedDataParallel with {name}", where=user_line(), hint=hint))


# ---------------------------------------------------------------- gradients


def replica_of(leaf: Any) -> Replica | None:
    """The replica that a leaf's gradient is averaged over; None for one that is this rank's alone."""
    argument, record = leaf.as_proxy().node.meta.get("grapharg"), record_of_frame()
    if argument is None:
        return None
    if (shard := shard_of(argument.example)) is not None:  # of a part, the gather's derivative is the mean
        return Replica(shard.group, shard.ranks) if shard.whole else None
    if is_dtensor(argument.example):
        found = "a parameter that is a DTensor, but not of fxpass.shard_"
        raise fail(CaptureError(found, where=user_line(), hint=_HINT))
    group = record.backend.group
    if group is not None and isinstance(argument.example, nn.Parameter):
        return record.replicated.setdefault(id(argument.example), Replica(group.group_name, group.size()))
    return record.replicated.get(id(argument.example))


def refuse_parts(leaf: Any, again: bool) -> None:
    """Raise for what needs this rank's gradient of a sharded parameter, before it is the mean of all."""
    argument = leaf.as_proxy().node.meta.get("grapharg")
    if argument is None or shard_of(argument.example) is None:
        return
    if has_hooks(leaf):
        hint = (
            "edit parameter.grad between backward() and optimizer.step(): it is the mean over the ranks there"
        )
        found = "a hook on a parameter of fxpass.shard_, whose gradient is averaged as it leaves backward"
        raise fail(CaptureError(found, where=user_line(), hint=hint))
    if again:
        hint = "leave create_graph out, or use data_parallel=mesh in the place of fxpass.shard_"
        found = "backward(create_graph=True) by a parameter of fxpass.shard_"
        raise fail(CaptureError(found, where=user_line(), hint=hint))


def averaged(tx: Any, grad: Any, replica: Replica, backward: int, name: str) -> Any:
    """The mean over the ranks of parameter ``name``'s gradient of backward number ``backward``."""
    return call(tx, AVERAGE, grad, replica.group, replica.ranks, backward, name)


# ---------------------------------------------------------------- between the ranks


def share_first(parameters: Iterable[Tensor], group: Any) -> None:
    """Every parameter becomes that of the group's first rank, as DistributedDataParallel does it."""
    for parameter in parameters:
        distributed.broadcast(parameter.detach(), group=group, group_src=0)


HOOKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (nn_module.UnspecializedNNModuleVariable, "call_function", call_hook),
]
