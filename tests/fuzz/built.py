"""What a program's build() hands over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class Built:
    """A step, and all that it changes."""

    step: Callable[..., Any]
    before: Callable[[int], None]  # what the host does before a call
    models: list[nn.Module]
    optimizers: list[Optimizer]
    extras: dict[str, Tensor | list[Tensor]]
    tainted: tuple[str, ...]  # extras that depend on gradients: a skipped step leaves them alone
    exact: tuple[str, ...]  # extras that no dtype may round
    together: bool  # all optimizers read the gradients of the same backward

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the parameters, buffers, optimizer state and extras."""
        found: dict[str, Any] = {}
        for number, model in enumerate(self.models):
            found |= {f"model {number}: {name}": t for name, t in model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizer {number}: {index}.{key}": value for key, value in state.items()}
        for name, value in self.extras.items():
            entries = value if isinstance(value, list) else [value]
            found |= {f"extra {name} {index}": entry for index, entry in enumerate(entries)}
        return {name: as_tensor(value) for name, value in found.items() if value is not None}


def as_tensor(value: Any) -> Tensor:
    """A copy of a tensor, or a number as one, in float64."""
    import torch

    if isinstance(value, Tensor):
        return value.detach().clone().double()
    return torch.tensor(float(value), dtype=torch.float64)
