"""Normalisations, softmax and dropout of forward by their parts: the same values, fewer kept bytes."""

from __future__ import annotations

import torch
from torch import nn

from fxpass.passes.decompose import Decompose
from tests.support.graphs import graph_of, targets, training_step


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.group = nn.LayerNorm(4), nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.rms(self.group(self.norm(x)))
        return torch.log_softmax(self.head(self.drop(h)), -1)


def test_splits_forward_only() -> None:
    step, args = training_step(Net())
    before = targets(list(graph_of(step, args)[0].nodes()))
    step, args = training_step(Net())
    captured, (record,) = graph_of(step, args, [Decompose()])
    after = targets(list(captured.nodes()))
    whole = {"aten.native_layer_norm.default", "aten.native_group_norm.default", "aten._log_softmax.default"}
    assert whole <= set(before)
    assert not whole & set(after)
    assert "aten.native_layer_norm_backward.default" in after
    assert record.inserted > record.removed > 0


def test_dropout_becomes_a_product_with_its_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    step, args = training_step(model)
    captured, _ = graph_of(step, args, [Decompose()])
    random = [n for n in captured.nodes() if "native_dropout.default" in str(n.target)]
    assert len(random) == 1
    assert [u.args[1] for u in random[0].users] == [1], "only the mask is read"


def test_the_graph_computes_the_same() -> None:
    results = []
    for passes in ([], [Decompose()]):
        torch.manual_seed(0)
        step, args = training_step(Net())
        captured, _ = graph_of(step, args, passes)
        inputs = [
            torch.full(v.shape, 0.5, dtype=v.dtype)
            if v.dtype.is_floating_point
            else torch.ones_like(v, device="cpu")
            for v in (n.meta["val"] for n in captured.graph.nodes if n.op == "placeholder")
        ]
        torch.manual_seed(1)
        results.append(captured.gm(*inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_declines_without_a_backward() -> None:
    model = Net().eval()
    with torch.no_grad():
        _, (record,) = graph_of(lambda x: model(x), (torch.randn(6, 4),), [Decompose()])
    assert record.declined == ("no backward",)
