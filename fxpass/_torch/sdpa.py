"""The step says which kernels attention may use: ``torch.nn.attention.sdpa_kernel``.

Written for torch 2.11 to 2.13; the hook is active only inside ``dynamo.py``'s patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.variables import ctx_manager
from torch.fx import Node
from torch.nn.attention import SDPBackend


def _enter_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where flash attention alone is allowed the memory-efficient kernel is, too, while the step is traced.

    CUDA's flash attention takes half precision, and the trace is in float32. The
    attention pass puts flash attention there.
    """

    def enter(self: Any, tx: Any) -> Any:
        if SDPBackend.FLASH_ATTENTION in self.target_values:
            self.target_values = [*dict.fromkeys((*self.target_values, SDPBackend.EFFICIENT_ATTENTION))]
        return original(self, tx)

    return enter


HOOKS = ((ctx_manager.SDPAKernelVariable, "enter", _enter_hook),)


def allowed_kernels(node: Node) -> set[str] | None:
    """The names of the kernels that attention may use from this node of Dynamo's graph on, if it says so."""
    if node.target is not torch.nn.attention._sdpa_kernel:
        return None
    backends: Any = node.args[0]
    return {str(n.args[0]) if isinstance(n, Node) else SDPBackend(n).name for n in backends}
