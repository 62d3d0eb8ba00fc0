"""What torch.compile and Dynamo keep to themselves: the backend of a compiled function, input names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext
from torch.fx import Node

_ACCESS = re.compile(
    r"\._modules\['([^']+)'\]|\._parameters\['([^']+)'\]|\._buffers\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)"
)


def backend_of(compiled: Callable[..., Any]) -> Any | None:
    """The compiler function that ``torch.compile`` was given for ``compiled``, None if it is not compiled."""
    context = compiled.dynamo_ctx if isinstance(compiled, OptimizedModule) else _context_of(compiled)
    if context is None:
        return None
    return innermost(context.callback)


def innermost(backend: Any) -> Any:
    """The object that ``torch.compile`` was given or made, inside Dynamo's wrappers."""
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def _context_of(compiled: Callable[..., Any]) -> _TorchDynamoContext | None:
    function = getattr(compiled, "__func__", compiled)
    cells = [*(getattr(function, "__closure__", None) or ())]
    getter = getattr(function, "get_compiler_config", None)
    cells += [*(getattr(getter, "__closure__", None) or ())]
    for cell in cells:
        if isinstance(cell.cell_contents, _TorchDynamoContext):
            return cell.cell_contents
    return None


def source_name(node: Node) -> str:
    """A readable name of a Dynamo input: ``model.layers.0.weight`` for a parameter of a global ``model``."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)
    return readable_name(source.name)


def readable_name(expression: Any) -> str:
    """``model.layers.0`` for what Dynamo calls ``L['model']._modules['layers']._modules['0']``."""
    name = str(expression() if callable(expression) else expression)  # a method in torch 2.11
    parts = [next(g for g in m.groups() if g is not None) for m in _ACCESS.finditer(name)]
    return ".".join(parts) or name


def is_argument(node: Node) -> bool:
    """Whether a Dynamo input is data given to the compiled function: no parameter or buffer of a module."""
    source: Any = getattr(node, "_dynamo_source", None)
    name = str(source.name() if callable(getattr(source, "name", "")) else getattr(source, "name", ""))
    while hasattr(source, "base"):
        source = source.base
    argument = getattr(source, "is_input", False) and not getattr(source, "is_derefed_cell_contents", False)
    return bool(argument) and "._buffers[" not in name and "._parameters[" not in name
