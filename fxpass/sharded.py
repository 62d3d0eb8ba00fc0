"""``fxpass.shard_``: a model of whose weights each rank keeps some rows."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn
from torch.nn.parameter import is_lazy

from . import _torch
from .errors import OptionError


def shard_(model: nn.Module, mesh: Any) -> nn.Module:
    """Spread the parameters of ``model`` over the ranks of ``mesh``, in place; returns ``model``.

    Each becomes a ``DTensor`` of which a rank holds some rows (``Shard(0)``), or all where there are too few
    for every rank to get one. Values, and buffers, become those of the mesh's first rank. Call it before the
    optimizer is made; a step compiled with fxpass gathers weights where it needs them, and updates the rows.

    Args:
        model: on its device, or on the meta device.
        mesh: a ``DeviceMesh`` of one dimension, or a ``ProcessGroup``.

    Raises:
        OptionError: no mesh of one dimension, or a parameter that cannot be spread.
    """
    mesh = _mesh(model, mesh)
    for name, param in model.named_parameters():
        if is_lazy(param) or _torch.is_dtensor(param):
            kind = "has no shape yet" if is_lazy(param) else "is a DTensor already"
            hint = "call the model once before" if is_lazy(param) else "shard a model once, by one library"
            raise OptionError(f"shard_: parameter {name} {kind}", hint=hint)
    made: dict[int, Any] = {}
    for module in model.modules():
        _torch.shard_module(module, mesh, made)
    _torch.share_first((b for b in model.buffers() if not _torch.is_virtual(b)), mesh.get_group())
    return model


def _mesh(model: nn.Module, mesh: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(mesh, distributed.ProcessGroup):
        device = next((p.device.type for p in model.parameters() if not p.is_meta), "cpu")
        return _torch.mesh_of(mesh, device)
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        hint = 'make one: torch.distributed.device_mesh.init_device_mesh("cpu", (world_size,))'
        raise OptionError(f"shard_: {mesh!r} is no DeviceMesh of one dimension", hint=hint)
    return mesh
