"""Sizes that depend on data, in the step and inside models, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment  # pyrefly: ignore[untyped-import]
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from fxpass import CaptureError, MixedPrecision
from tests.support.helpers import EAGER, FP32, Training, compare, same, snapshot

# said by torch itself, of attention masks of two kinds
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
EMPTY, INF = 2, float("inf")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.tokens = nn.Embedding(13, 6)
        self.average = nn.BatchNorm1d(8, momentum=None)
        self.rnn = nn.LSTM(6, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def masked(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(m(x)[mask], y[mask], reduction="sum") / mask.sum().clamp(min=1)


def assigned(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    h = m.first(x)
    out = torch.zeros_like(h)
    out[mask] = h[mask].tanh()
    out[~mask] = m.tokens.weight[0, :1].expand(8)
    return F.cross_entropy(m.last(out), y)


def detection(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    h = m(x)
    positive = torch.nonzero(y > 1).squeeze(1)
    boxes = F.smooth_l1_loss(h[positive], x[positive, :5], reduction="sum") / max(positive.numel(), 1)
    hard = torch.masked_select(h, mask[:, None]).pow(2).sum() / 10
    return F.one_hot(y, 5).mul(h).mean() + boxes + hard + h[: int(mask.sum())].pow(2).sum() / 10


def counted(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    values, place, counts = torch.unique(y, return_inverse=True, return_counts=True)
    means = torch.zeros(values.shape[0], 8).index_add(0, place, m.first(x)) / counts[:, None]
    weight = 1 / (1 + torch.bincount(y, minlength=5))
    repeated = torch.repeat_interleave(m.first(x), y, dim=0)
    return F.cross_entropy(m(x), y, weight=weight) + means.pow(2).mean() + repeated.pow(2).sum() / 10


def graph(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    edges = torch.stack([y, y.roll(1)])
    edges = edges[:, edges[0] != edges[1]]
    edges = torch.cat([edges, torch.arange(10).expand(2, 10)], 1)
    degree = torch.zeros(10).scatter_add(0, edges[1], torch.ones(edges.shape[1]))
    norm = (degree[edges[0]] * degree[edges[1]]).rsqrt()
    sent = norm[:, None] * m.first(x).index_select(0, edges[0])
    return F.cross_entropy(m.last(torch.zeros(10, 8).index_add(0, edges[1], sent))[y < 4], y[y < 4])


def cumulative(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(m.last(m.average(m.first(x))), y)


def packed(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    lengths = torch.stack([mask.sum(), (~mask).sum()]).clamp(min=1)
    sequence = pack_padded_sequence(x.expand(2, 10, 6), lengths, batch_first=True, enforce_sorted=False)
    out, (last, _) = m.rnn(sequence)
    out, lengths = pad_packed_sequence(out, batch_first=True)
    return m.head(out.sum(1) / lengths[:, None]).pow(2).mean() + last.pow(2).mean()


def padded(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    h = pad_sequence([m.first(x[mask]), m.first(x[~mask])], batch_first=True)
    return h.pow(2).sum() / 10


def ctc(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    log_probs = m(x)[:, None].log_softmax(-1)
    target = (y[:3] % 4 + 1)[None]
    with torch.backends.cudnn.flags(enabled=False):
        loss = F.ctc_loss(log_probs, target, (10,), [3])  # pyrefly: ignore[bad-argument-type]
    return loss + F.ctc_loss(log_probs, target, torch.tensor([9]), mask[:2].sum()[None].clamp(min=1))


def encoded(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    triangle = nn.Transformer.generate_square_subsequent_mask(10)
    h = m.encoder(m.first(x)[None], triangle)
    return F.cross_entropy(m.last(h)[0][mask], y[mask], reduction="sum") / 10


def indexed(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """With 0-d tensors, for reading and for writing, alone and among others."""
    h, at = m(x), mask.int().argmax()
    weight = torch.ones(10, 5)
    weight[at] = 2.0
    weight[at, y[1]] += x[0, 0]
    weight[:, y[2]] = x[:, 0]
    pairs = (h * weight).view(2, 5, 5)
    return h[at].sum() + pairs[at % 2, :, y[0]].pow(2).mean() + pairs[..., -y[3] - 1].pow(2).mean()


def matched(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    h = m(x)
    with torch.no_grad():
        cost = torch.cdist(h, x[mask, :5]).cpu()
        rows, columns = (torch.as_tensor(i) for i in linear_sum_assignment(cost))
    return F.l1_loss(h[rows], x[mask, :5][columns], reduction="sum") / 10


LOSSES: list[Loss] = [
    masked, assigned, detection, counted, graph, cumulative, packed, padded, ctc, encoded, indexed, matched
]  # fmt: skip


def data(index: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    mask = torch.rand(10, generator=generator) < 0.5
    y = torch.randint(0, 5, (10,), generator=generator)
    y[0] = 4
    return torch.randn(10, 6, generator=generator), y, mask & (index != EMPTY)


def training(loss: Loss) -> Training:
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        value = loss(net, x, y, mask)
        value.backward()
        opt.step()
        opt.zero_grad()
        return value

    return Training(step, [net], [opt], [data(i) for i in range(4)])


UNSIZED = (counted, detection)  # how often rows are repeated, how long a slice is, nobody knows


@pytest.mark.breadth
@pytest.mark.parametrize("loss", [x for x in LOSSES if x not in UNSIZED], ids=lambda x: x.__name__)
def test_follows_eager(loss: Loss) -> None:
    handle = MixedPrecision(**EAGER)
    compare(lambda: training(loss), handle=handle)
    if loss is masked:
        assert set(handle.graphs[0].memory.bounds.values()) == {"at most 10 (index)"}
        assert "counted at their largest" in handle.graphs[0].memory_summary()


def test_by_default() -> None:
    """float16 and Inductor: four kinds in one step, a mask without an element, and an overflow."""
    losses = (masked, detection, indexed, packed)
    handle = MixedPrecision(loss_scale=256.0)
    ours, step = follows(lambda *args: torch.stack([loss(*args) for loss in losses]).mean(), handle)  # pyrefly: ignore[bad-argument-type]
    memory = handle.graphs[0].memory
    assert not memory.missing
    assert "at most 10" in " ".join(memory.bounds.values())
    assert len(handle.graphs) == 1
    before = snapshot(ours)
    x, y, mask = data(1)
    step(x * INF, y, mask)
    same(snapshot(ours), before, "state", exact=True)
    assert (handle.stats().steps, handle.stats().skipped) == (5, 1)


@pytest.mark.slow
def test_what_has_no_bound() -> None:
    handle = MixedPrecision(loss_scale=256.0, codegen="eager")
    follows(lambda *args: detection(*args) + counted(*args), handle)  # pyrefly: ignore[bad-argument-type]
    assert handle.graphs[0].memory.unsized
    assert "not counted" in handle.graphs[0].memory_summary()


def follows(loss: Loss, handle: MixedPrecision) -> tuple[Training, Callable[..., Any]]:
    """The losses and parameters of four steps are those of eager float32 to float16's rounding."""
    torch.compiler.reset()
    torch.manual_seed(0)
    theirs = training(loss)
    torch.manual_seed(0)
    ours = training(loss)
    step = torch.compile(ours.step, backend=handle)
    expected, found = theirs.run(theirs.step), ours.run(step)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
    for a, b in zip(ours.models[0].parameters(), theirs.models[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert (handle.stats().steps, handle.stats().skipped) == (4, 0)
    return ours, step


@pytest.mark.parametrize("options", [FP32, EAGER], ids=["inductor", "eager"])
def test_sizes_that_an_operator_compares_are_checked_before_anything_is_written(
    options: dict[str, Any],
) -> None:
    torch.compiler.reset()

    def loss(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        h = nn.functional.batch_norm(m.first(x), m.average.running_mean, m.average.running_var, training=True)
        return F.cross_entropy(m.last(h), y % 5, weight=1.0 / (1 + torch.bincount(y, minlength=5)))

    ours = training(loss)
    step = torch.compile(ours.step, backend=MixedPrecision(**options))
    x, y, mask = data(0)
    step(x, y, mask)
    before = snapshot(ours)
    with pytest.raises((RuntimeError, AssertionError)):  # Inductor's own check is the other
        step(x, y + 5, mask)
    same(snapshot(ours), before, "state", exact=True)


@pytest.mark.parametrize("known", [False, True], ids=["refused", "as the hint says"])
def test_a_python_list_of_unknown_length(known: bool) -> None:
    def loss(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        counts = torch.bincount(y, minlength=5)
        parts = m(x).split((counts[:5] if known else counts).tolist())
        return torch.stack([part.pow(2).sum() / 10 for part in parts]).mean()

    if known:
        follows(loss, MixedPrecision(**EAGER))
        return
    ours = training(loss)
    with pytest.raises(CaptureError, match=r"(?s)test_data_sizes.py.*\[:5\]"):
        torch.compile(ours.step, backend=MixedPrecision(**EAGER))(*data(0))
