"""The memory profile as a value, against hand counts, and against what a step really allocates."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import fxpass
from bench import measure, models
from fxpass.analysis.memory import PHI, LiveTensor, MemoryProfile, Moment, graph_profile
from fxpass.hallway.dry_run import dry_run
from fxpass.ir.graph import Phase, Role, StepGraph
from fxpass.lower import callable as lowering
from tests.support.helpers import Mlp, batches

aten = torch.ops.aten


def by_hand() -> StepGraph:
    """c = relu(x @ w), where x is [3, 2], w is [2, 5]; then the sum of c's square."""
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    values: dict[Any, Tensor] = {x: torch.ones(3, 2), w: torch.ones(2, 5)}
    product = graph.call_function(aten.mm.default, (x, w))
    relu = graph.call_function(aten.relu.default, (product,))
    view = graph.call_function(aten.view.default, (relu, [15]))
    square = graph.call_function(aten.mul.Tensor, (view, view))
    total = graph.call_function(aten.sum.default, (square,))
    graph.output((total,))
    for node in graph.nodes:
        node.meta["fxpass_phase"] = Phase.INPUT if node.op == "placeholder" else Phase.FORWARD
        if node.op == "call_function":
            values[node] = node.target(
                *(values.get(a, a) for a in node.args if not isinstance(a, list)),
                *(a for a in node.args if isinstance(a, list)),
            )
        node.meta["val"] = values.get(node)
    roles = {x: Role.INPUT, w: Role.PARAMETER}
    return StepGraph(torch.fx.GraphModule(nn.Module(), graph), roles=roles, names={w: "layer.weight"})


def test_a_graph_counted_by_hand() -> None:
    profile = graph_profile(by_hand())
    inputs, c = 24 + 40, 3 * 5 * 4
    assert profile.totals == [inputs + c, inputs + 2 * c, inputs + c, inputs + 2 * c, inputs + c + 4]
    assert profile.peak.moment == Moment(1, "relu_default", "forward")
    assert profile.peak.bytes == inputs + 2 * c
    assert profile.persistent == inputs
    assert profile.transient == 2 * c
    assert [t.name for t in profile.live(2)] == ["relu_default", "layer.weight", "x"]
    assert profile.by_role(4) == {"input": 24, "parameter": 40, "temporary": c, "output": 4}
    assert profile.parameters == 10
    assert profile.expression == 4 * PHI + 24 + 2 * c
    assert profile.peak_of("update") is None


def one_tensor(size: sympy.Expr, **values: int) -> MemoryProfile:
    tensor = LiveTensor(
        name="a",
        node="a",
        role="temporary",
        phase="forward",
        dtype="uint8",
        shape="n",
        where="",
        size=size,
        bytes=0,
        birth=0,
        death=0,
    )
    sources = {"s0": "x.shape[0]", "s1": "x.shape[1]"}
    return MemoryProfile((Moment(0, "a", "forward"),), (tensor,), 1, {"s0": 0, "s1": 0}, sources).at(**values)


def test_sizes_by_symbol_or_by_what_people_call_it() -> None:
    s0, s1 = sympy.symbols("s0 s1", integer=True, positive=True)
    assert one_tensor(4 * s0 * s1, s0=3, s1=5).peak.bytes == 60
    assert one_tensor(4 * s0 * s1, batch=3, seq=5).peak.bytes == 60
    assert one_tensor(4 * s0 * s1, batch=3, seq=5).symbols == {"s0": "x.shape[0] = 3", "s1": "x.shape[1] = 5"}
    with pytest.raises(KeyError, match=r"no symbolic size 'width'; there are: s0 \(x.shape\[0\] = 0\)"):
        one_tensor(s0, width=3)


def plain_step(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        prediction = model(x) if isinstance(model, Mlp) else model(x, y)
        loss = nn.functional.mse_loss(prediction, y) if isinstance(model, Mlp) else prediction
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def compiled_step(model: nn.Module, **options: Any) -> tuple[Any, fxpass.MixedPrecision]:
    mp = fxpass.MixedPrecision(max_norm=1.0, **options)
    return torch.compile(plain_step(model), backend=mp), mp


def tiny_gpt() -> models.GPT:
    return models.GPT(models.GPTConfig(width=32, layers=1, heads=2, vocab=64, context=32))


def measured(step: Any, x: Tensor, y: Tensor) -> int:
    """Bytes that a call of ``step`` adds at its peak."""
    for _ in range(2):
        step(x, y)
    return measure.peak_of_call(lambda: step(x, y), torch.device("cpu")).bytes


@pytest.mark.breadth("first")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_graph_as_written_is_predicted_to_the_byte(dtype: str) -> None:
    step, mp = compiled_step(tiny_gpt(), codegen="eager", dtype=dtype)
    (x, y) = models.token_batches(1, 32, vocab=64)[0]
    used = measured(step, x, y)
    (record,) = mp.graphs
    assert record.memory.transient == used


@pytest.mark.breadth(2)
@pytest.mark.parametrize("name", ["gpt", "conv net"])
def test_the_program_that_runs_is_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU that multiplies float16 itself does so in buffers of oneDNN's that no formula here knows.
    monkeypatch.setattr(lowering._torch, "cpu_has_half_gemm", lambda: False)
    gpt = name == "gpt"
    step, mp = compiled_step(tiny_gpt() if gpt else models.ConvNet(width=8, classes=10))
    (x, y) = models.token_batches(1, 32, vocab=64)[0] if gpt else models.image_batches(1, 8, classes=10)[0]
    used = measured(step, x, y)
    (record,) = mp.graphs
    assert 1.0 <= record.memory.transient / used <= 1.02
    assert record.memory.persistent > 12 * record.memory.parameters
    phases = {m.phase for m in record.memory.moments}
    assert phases >= {"forward", "backward", "check", "update", "scale"}


@pytest.mark.slow
def test_other_sizes_are_those_of_a_fresh_capture() -> None:
    def captured(rows: int) -> MemoryProfile:
        torch.compiler.reset()
        torch.manual_seed(0)
        mp = fxpass.MixedPrecision(codegen="eager")
        model = Mlp()
        optimizer = torch.optim.AdamW(model.parameters())

        def step(x: Tensor, y: Tensor) -> None:
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        torch.compile(step, backend=mp, dynamic=True)(*batches(1, rows)[0])
        return mp.graphs[-1].memory

    small, large = captured(5), captured(700)
    assert small.at(batch=700).timeline() == large.timeline()
    assert small.at(batch=700).peak == large.peak
    assert small.peak.bytes < large.peak.bytes
    (symbol,) = large.expression.free_symbols - {PHI}
    assert large.symbols == {str(symbol): "x.shape[0] = 700"}
    assert large.expression.subs({symbol: 700, PHI: large.parameters}) == large.peak.bytes


def test_a_profile_without_compiling_or_running() -> None:
    model = Mlp()
    before = [p.detach().clone() for p in model.parameters()]
    options = {"max_norm": 1.0, "codegen": "eager"}
    found = dry_run(
        lambda: (plain_step(model), batches(1)[0], {}), options, tensors="real", of="program"
    ).memory
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    step, mp = compiled_step(model, codegen="eager")
    step(*batches(1)[0])
    assert found.timeline() == mp.graphs[0].memory.timeline()
