"""Which parameter's gradient was not finite, when, and how large and small gradients are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fxpass import Diagnosis, DynamicLossScale, MixedPrecision
from tests.support.graphs import graph_of, inserted_by, training_step
from tests.support.helpers import Mlp

INF, NAN = math.inf, math.nan
NAMES = [name for name, _ in Mlp().named_parameters()]


class Probed:
    """A step of ``Mlp`` that adds a given number to the gradient of any parameter's first element."""

    def __init__(self, **options: object) -> None:
        self.model = Mlp()
        self.mp = MixedPrecision(codegen="eager", **options)  # pyrefly: ignore[bad-argument-type]
        opt = torch.optim.SGD(self.model.parameters(), lr=0.1)
        params = dict(self.model.named_parameters())

        def step(x: Tensor, extra: Tensor) -> None:
            loss = self.model(x).square().mean()
            for number, name in enumerate(NAMES):
                loss = loss + params[name].flatten()[0] * extra[number]
            loss.backward()
            opt.step()
            opt.zero_grad()

        self.compiled = torch.compile(step, backend=self.mp)

    def __call__(self, **extra: float) -> None:
        values = [extra.get(name.replace(".", "_"), 0.0) for name in NAMES]
        self.compiled(torch.randn(6, 4), torch.tensor(values))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_names_the_one_parameter_whose_gradient_is_not_finite(value: float) -> None:
    step = Probed()
    for number, name in enumerate(NAMES):
        step()
        step(**{name.replace(".", "_"): value})
        kind = "nan" if math.isnan(value) else "inf"
        assert step.mp.stats().nonfinite == (f"{name}: {kind}",)
        (row,) = [row for row in step.mp.diagnosis() if row.name == name]
        assert (row.first_step, row.first_kind, row.times) == (2 * number + 2, kind, 1)
    first = step.mp.diagnosis().first
    assert first is not None
    assert first.name == NAMES[0]


def test_the_first_in_backwards_order_is_named_first() -> None:
    """Not finite in the loss's own layer, every gradient behind it is so too."""
    step = Probed()
    step.compiled(torch.full((6, 4), INF), torch.zeros(len(NAMES)))
    first = step.mp.diagnosis().first
    assert first is not None
    assert first.name.startswith("last.")
    assert len(step.mp.stats().nonfinite) == len(NAMES)


def test_first_and_last_step_and_kind_are_kept() -> None:
    step = Probed()
    for extra in (0.0, INF, 0.0, NAN, 0.0):
        step(norm_bias=extra)
    row = step.mp.diagnosis()[0]
    assert (row.name, row.first_step, row.first_kind) == ("norm.bias", 2, "inf")
    assert (row.last_step, row.last_kind, row.times) == (4, "nan", 2)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_largest_magnitudes_are_unscaled_with_the_scale_of_their_own_step(dtype: str) -> None:
    weight = nn.Parameter(torch.zeros(1, 2))
    opt = torch.optim.SGD([weight], lr=0.0)
    policy = DynamicLossScale(init_scale=4.0, growth_interval=1)
    mp = MixedPrecision(codegen="eager", dtype=dtype, loss_scale=policy)

    @torch.compile(backend=mp)
    def step(slope: Tensor) -> None:
        (nn.functional.linear(torch.tensor([[1.0, -3.0]]), weight).float() * slope).sum().backward()
        opt.step()
        opt.zero_grad()

    for slope, largest, peak in ((2.0, 6.0, 6.0), (1.0, 3.0, 6.0), (INF, INF, 6.0), (4.0, 12.0, 12.0)):
        step(torch.tensor(slope))
        (row,) = mp.diagnosis()
        assert (row.largest, row.peak) == (largest, peak)
        assert mp.stats().largest == largest
    assert mp.scale.item() == 16.0  # it moved after every one of them


@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_underflow_is_the_share_that_eager_float16_loses(scale: float) -> None:
    """Counted on the true gradient in float32, times the scale, cast to float16."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 64))
    opt = torch.optim.SGD([weight], lr=0.0)
    mp = MixedPrecision(codegen="eager", loss_scale=scale)
    rows = torch.logspace(-9, 0, 64)

    def loss(weight: Tensor) -> Tensor:
        return (nn.functional.linear(torch.ones(1, 64), weight).float() * rows).sum()

    @torch.compile(backend=mp)
    def step() -> None:
        loss(weight).backward()
        opt.step()
        opt.zero_grad()

    step()
    (true,) = torch.autograd.grad(loss(weight), [weight])
    stored = (true * scale).half().float()
    lost = (stored.abs() < torch.finfo(torch.float16).smallest_normal) & (true != 0)
    stats = mp.stats()
    assert stats.underflow == pytest.approx(lost.float().mean().item())
    assert stats.zeros == pytest.approx((stored == 0).float().mean().item())
    assert (stats.underflow > 0.5) == (scale == 1.0)


def test_underflow_of_a_large_gradient_is_that_of_a_sample_of_rows() -> None:
    weight = nn.Parameter(torch.zeros(1024, 128))
    opt = torch.optim.SGD([weight], lr=0.0)
    mp = MixedPrecision(codegen="eager", loss_scale=1.0)
    rows = 10.0 ** (6 * torch.rand(1024, 1) - 7)

    @torch.compile(backend=mp)
    def step() -> None:
        out = nn.functional.linear(torch.ones(1, 128), weight)
        (out.float() * rows.t()).sum().backward()
        opt.step()
        opt.zero_grad()

    step()
    exact = (rows.half() < torch.finfo(torch.float16).smallest_normal).float().mean().item()
    assert 0.2 < exact < 0.8
    assert mp.stats().underflow == pytest.approx(exact, abs=0.15)
    assert mp.stats().underflow != exact


def test_a_parameter_that_is_itself_not_finite_is_marked() -> None:
    step = Probed()
    step()
    with torch.no_grad():
        step.model.norm.weight[3] = NAN
    step()
    states = {row.name: row.weight for row in step.mp.diagnosis()}
    assert states == {name: "nan" if name == "norm.weight" else "" for name in NAMES}


def test_the_table_as_text_and_for_rich() -> None:
    from rich.console import Console

    step = Probed()
    step(first_weight=INF)
    diagnosis = step.mp.diagnosis()
    head, first, *rest = str(diagnosis).splitlines()
    assert head.split()[:3] == ["name", "first", "step"]
    assert first.split()[:3] == ["first.weight", "1", "inf"]
    assert len(rest) == len(NAMES) - 1
    console = Console(width=200)
    with console.capture() as captured:
        console.print(diagnosis)
    assert "first.weight" in captured.get()


def test_nothing_is_known_before_the_first_step() -> None:
    mp = MixedPrecision()
    assert mp.diagnosis() == Diagnosis()
    assert mp.diagnosis().first is None
    assert str(mp.diagnosis()).startswith("name")
    assert mp.stats().nonfinite == ()


def test_stats_as_a_flat_dict() -> None:
    step = Probed()
    step(last_bias=INF)
    flat = step.mp.stats()._asdict()
    contract = "steps skipped consecutive_skipped scale growth_tracker grad_norm clipped nonfinite"
    assert list(flat)[:8] == contract.split()
    assert all(isinstance(value, (int, float, str)) for value in flat.values())
    assert flat["nonfinite"] == "last.bias: inf"


def test_a_few_values_per_gradient_and_nothing_of_a_gradients_size() -> None:
    from fxpass.passes import passes_for
    from fxpass.passes.results import Checked

    mp = MixedPrecision(max_norm=1.0)
    graph, _ = graph_of(*training_step(), passes_for(mp))
    made = inserted_by(graph, "diagnose")
    assert made
    assert max(node.meta["val"].numel() for node in made) <= 16 * len(graph.result(Checked).gradients)
    again = MixedPrecision(dtype="bfloat16")
    bare, _ = graph_of(*training_step(), passes_for(again))
    assert not bare.result(Checked).tiny, "no float16, no underflow to count"


def test_one_row_per_parameter_told_apart_across_models() -> None:
    mp, alive = MixedPrecision(codegen="eager", loss_scale=128.0), []
    for factor in (1.0, math.inf):
        net = nn.Linear(4, 2)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        @torch.compile(backend=mp)
        def step(x: Tensor, net: nn.Module = net, opt: torch.optim.Optimizer = opt) -> None:
            net(x).square().mean().backward()
            opt.step()
            opt.zero_grad()

        alive.append((net, opt))
        step(torch.ones(3, 4) * factor)
    rows = {row.name: row.times for row in mp.diagnosis()}
    assert rows == {"weight": 0, "bias": 0, "weight (2)": 1, "bias (2)": 1}


def test_two_models_of_one_step_have_names_of_their_own() -> None:
    maker, critic = nn.Linear(4, 4), nn.Linear(4, 2)
    opts = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (maker, critic)]
    mp = MixedPrecision(codegen="eager", loss_scale=128.0)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        critic(maker(x)).square().mean().backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()

    step(torch.ones(3, 4))
    names = {row.name for row in mp.diagnosis()}
    assert names == {"maker.weight", "maker.bias", "critic.weight", "critic.bias"}
