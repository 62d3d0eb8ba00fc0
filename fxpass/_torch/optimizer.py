"""What torch.optim.Optimizer keeps to itself. Written for torch 2.11 to 2.13."""

from __future__ import annotations

from torch.optim.optimizer import _get_value

get_value = _get_value  # the number in a step count, for the ordinary (not capturable) formulas
