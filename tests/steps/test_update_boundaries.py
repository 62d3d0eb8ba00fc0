"""The update at the edges of its settings and inputs is eager's: every optimizer, as users compile it.

One compilation per optimizer: each param group has settings of its own, gradients are given element
by element, and learning rate and step counts change between calls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxpass import MixedPrecision

O = torch.optim  # noqa: E741 - the table below reads better
Settings = list[dict[str, Any]]

BETAS: Settings = [
    {},
    {"betas": (0.0, 0.0)},
    {"betas": (0.0, 0.999)},
    {"betas": (0.9, 0.0)},
    {"betas": (0.99999, 0.9999999)},
    {"eps": 0.0},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
]
DECOUPLED: Settings = [*BETAS, {"weight_decay": 0.1, "decoupled_weight_decay": True}]
CASES: dict[str, tuple[type[Optimizer], Settings]] = {
    "Adam": (O.Adam, [*BETAS, {"amsgrad": True}, {"amsgrad": True, "eps": 0.0, "weight_decay": 0.1}]),
    "AdamW": (O.AdamW, [*BETAS, {"amsgrad": True, "weight_decay": 0.0}]),
    "NAdam": (O.NAdam, [*DECOUPLED, {"momentum_decay": 0.0}, {"momentum_decay": 1000.0}]),
    "RAdam": (O.RAdam, [*DECOUPLED, {"betas": (0.9, 0.6)}, {"betas": (0.9, 0.75)}]),
    "Adamax": (O.Adamax, BETAS),
    "ASGD": (O.ASGD, [{}, {"t0": 1.0}, {"t0": 0.0, "lambd": 0.1, "alpha": 1.0}, {"weight_decay": 0.1}]),
    "Adadelta": (O.Adadelta, [{}, {"rho": 0.0}, {"rho": 0.99999}, {"eps": 0.0}, {"weight_decay": 0.1}]),
    "Rprop": (O.Rprop, [{}, {"etas": (0.3, 1.1)}, {"step_sizes": (0.0, 0.02)}, {"maximize": True}]),
    "RMSprop": (
        O.RMSprop,
        [
            *({}, {"alpha": 0.0}, {"alpha": 0.99999}, {"eps": 0.0}, {"weight_decay": 0.1}),
            *({"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.9}),
        ],
    ),
    "Adagrad": (
        O.Adagrad,
        [{}, {"lr_decay": 0.1}, {"eps": 0.0}, {"weight_decay": 0.1}, {"initial_accumulator_value": 1.0}],
    ),
    "SGD": (
        O.SGD,
        [
            *({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}),
            *({"momentum": 0.9, "dampening": 1.0}, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
        ],
    ),
    "Adafactor": (O.Adafactor, [{}, {"weight_decay": 0.1}, {"d": 0.1}, {"beta2_decay": -0.1}]),
    "Muon": (O.Muon, [{}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"nesterov": False}]),
}
RATES = (0.0, 1e-2, 0.0, 0.5, 1e-8, 1e-2)
THOUSANDTH = 4  # the call before which step counts become 999
GRADIENTS = torch.tensor([0.0, 1.0, -1e-3, 1e-12, 1e-25, 0.0, 3e4, -2.0])


def _shapes(name: str) -> list[tuple[int, ...]]:
    return [(4, 8), (8, 8)] if name == "Muon" else [(4, 8), ()]


def _gradients(call: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Rows of zeros, as of an embedding, among elements of all magnitudes; a scalar that is 0 at first."""
    generator = torch.Generator().manual_seed(call)
    found = []
    for shape in shapes:
        picked = GRADIENTS[torch.randint(len(GRADIENTS), shape, generator=generator)]
        if len(shape) == 2:
            picked[call % shape[0]] = 0
            picked[-1] = 0
        found.append(picked if shape else torch.tensor(float(call)))
    return found


def _run(kind: Any, settings: Settings, shapes: list[tuple[int, ...]]) -> tuple[Any, ...]:
    torch.manual_seed(0)
    weights = [[nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in settings]
    opt = kind([{"params": w, **s} for w, s in zip(weights, settings, strict=True)], lr=RATES[0])

    def step(slopes: list[Tensor]) -> None:
        opt.zero_grad()
        torch.stack(
            [(p * s).sum() for group in weights for p, s in zip(group, slopes, strict=True)]
        ).sum().backward()
        opt.step()

    return step, opt, weights


def _values(opt: Optimizer, weights: list[list[nn.Parameter]]) -> dict[str, Tensor]:
    found = {}
    for g, group in enumerate(weights):
        for p in group:
            for key, value in {"parameter": p.detach(), **opt.state.get(p, {})}.items():
                if value is not None:
                    found[f"group {g} {tuple(p.shape)} {key}"] = torch.as_tensor(value).float()
    return found


@pytest.mark.breadth("first")
@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str) -> None:
    kind, settings = CASES[name]
    shapes = _shapes(name)
    (step, ours, our_weights), (eager, theirs, their_weights) = (_run(kind, settings, shapes) for _ in "ab")
    # Muon multiplies bfloat16 matrices five times in a row, here of nearly singular gradients
    atol = 32 * 2**-8 * max(RATES) if name == "Muon" else 1e-7
    mp = MixedPrecision(dtype="float32")
    compiled = torch.compile(step, backend=mp)
    for call, rate in enumerate(RATES):
        for opt in (ours, theirs):
            for group in opt.param_groups:
                group["lr"] = rate
            for state in opt.state.values():
                if call == THOUSANDTH and "step" in state:
                    state["step"].fill_(999)
        slopes = _gradients(call, shapes)
        compiled(slopes)
        eager(slopes)
        expected = _values(theirs, their_weights)
        for what, value in _values(ours, our_weights).items():
            if what in expected:
                where = f"call {call}, lr {rate}, {settings[int(what.split()[1])]}: {what}"
                close(value, expected[what], where, atol)
    assert mp.stats().steps == len(RATES)
    assert len(mp.graphs) == 1


def close(actual: Tensor, expected: Tensor, where: str, atol: float) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=2e-5, atol=atol, equal_nan=True, msg=lambda text: f"{where}: {text}"
    )
