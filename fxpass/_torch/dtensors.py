"""Parameters of which each rank holds some rows: DTensors to the user, whole to Dynamo, parts in the graph.

Written for torch 2.11 to 2.13; the hook is active only inside ``dynamo.py``'s patches. Dynamo sees a
stand-in of the whole parameter's shape in the place of a DTensor of ours, and writes the graph of
one device. ``capture/parts.py`` then says where the whole is needed and where the part will do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._dynamo.variables import builder
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext

from ..errors import CaptureError
from ..ir.shards import Shard
from .dynamo_common import fail, user_line
from .fake import is_virtual

# attributes of a parameter that `shard` has made, and of the one that it has replaced
_OURS, _REPLACED = "_fxpass_shard", "_fxpass_replaced"
_holders: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of parameters that `shard` has made


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor; does not import what defines it."""
    return any(kind.__name__ == "DTensor" for kind in type(value).__mro__)


def shard_of(value: Any) -> Shard | None:
    """How a parameter of ``fxpass.shard_`` is spread; None for all else, DTensors of others among them."""
    if not is_dtensor(value) or not (getattr(value, _OURS, False) or _is_moved(value)):
        return None
    mesh, (placement,) = value.device_mesh, value.placements
    group = mesh.get_group()
    rows = value.shape[0] if value.ndim else 1
    return Shard(group.group_name, group.size(), group.rank(), rows, whole=not placement.is_shard())


def _is_moved(value: Any) -> bool:
    """Whether a DTensor stands where ``shard`` put one: ``to()`` and ``to_empty()`` make new parameters."""
    if not any(value is param for module in _holders for param in module.parameters(recurse=False)):
        return False
    vars(value)[_OURS] = True
    return True


def part_of(value: Any) -> Any:
    """What this rank holds of a DTensor; anything else as it is."""
    return value._local_tensor if is_dtensor(value) else value


def spread_alike(value: Any, param: Any) -> bool:
    """Whether a tensor is a DTensor of the shape of ``param``, spread as that is."""
    return is_dtensor(value) and value.placements == param.placements and value.shape == param.shape


def like(part: Tensor, param: Any) -> Tensor:
    """A DTensor that is spread as ``param`` is, of which this rank holds ``part``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def mesh_of(group: Any, device: str) -> Any:
    """The mesh of one dimension over a process group; it holds real numbers, whatever is traced."""
    from torch.distributed.device_mesh import DeviceMesh

    with unset_fake_temporarily():
        return DeviceMesh.from_group(group, device)


def shard_module(module: nn.Module, mesh: Any, made: dict[int, Any]) -> None:
    """Put what ``shard`` makes in the place of the module's own parameters; ``made``: so far, by id."""
    _holders.add(module)
    for name, param in list(module.named_parameters(recurse=False, remove_duplicate=False)):
        if id(param) not in made:
            made[id(param)] = param, _shard(param, mesh)
        setattr(module, name, made[id(param)][1])


def _shard(param: nn.Parameter, mesh: Any) -> nn.Parameter:
    """``param`` of the group's first rank, as a parameter of which each rank holds some rows."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as ByRows

    group = mesh.get_group()
    spread = Shard(group.group_name, group.size(), group.rank(), param.shape[0] if param.ndim else 0)
    value = param.detach().contiguous()
    if not is_virtual(value):
        distributed.broadcast(value, group=group, group_src=0)
    if spread.even:
        value = value.narrow(0, spread.start, spread.own).clone()
    placement = ByRows(0) if spread.even else Replicate()
    shape, strides = param.shape, torch.empty(param.shape, device="meta").stride()
    made = DTensor.from_local(value, mesh, [placement], run_check=False, shape=shape, stride=strides)
    new = nn.Parameter(made, requires_grad=param.requires_grad)
    vars(new)[_OURS] = vars(param)[_REPLACED] = True
    return new


def is_replaced(param: Tensor) -> bool:
    """Whether ``shard`` has made another parameter of this one."""
    return getattr(param, _REPLACED, False)


def stand_in_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``wrap_to_fake_tensor_and_record``: of a sharded parameter, a fake tensor of the whole."""

    def wrap_to_fake_tensor_and_record(e: Any, tx: Any, **kwargs: Any) -> Any:
        if shard_of(e) is None:
            return original(e, tx, **kwargs)
        if e.grad is not None:
            hint = "set .grad to None before the step: model.zero_grad()"
            raise fail(CaptureError("a sharded parameter holds a .grad", where=user_line(), hint=hint))
        with tx.fake_mode:
            fake = torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device=e.device)
        fake = nn.Parameter(fake, requires_grad=e.requires_grad)
        context = StatelessSymbolicContext(dynamic_sizes=[builder.DimDynamic.STATIC] * e.ndim)
        tx.output.tracing_context.tensor_to_context[e] = context
        sizes = {"size": fake.size(), "stride": fake.stride()}
        tx.output.input_source_to_sizes_strides[kwargs["source"]] = sizes
        return fake

    return wrap_to_fake_tensor_and_record


HOOKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (builder, "wrap_to_fake_tensor_and_record", stand_in_hook),
]
