"""Functions that stand in graphs under private names, and questions that only private calls answer."""

from __future__ import annotations

import torch
from torch import Tensor

set_grad_enabled = torch._C._set_grad_enabled  # what Dynamo writes for torch.no_grad and its kin
enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast


def storage_id(tensor: Tensor) -> int:
    """Equal for tensors that lie in one storage, fake ones too."""
    return tensor.untyped_storage()._cdata


def has_modes() -> bool:
    """Whether a mode that torch functions or operators go through is active."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())
