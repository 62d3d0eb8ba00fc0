"""What steps contain beside a model and an update: odd parameters, averages, checkpoints, shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

from fxpass import CaptureError, MixedPrecision
from tests.steps.test_forms import _first
from tests.support.helpers import FP32, Mlp, Training, batches, clone, compare, same


def test_batchnorm_frozen_tied_and_unreached_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)  # before a norm its gradient is rounding noise
            self.norm = nn.BatchNorm1d(4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.first.weight
            self.frozen = nn.Linear(4, 2)
            self.frozen.weight.requires_grad_(False)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.tied(torch.relu(self.norm(self.first(x)))))

    def build() -> Training:
        net = Odd()
        net.frozen.weight.grad = torch.ones_like(net.frozen.weight)  # stale: must neither move it nor leak
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        return Training(_first(net, opt), [net], [opt])

    mp = compare(build)
    assert mp.graphs[0].unreached == {
        "frozen.weight": "requires_grad is False",
        "unused.weight": "the loss does not depend on it",
        "unused.bias": "the loss does not depend on it",
    }


@pytest.mark.slow
def test_a_stale_gradient_of_a_frozen_parameter_updates_it_as_in_eager() -> None:
    def build() -> Training:
        net = Mlp()
        net.first.requires_grad_(False)
        net.first.weight.grad = torch.ones_like(net.first.weight)
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> None:
            mse_loss(net(x), y).backward()
            opt.step()

        return Training(step, [net], [opt], batches(1))

    compare(build, grads=True)


# Inductor draws random numbers of its own unless it is told not to
EAGERS_NUMBERS: dict[str, Any] = {**FP32, "inductor": {"fallback_random": True}}


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(16, 2)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.drop(torch.relu(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x))


def test_dropout() -> None:
    def build() -> Training:
        net = Dropping()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        return Training(_first(net, opt), [net], [opt])

    compare(build, handle=MixedPrecision(**EAGERS_NUMBERS))


@pytest.mark.breadth(4)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes(parts: int, reentrant: bool) -> None:
    """With random numbers and with several backward(): torch's own pass allows neither."""

    def build() -> Training:
        net = Dropping()
        scale = nn.Parameter(torch.ones(4))
        opt = torch.optim.SGD([*net.parameters(), scale], lr=0.1)

        def step(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                a = a * scale if reentrant else a  # a reentrant one needs an input that requires grad
                h = checkpoint(net.hidden, a, use_reentrant=reentrant)
                mse_loss(net.last(h), b).backward()
            opt.step()

        return Training(step, [net], [opt])

    mp = compare(build, handle=MixedPrecision(**EAGERS_NUMBERS))
    assert mp.graphs[0].before.count("aten.relu.") == 2 * parts
    assert mp.graphs[0].before.count("dropout.default") == parts


def test_an_average_follows_eager_and_sees_old_parameters_on_a_skip() -> None:
    net, average = Mlp(), Mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def step(x: Tensor) -> None:
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(p, 0.5)

    step(torch.randn(6, 4))
    before = clone(dict(net.named_parameters()))
    expected = {n: a.detach().lerp(before[n], 0.5) for n, a in average.named_parameters()}
    step(torch.full((6, 4), float("inf")))
    same(dict(net.named_parameters()), before, "parameters", exact=True)
    same(dict(average.named_parameters()), expected, "average")


@pytest.mark.slow
def test_updates_through_data() -> None:
    def build() -> Training:
        net, average = Mlp(), Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = _first(net, opt)(x, y)
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.data.mul_(0.9).add_(p.data, alpha=0.1)
                p.data.clamp_(-0.3, 0.3)
            return loss

        return Training(step, [net, average], [opt])

    compare(build)


@pytest.mark.slow
def test_settings_written_in_the_step_take_effect_in_it() -> None:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=5.0)

        def step(x: Tensor, y: Tensor, lr: float) -> Tensor:
            for group in opt.param_groups:
                group["lr"] = lr
                group["weight_decay"] = 0.5
            return _first(net, opt)(x, y)

        calls = [(*batch, lr) for batch, lr in zip(batches(4), (0.1, 0.05, 0.02, 0.01), strict=True)]
        return Training(step, [net], [opt], calls)

    compare(build, graphs=2)  # a number, then any number


@pytest.mark.slow
def test_two_models_with_an_optimizer_each() -> None:
    def build() -> Training:
        net, critic = Mlp(), nn.Linear(2, 1)
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        critic_opt = torch.optim.SGD(critic.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            critic_opt.zero_grad()
            real = y.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(critic(real).tanh().sum(), real, create_graph=True)
            judged = critic(net(x).detach()).mean() - critic(real).mean() + slope.square().mean()
            judged.backward()
            critic_opt.step()
            opt.zero_grad()
            made = -critic(net(x)).mean()
            made.backward()
            opt.step()
            return judged, made

        return Training(step, [net, critic], [opt, critic_opt])

    compare(build, handle=MixedPrecision(**FP32, loss_scale=1024.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's own
def test_a_hook_on_an_activation() -> None:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            hidden = net.first(x)
            hidden.register_hook(lambda grad: grad * 0.5)
            mse_loss(net.last(hidden), y).backward()
            opt.step()

        return Training(step, [net], [opt])

    compare(build)


@pytest.mark.slow
def test_a_recurrent_net() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x[:, None].expand(-1, 3, -1))[0][:, -1])

    def build() -> Training:
        net = Recurrent()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        return Training(_first(net, opt), [net], [opt])

    compare(build)


def test_a_second_batch_size_compiles_once_more_and_no_more() -> None:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        return Training(_first(net, opt), [net], [opt], [b for n in (6, 9, 6, 11, 5) for b in batches(1, n)])

    compare(build, graphs=2)


@pytest.mark.slow
def test_a_second_sequence_length_compiles_once_more_and_no_more() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(10, 8), nn.Embedding(64, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layer(self.tokens(ids) + self.places(torch.arange(ids.shape[1]))))

    def build() -> Training:
        net = Tagger()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(ids: Tensor) -> Tensor:
            opt.zero_grad()
            loss = cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            opt.step()
            return loss

        return Training(step, [net], [opt], [(torch.randint(0, 10, (3, n)),) for n in (9, 12, 7, 20, 9)])

    compare(build, graphs=2)


def test_evaluation_is_cast_and_compiled_a_forward_alone_is_refused() -> None:
    net = Mlp()
    mp = MixedPrecision(codegen="eager")
    evaluate = torch.compile(lambda x: net(x).argmax(1), backend=mp)
    with torch.no_grad():
        assert torch.equal(evaluate(x := torch.randn(6, 4)), net(x).argmax(1))
    assert "f16" in mp.graphs[0].after
    forward = torch.compile(net, backend=MixedPrecision(codegen="eager"))
    with pytest.raises(CaptureError, match="compile the whole step"):
        forward(torch.randn(6, 4))
