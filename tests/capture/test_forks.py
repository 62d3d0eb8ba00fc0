"""Branches on values that the step computes, in models and in the step, against eager PyTorch."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpass import CaptureError, MixedPrecision
from tests.support.helpers import EAGER, FP32, Training, compare

INF = float("inf")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.seen = nn.Buffer(torch.zeros(()))


def clamped(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    if not torch.isfinite(h).all() or h.abs().max() > 2.0:
        h = torch.clamp(torch.nan_to_num(h), -1.0, 1.0)
    return m.last(h)


def normalised(m: Any, x: Tensor) -> Tensor:
    """The side that is not taken divides zero by zero."""
    h = m.first(x) * x.abs().max()
    norm = h.norm()
    if norm > 0:
        h = h / norm
    else:
        h = h + m.first.bias
    return m.last(h)


def refused_input(m: Any, x: Tensor) -> Tensor:
    if x.max() >= 100:
        raise ValueError(f'inputs are "below" {100}')
    return m.last(m.first(x))


def refused_deep(m: Any, x: Tensor) -> Tensor:
    """Refused on one side only, which most batches do not take."""
    h = m.first(x)
    if x.max() >= 100:
        if x.min() <= 0:
            raise ValueError("large inputs are positive")
        h = h / 100
    return m.last(h)


def stopped(m: Any, x: Tensor) -> Tensor:
    """As training loops guard themselves; what is said on the way to the exit is not said."""
    h = m.first(x)
    value = h.mean().item()
    if not math.isfinite(value):
        print(f"the mean is {value}: stopping")
        sys.exit(1)
    return m.last(h)


def returned(m: Any, x: Tensor) -> Tensor:
    def part(h: Tensor) -> Tensor:
        for i in range(3):
            if h[i].mean() > 0.1 * i:
                return h * (i + 1)
        return torch.relu(h)

    return m.last(part(m.first(x)))


def by_size(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    rows = (x[:, 0] > 0.5).nonzero()
    if rows.size(0) > 0:
        picked = h[rows[:, 0]]
        return F.mse_loss(picked, torch.zeros_like(picked)) + m.last(h)
    return m.last(h) * 0.5


def by_number(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    factor = 1.0
    if h.mean().item() > 0.0:
        factor = 0.25
    return m.last(h * factor if x.mean() > 0 and h.max() > 0.3 else h)


def continued(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    for i in range(3):
        with torch.no_grad():
            size = h.detach().abs().mean()
        if size < 0.2 * i:
            continue
        h = h - 0.1 * h.tanh()
    return m.last(h)


def written_behind(m: Any, x: Tensor) -> Tensor:
    """Both sides make their own tensor: it may be written."""
    h = m.first(x)
    out = h.tanh() if h.mean() > 0 else h.sin()
    return m.last(out.mul_(2.0))


def training(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[], Training]:
    def build() -> Training:
        torch.manual_seed(3)
        net = Net()
        opt = torch.optim.AdamW(net.parameters(), lr=1e-2)

        def step(x: Tensor) -> Tensor:
            opt.zero_grad()
            loss = forward(net, x).pow(2).mean()
            loss.backward()
            opt.step()
            return loss

        calls = [(torch.randn(5, 4),), (-torch.rand(5, 4),), (torch.zeros(5, 4),), (torch.randn(5, 4) * 9,)]
        return Training(step, [net], [opt], calls)

    return build


FORMS = (
    clamped, normalised, refused_input, refused_deep, stopped, returned, by_size, by_number, continued,
    written_behind,
)  # fmt: skip


@pytest.mark.breadth
@pytest.mark.parametrize("forward", FORMS)
def test_as_eager(forward: Any) -> None:
    compare(training(forward), handle=MixedPrecision(**EAGER))


@pytest.mark.breadth(4)
@pytest.mark.parametrize("forward", [clamped, normalised, refused_deep, by_size])
def test_as_eager_by_default(forward: Any) -> None:
    compare(training(forward), handle=MixedPrecision(**FP32))


@pytest.mark.slow
def test_the_side_not_taken_is_no_overflow() -> None:
    """In float16, with the default options: 0 / 0 on the other side skips nothing."""
    torch.compiler.reset()
    run = training(normalised)()
    mp = MixedPrecision(loss_scale=8.0)
    step = torch.compile(run.step, backend=mp)
    for x in (torch.zeros(5, 4), torch.randn(5, 4)):
        step(x)
    assert (mp.stats().steps, mp.stats().skipped) == (2, 0)


@pytest.mark.breadth
@pytest.mark.parametrize("forward", [refused_input, refused_deep, stopped])
@pytest.mark.parametrize("options", [FP32, EAGER], ids=["inductor", "eager"])
def test_a_side_that_raises_writes_nothing(forward: Any, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    run = training(forward)()
    before = [p.detach().clone() for p in run.models[0].parameters()]
    x = torch.linspace(-300, 300, 20).view(5, 4)
    x[0, 0] = INF if forward is stopped else -300
    with pytest.raises(RuntimeError, match=r"below|large inputs are positive|SystemExit"):
        torch.compile(run.step, backend=MixedPrecision(**options))(x)
    assert all(map(torch.equal, before, run.models[0].parameters()))


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    if h.mean() > 0:
        h.mul_(2.0)
    return m.last(h)


def counted(m: Any, x: Tensor) -> Tensor:
    if x.mean() > 0:
        m.seen.add_(1)
    return m.last(m.first(x))


def counted_behind_data(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    if h.mean() > 0:
        m.seen.data.add_(1)  # which has a version of its own
    return m.last(h)


def statistics(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    return m.last(m.norm(h) if h.mean() > 0 else h)


def appended(m: Any, x: Tensor) -> Tensor:
    parts = [m.first(x)]
    if parts[0].mean() > 0:
        parts.append(parts[0] * 2)
    return m.last(sum(parts))


def two_shapes(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    if h.mean() > 0:
        h = h[:2]
    return m.last(h)


def looped(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    while h.norm() > 1:
        h = h * 0.5
    return m.last(h)


def detached_behind(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    with torch.no_grad():
        if h.mean() > 0:
            h = h * 2
    return m.last(h)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (in_place, "writes to a tensor in place"),
        (counted_behind_data, "writes to a tensor in place"),
        (statistics, "writes to a tensor in place"),
        (appended, "changes what other code reads"),
        (two_shapes, "different shapes"),
        (looped, "how often a loop runs"),
        (detached_behind, "gradients are switched off"),
    ],
)
def test_what_cannot_be_a_select_is_refused(forward: Any, why: str) -> None:
    torch.compiler.reset()
    run = training(forward)()
    step = torch.compile(run.step, backend=MixedPrecision(**EAGER))
    with pytest.raises(CaptureError, match=rf"depends on a value(?s:.*){why}(?s:.*){__file__}"):
        step(torch.randn(5, 4))


def first_time(m: Any, x: Tensor) -> Tensor:
    """A flag in a buffer: what is made from the first batch."""
    h = m.first(x)
    if not m.seen.bool():
        m.last.bias.data.copy_(-h.detach().mean(0)[:2])
        m.seen.fill_(1)
    return m.last(h)


def as_often_as_given(m: Any, x: Tensor) -> Tensor:
    """A loop that numbers of the batch end, written by an operator and by a function with a flag for it."""
    sizes = torch.ones(3)
    sizes[1:] = x[0, :2]
    F.relu(sizes, inplace=True)
    h, i = m.first(x), 0
    while i < 3 and sizes[i] > 0:
        h, i = h * sizes[i], i + 1
    return m.last(h) if i > 1 else m.last(h.tanh())


def without_any(m: Any, x: Tensor) -> Tensor:
    """No rows at all is another shape."""
    rows = torch.nonzero(x[:, 0] > 0).squeeze(1)
    if len(rows) == 0:
        return m.last(m.first(x))
    return m.last(m.first(x)[rows])


@pytest.mark.breadth(4)
@pytest.mark.parametrize(
    ("forward", "graphs"), [(first_time, 2), (counted, 2), (as_often_as_given, 2), (without_any, 2)]
)
def test_what_the_step_is_given_decides(forward: Any, graphs: int) -> None:
    """No select is possible: the answer is a guard, asked before each call."""
    compare(training(forward), graphs=graphs, handle=MixedPrecision(**EAGER))


@pytest.mark.slow
def test_what_the_step_is_given_decides_by_default() -> None:
    compare(training(first_time), graphs=2, handle=MixedPrecision(**FP32))


def test_random_numbers_do_not_decide_beforehand() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if torch.rand(()) + x.mean() > 0.5:
            m.seen.add_(1)
        return m.last(m.first(x))

    torch.compiler.reset()
    step = torch.compile(training(forward)().step, backend=MixedPrecision(**EAGER))
    with pytest.raises(CaptureError, match="depends on a value"):
        step(torch.randn(5, 4))


def test_data_assigned_to_itself_changes_nothing() -> None:
    """Libraries move their parameters in each forward, and mostly they are there."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.last.weight.data = m.last.weight.data.to(x.device)
        return m.last(m.first(x))

    compare(training(forward), handle=MixedPrecision(**EAGER))


def test_a_library_s_function_behind_a_break_names_the_user_s_line() -> None:
    library: dict[str, Any] = {"torch": torch}
    path = "/somewhere/site-packages/library.py"
    source = "def loss_of(m, x):\n    torch._dynamo.graph_break()\n    return inner(m, x)\n"
    source += "def inner(m, x):\n    h = m.last(m.first(x))\n    return h[h > 0].tolist(), h.mean()\n"
    exec(compile(source, path, "exec"), library)

    def forward(m: Any, x: Tensor) -> Tensor:
        return library["loss_of"](m, x)[1]

    torch.compiler.reset()
    step = torch.compile(training(forward)().step, backend=MixedPrecision(**EAGER))
    with pytest.raises(CaptureError, match=rf"where: {__file__}:\d+ in forward(?s:.*)\(in {path}"):
        step(torch.randn(5, 4))


def test_another_name_for_a_tensor_is_not_written_behind_a_branch() -> None:
    """In eager the write would reach ``h`` as well, if the branch is not taken."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        out = h.tanh() if h.mean() > 0 else h
        return m.last(out.mul_(2.0) + h)

    torch.compiler.reset()
    run = training(forward)()
    step = torch.compile(run.step, backend=MixedPrecision(**EAGER))
    with pytest.raises(CaptureError, match=r"branch on data is written in place(?s:.*)clone"):
        step(torch.randn(5, 4))


def test_a_module_made_inside_the_step() -> None:
    """With a buffer, and a method under ``no_grad``: the losses of transformers' detection models."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.ones(2)
            weight[-1] = 0.5
            self.weight = nn.Buffer(weight)

        @torch.no_grad()
        def best(self, out: Tensor) -> Tensor:
            if not (out < 1000).all():
                raise ValueError("too large")
            return (out * self.weight).argmax(1)

        def forward(self, out: Tensor) -> Tensor:
            return F.cross_entropy(out, self.best(out), self.weight)

    compare(training(lambda m, x: Weighted()(m.last(m.first(x)))), handle=MixedPrecision(**EAGER))


def test_an_exception_that_is_caught_is_no_assertion() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with contextlib.suppress(ValueError):
            refused_input(m, x)
        return m.last(m.first(x))

    torch.compiler.reset()
    run = training(forward)()
    mp = MixedPrecision(**EAGER)
    torch.compile(run.step, backend=mp)(torch.full((5, 4), 200.0))
    assert mp.stats().steps == 1
