"""Tiny models and the comparison with eager PyTorch that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo.config as dynamo_config  # noqa: TID251 - compared before and after
from torch import Tensor, nn

import fxpass

FP32: dict[str, Any] = {"dtype": "float32"}  # without casts: compared with eager to 1e-5
EAGER: dict[str, Any] = {**FP32, "codegen": "eager"}  # op by op: for breadth beside what users run


class Mlp(nn.Module):
    """Two linear layers and a norm: the model of most tests."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def batches(count: int = 3, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    """``count`` reproducible batches for ``Mlp``."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [(draw(rows, 4), draw(rows, 2)) for _ in range(count)]


@dataclass
class Training:
    """A step to run twice, eagerly and compiled, and all that it changes."""

    step: Callable[..., Any]
    models: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    calls: list[tuple[Any, ...]] = field(default_factory=batches)
    keywords: dict[str, Any] = field(default_factory=dict)

    def run(self, step: Callable[..., Any]) -> list[Any]:
        """The outputs of every call, in order."""
        torch.manual_seed(0)
        return [step(*call, **self.keywords) for call in self.calls]


def compare(
    build: Callable[[], Training],
    *,
    graphs: int = 1,
    steps: int = 1,
    grads: bool = False,
    handle: fxpass.MixedPrecision | None = None,
) -> fxpass.MixedPrecision:
    """Run ``build()``'s step eagerly and compiled; parameters, buffers, state and outputs must agree.

    Every call counts ``steps`` training steps, one per graph that trains.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = build()
    expected = eager.run(eager.step)
    torch.manual_seed(0)
    compiled = build()
    mp = handle or fxpass.MixedPrecision(**FP32, grads="keep" if grads else "drop")
    actual = compiled.run(torch.compile(compiled.step, backend=mp))
    same(actual, expected, "output")
    same(snapshot(compiled), snapshot(eager), "state")
    pairs = zip(parameters(compiled), parameters(eager), strict=True)
    for (name, ours), (_, theirs) in pairs:
        if grads:
            same(ours.grad, theirs.grad, f"{name}.grad")
        elif any(ours is p for o in compiled.optimizers for g in o.param_groups for p in g["params"]):
            assert ours.grad is None, f"{name}.grad outlives the step"
    assert len(mp.graphs) == graphs, f"{len(mp.graphs)} graphs instead of {graphs}"
    assert mp.stats().steps == steps * len(compiled.calls), "a call ran uncompiled"
    profiles = [graph.memory for graph in mp.graphs]
    assert not any(profile.missing or profile.unsized for profile in profiles), "a profile is incomplete"
    return mp


def parameters(training: Training) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of the models, by name."""
    return [(f"{i}.{n}", p) for i, m in enumerate(training.models) for n, p in m.named_parameters()]


def snapshot(training: Training) -> dict[str, Any]:
    """A copy of the parameters, buffers and optimizer state."""
    models = {f"model {i}": dict(m.state_dict()) for i, m in enumerate(training.models)}
    states = {f"optimizer {i}": o.state_dict()["state"] for i, o in enumerate(training.optimizers)}
    return clone({**models, **states})


def clone(value: Any) -> Any:
    """``value`` with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    return [clone(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(actual: Any, expected: Any, what: str, *, exact: bool = False) -> None:
    """Assert that two nested values agree, tensors to 1e-5 or, with ``exact``, bit for bit."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{what} is {actual!r}, not a tensor"
        tolerance = 0.0 if exact else 1e-5
        message = lambda text: f"{what}: {text}"  # noqa: E731
        torch.testing.assert_close(
            actual.detach(),
            expected.detach(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=message,
            check_device=False,
        )
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), f"{what} is {actual!r}, not a dict"
        assert set(actual) == set(expected), (
            f"{what} has {sorted(map(str, actual))}, not {sorted(map(str, expected))}"
        )
        for key, value in expected.items():
            same(actual[key], value, f"{what}[{key}]", exact=exact)
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected), f"{what} is a {type(actual)}, not a {type(expected)}"
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            same(a, e, f"{what}[{index}]", exact=exact)
    elif hasattr(expected, "__dataclass_fields__"):
        assert type(actual) is type(expected), f"{what} is a {type(actual)}, not a {type(expected)}"
        same(vars(actual), vars(expected), what, exact=exact)
    elif isinstance(expected, float):
        assert abs(actual - expected) <= 1e-5 * max(1.0, abs(expected)), f"{what} is {actual}, not {expected}"
    else:
        assert actual == expected, f"{what} is {actual!r}, not {expected!r}"


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among ``values``."""
    return [v for v in values if isinstance(v, Tensor)]


def dynamo_settings() -> object:
    """Every setting of Dynamo, to see that a compilation left them alone."""
    return dynamo_config.save_config()
