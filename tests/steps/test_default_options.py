"""Every option as users run it: code made by Inductor against the graph run operator by operator.

Five calls of one step, an overflow in the third; what each option does is
tested beside its pass, here that the code that is made of it does the same.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fxpass import DynamicLossScale, MixedPrecision
from tests.support.helpers import Mlp, batches, clone

# each of them once, two that have nothing to do with each other in one step
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "bfloat16, unverified": {"dtype": "bfloat16", "loss_scale": 8.0, "verify": False},
    "growing scale, clip_value": {
        "loss_scale": DynamicLossScale(init_scale=2.0**10, growth_interval=1),
        "clip_value": 0.01,
    },
    "headroom": {"loss_scale": "headroom"},
    "static scale, max_norm": {"loss_scale": 128.0, "max_norm": 0.1},
    "largest element, a float32 module": {"max_norm": 0.1, "norm_type": math.inf, "keep_fp32": ("last",)},
    "norm of each, kept gradients": {"max_norm": 0.1, "clip_per": "parameter", "grads": "keep"},
    "norm of a group, a setting of Inductor's": {
        "max_norm": 0.1,
        "clip_per": "group",
        "inductor": {"epilogue_fusion": False},
    },
    "norm of an optimizer, budget": {"max_norm": 0.1, "clip_per": "optimizer", "memory_budget": 0.1},
    "adaptive_clip, no outline": {"adaptive_clip": 0.05, "outline": "off"},
    "skip by tensor": {"skip": "tensor"},
    "release": {"release": True, "max_norm": 0.1},
}
CALLS = batches(5)


def _train(options: dict[str, Any], codegen: str) -> tuple[dict[str, Any], MixedPrecision]:
    torch.manual_seed(0)
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    options = {k: v for k, v in options.items() if codegen == "inductor" or k != "inductor"}
    mp = MixedPrecision(**{"loss_scale": 256.0, **options, "codegen": codegen})  # pyrefly: ignore[bad-argument-type]

    @torch.compile(backend=mp)
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    for call, (x, y) in enumerate(CALLS):
        before = clone(dict(net.state_dict()))
        step(x * math.inf if call == 2 else x, y)
        if call == 2:
            assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "skipped exactly"
    return clone(dict(net.state_dict())), mp


@pytest.mark.breadth("first")
@pytest.mark.parametrize("name", OPTIONS)
def test_made_code_does_what_the_graph_says(name: str) -> None:
    made, mp = _train(OPTIONS[name], "inductor")
    run, other = _train(OPTIONS[name], "eager")
    for key, value in run.items():
        message = lambda text, k=key: f"{k}: {text}"  # noqa: E731
        torch.testing.assert_close(made[key], value, rtol=2e-3, atol=2e-3, msg=message)
    ours, theirs = mp.stats(), other.stats()
    assert ours.steps == theirs.steps == len(CALLS)
    assert ours.skipped == theirs.skipped == (2 if name == "headroom" else 1)  # which starts too high
    assert (ours.scale, ours.clipped) == (theirs.scale, theirs.clipped)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.01)
