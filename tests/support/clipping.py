"""Compare the clip options with functions on eager gradients, in the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.ir.graph import StepGraph
from fxpass.ir.marks import GRAD, MARK, READ
from fxpass.runtime.state import StepStats

Clip = Callable[[torch.optim.Optimizer], Any]


def small_net() -> nn.Module:
    """Four parameters of three shapes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter of the optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def compare_with_torch(
    options: dict[str, Any],
    clip: Clip,
    *,
    factor: float = 1.0,
    model: Callable[[], nn.Module] = small_net,
    groups: Callable[[nn.Module], Any] = lambda model: model.parameters(),
    codegen: str = "eager",
    rtol: float = 1e-5,
) -> StepStats:
    """Five steps with ``options``, and eagerly with ``clip`` before the update; the parameters must agree."""
    ours = model()
    theirs = copy.deepcopy(ours)
    mp = MixedPrecision(**{"dtype": "float32", "codegen": codegen, **options})  # pyrefly: ignore[bad-argument-type]
    opts = [torch.optim.SGD(groups(m), lr=0.05) for m in (ours, theirs)]

    def step(x: Tensor) -> None:
        (ours(x).square().sum() * factor).backward()
        opts[0].step()
        opts[0].zero_grad()

    compiled = torch.compile(step, backend=mp)
    for _ in range(5):
        x = torch.randn(6, 4)
        compiled(x)
        (theirs(x).square().sum() * factor).backward()
        clip(opts[1])
        opts[1].step()
        opts[1].zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol / 10)
    return mp.stats()


def gradients_behind(step: StepGraph) -> list[set[Any]]:
    """For each gradient as its optimizer reads it, the indices of the gradients its value depends on."""
    found = []
    for read in step.marks(READ):
        seen, stack = set(), [read]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += [] if node.target is MARK and node.args[1] == GRAD else node.all_input_nodes
        found.append({n.args[2] for n in seen if n.target is MARK and n.args[1] == GRAD})
    return found
