"""Gradients computed again after the verdict: the same bits, and none of the first outlives its check."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.ir.graph import Phase, phase, tensor
from fxpass.passes import passes_for
from tests.support.graphs import graph_of, inserted_by, training_step


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.Linear(64, 4))


def train(net: nn.Module, xs: list[Tensor], **options: Any) -> tuple[list[float], list[Tensor]]:
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)

    def step(x: Tensor) -> Tensor:
        loss = net(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    compiled = torch.compile(step, backend=MixedPrecision(codegen="eager", **options))
    torch.manual_seed(1)
    losses = [compiled(x).item() for x in xs]
    state = [v for p in net.parameters() for v in opt.state[p].values()]
    return losses, [p.detach() for p in net.parameters()] + state


@pytest.mark.breadth("first")
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.01}, {"memory_budget": 0.2, "max_norm": 0.01}])
def test_bitwise_the_same_step(options: dict[str, Any]) -> None:
    """Overflow included: the third batch makes gradients infinite, the step is skipped whole."""
    xs = [torch.randn(32, 16) for _ in range(4)]
    xs[2] = xs[2] * 3e4
    base = model()
    plain = train(copy.deepcopy(base), xs, **options)
    released = train(copy.deepcopy(base), xs, release=True, **options)
    torch.testing.assert_close(released[0], plain[0], rtol=0, atol=0, equal_nan=True)
    for a, b in zip(released[1], plain[1], strict=True):
        assert torch.equal(a, b)


def test_no_large_gradient_of_the_first_backward_reaches_an_update() -> None:
    step, args = training_step(nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2)))
    passes = passes_for(MixedPrecision(release=True, max_norm=1.0))
    captured, _ = graph_of(step, args, passes)
    again = set(inserted_by(captured, "second_backward"))
    assert any("mm" in str(n.target) for n in again)
    read = [
        (node, value)
        for node in captured.nodes()
        for value in (node.all_input_nodes if phase(node) is Phase.UPDATE else ())
        if phase(value) in (Phase.BACKWARD, Phase.GRADIENT) and tensor(value).nbytes >= 4096
    ]
    assert read
    for node, value in read:
        assert value in again
        # atomic additions may overflow the second time alone, and the verdict has been spoken
        assert node.target is torch.ops.aten.nan_to_num.default


def test_declines_when_off_and_with_several_backwards() -> None:
    step, args = training_step()
    _, records = graph_of(step, args, passes_for(MixedPrecision()))
    record = next(r for r in records if r.name == "second_backward")
    assert record.inserted == 0
    assert "release is False" in record.declined[0]
    net = nn.Linear(4, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def accumulate(x: Tensor) -> None:
        for part in x.chunk(2):
            net(part).sum().backward()
        opt.step()
        opt.zero_grad()

    _, records = graph_of(accumulate, (torch.randn(4, 4),), passes_for(MixedPrecision(release=True)))
    record = next(r for r in records if r.name == "second_backward")
    assert "2 backwards" in record.declined[0]
