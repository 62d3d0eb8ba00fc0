"""Every way to write a training step that must be captured as one graph, compared with eager PyTorch."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.helpers import FP32, Mlp, Training, batches, clone, compare, same

Build = Callable[[], Training]


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **settings})


# ---------------------------------------------------------------- zero_grad


@pytest.mark.parametrize("grads", ["drop", "keep"])
@pytest.mark.parametrize("of", ["optimizer", "model"])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("place", ["first", "before backward", "last", "absent"])
def test_zero_grad(place: str, to_none: bool, of: str, grads: str) -> None:
    if place == "absent" and (of == "model" or not to_none):
        pytest.skip("the same step")
    if place == "absent" and grads == "drop":
        pytest.skip("eager accumulates, drop does not: see test_absent_zero_grad_drops")

    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)
        owner = optimizer if of == "optimizer" else model

        def step(x: Tensor, y: Tensor) -> Tensor:
            if place == "first":
                owner.zero_grad(set_to_none=to_none)
            loss = F.mse_loss(model(x), y)
            if place == "before backward":
                owner.zero_grad(set_to_none=to_none)
            loss.backward()
            optimizer.step()
            if place == "last":
                owner.zero_grad(set_to_none=to_none)
            return loss

        return Training(step, [model], [optimizer])

    # With set_to_none=False the first call finds no gradients and the later ones do; so does accumulation.
    second = grads == "keep" and (not to_none or place == "absent")
    compare(build, grads=grads == "keep", graphs=2 if second else 1)


def test_absent_zero_grad_drops() -> None:
    model, (x, y) = Mlp(), batches(1)[0]
    optimizer = adamw(model)
    mp = fxpass_backend()

    def step(x: Tensor, y: Tensor) -> None:
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    compiled = torch.compile(step, backend=mp)
    for _ in range(3):
        compiled(x, y)
        assert all(p.grad is None for p in model.parameters())
    assert len(mp.graphs) == 1


def fxpass_backend(**options: Any) -> Any:
    import fxpass

    return fxpass.MixedPrecision(**{**FP32, **options})


# ---------------------------------------------------------------- what goes in and out


@dataclass
class Metrics:
    loss: Tensor
    rows: int


Pair = namedtuple("Pair", "x y")

RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "loss": lambda loss, out: loss,
    "detached": lambda loss, out: loss.detach(),
    "dict": lambda loss, out: {"loss": loss, "logits": out, "half": loss / 2},
    "tuple": lambda loss, out: (loss, [out.sum(), 3]),
    "namedtuple": lambda loss, out: Pair(loss, out),
    "dataclass": lambda loss, out: Metrics(loss, len(out)),
    "none": lambda loss, out: None,
    "view": lambda loss, out: out[0],
    "twice": lambda loss, out: (loss, loss),
}


@pytest.mark.parametrize("form", RETURNS)
def test_returns(form: str) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)
        give = RETURNS[form]

        def step(x: Tensor, y: Tensor) -> Any:
            out = model(x)
            loss = F.mse_loss(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return give(loss, out)

        return Training(step, [model], [optimizer])

    compare(build)


BATCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, y: {"x": x, "nested": {"y": y}},
    "tuple": lambda x, y: ((x,), y),
    "namedtuple": lambda x, y: Pair(x, y),
    "dataclass": lambda x, y: Metrics(x, 2),
}


@pytest.mark.parametrize("form", BATCHES)
def test_nested_batches(form: str) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(batch: Any) -> Tensor:
            if form == "dict":
                x, y = batch["x"], batch["nested"]["y"]
            elif form == "tuple":
                (x,), y = batch
            elif form == "namedtuple":
                x, y = batch.x, batch.y
            else:
                x, y = batch.loss, batch.loss[:, : batch.rows]
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Training(step, [model], [optimizer], [(BATCHES[form](*b),) for b in batches()])

    compare(build)


def test_keyword_arguments() -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, *rest: Tensor, weight: float = 1.0, mask: Tensor | None = None, **more: Any) -> Tensor:
            loss = (F.mse_loss(model(x), rest[0], reduction="none") * mask).mean() * weight * more["extra"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        keywords = {"weight": 0.5, "mask": torch.ones(6, 1), "extra": 2}
        return Training(step, [model], [optimizer], keywords=keywords)

    compare(build)


# ---------------------------------------------------------------- where model and optimizer live

MODEL: nn.Module
OPTIMIZER: torch.optim.Optimizer
SCHEDULER: torch.optim.lr_scheduler.LRScheduler


def global_step(x: Tensor, y: Tensor) -> Tensor:
    OPTIMIZER.zero_grad()
    loss = F.mse_loss(MODEL(x), y)
    loss.backward()
    OPTIMIZER.step()
    return loss


def global_step_with_scheduler(x: Tensor, y: Tensor) -> Tensor:
    loss = global_step(x, y)
    SCHEDULER.step()
    return loss


class Trainer:
    def __init__(self) -> None:
        self.model = Mlp()
        self.optimizers = {"main": adamw(self.model)}
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizers["main"], 1, 0.5)
        self.seen = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.model(x), y)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.loss(x, y)
        loss.backward()
        self.optimizers["main"].step()
        self.optimizers["main"].zero_grad()
        return loss


class WholeStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()
        self.optimizer = adamw(self.inner)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(self.inner(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def test_globals() -> None:
    def build() -> Training:
        global MODEL, OPTIMIZER
        MODEL = Mlp()
        OPTIMIZER = adamw(MODEL)
        return Training(global_step, [MODEL], [OPTIMIZER])

    compare(build)


def test_bound_method() -> None:
    def build() -> Training:
        trainer = Trainer()
        return Training(trainer.step, [trainer.model], [trainer.optimizers["main"]])

    compare(build)


def test_module_as_the_step() -> None:
    def build() -> Training:
        module = WholeStep()
        return Training(module, [module], [module.optimizer])

    compare(build)


def test_arguments() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)
        return Training(step, [model], [optimizer], [(model, optimizer, *b) for b in batches()])

    compare(build)


def test_the_same_step_for_two_models_compiles_twice() -> None:
    def build() -> Training:
        models = [Mlp(), Mlp()]
        optimizers = [adamw(m) for m in models]

        def step(which: int, x: Tensor, y: Tensor) -> Tensor:
            loss = F.mse_loss(models[which](x), y)
            loss.backward()
            optimizers[which].step()
            optimizers[which].zero_grad()
            return loss

        calls = [(i % 2, *b) for i, b in enumerate(batches(6))]
        return Training(step, list(models), list(optimizers), calls)

    compare(build, graphs=2)


# ---------------------------------------------------------------- schedulers


def test_scheduler_outside_the_step(recwarn: pytest.WarningsRecorder) -> None:
    def build() -> Training:
        trainer = Trainer()
        return Training(trainer.step, [trainer.model], [trainer.optimizers["main"]], batches(1))

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    ours = build()
    mp = fxpass_backend()
    compiled = torch.compile(ours.step, backend=mp)
    for call in batches(5):
        same(compiled(*call), eager.step(*call), "loss")
        for training in (eager, ours):
            training.step.__self__.schedule.step()  # type: ignore[attr-defined]
    assert len(mp.graphs) == 1
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.mark.parametrize("kind", ["StepLR", "LambdaLR", "OneCycleLR", "CosineAnnealingLR", "SequentialLR"])
def test_scheduler_inside_the_step(kind: str) -> None:
    def build() -> Training:
        global MODEL, OPTIMIZER, SCHEDULER
        MODEL = Mlp()
        OPTIMIZER = adamw(MODEL)
        schedulers = torch.optim.lr_scheduler
        SCHEDULER = {
            "StepLR": lambda: schedulers.StepLR(OPTIMIZER, 2, 0.5),
            "LambdaLR": lambda: schedulers.LambdaLR(OPTIMIZER, lambda epoch: 0.9**epoch),
            "OneCycleLR": lambda: schedulers.OneCycleLR(OPTIMIZER, 0.05, total_steps=20, cycle_momentum=False),
            "CosineAnnealingLR": lambda: schedulers.CosineAnnealingLR(OPTIMIZER, 10),
            "SequentialLR": lambda: schedulers.SequentialLR(
                OPTIMIZER,
                [schedulers.LinearLR(OPTIMIZER, 0.1, total_iters=3), schedulers.ExponentialLR(OPTIMIZER, 0.9)],
                [3],
            ),
        }[kind]()
        return Training(global_step_with_scheduler, [MODEL], [OPTIMIZER], batches(6))

    mp = compare(build)
    assert OPTIMIZER.param_groups[0]["lr"] != 0.01
    assert mp.stats().steps == 6


# ---------------------------------------------------------------- several backwards


@pytest.mark.parametrize("grads", ["drop", "keep"])
def test_accumulation_over_micro_batches(grads: str) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for part, target in zip(x.chunk(3), y.chunk(3), strict=True):
                loss = F.mse_loss(model(part), target) / 3
                loss.backward()
                total += loss.detach()
            optimizer.step()
            return total

        return Training(step, [model], [optimizer])

    compare(build, grads=grads == "keep")


def test_retain_graph_and_two_losses() -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = model(x)
            loss, penalty = F.mse_loss(out, y), out.pow(2).mean()
            loss.backward(retain_graph=True)
            loss.backward(retain_graph=True)
            penalty.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss, penalty

        return Training(step, [model], [optimizer])

    compare(build)


def test_backward_with_gradient() -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            out = model(x)
            out.backward(gradient=y)
            optimizer.step()
            optimizer.zero_grad()
            return out

        return Training(step, [model], [optimizer])

    compare(build)


@pytest.mark.parametrize("how", ["autograd.backward", "inputs"])
def test_other_spellings_of_backward(how: str) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = F.mse_loss(model(x), y)
            if how == "inputs":
                loss.backward(inputs=list(model.last.parameters()))
            else:
                torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Training(step, [model], [optimizer])

    compare(build)


def test_two_optimizers() -> None:
    def build() -> Training:
        model = Mlp()
        first = torch.optim.SGD([*model.first.parameters(), *model.norm.parameters()], lr=0.1, momentum=0.9)
        last = adamw(model.last)

        def step(x: Tensor, y: Tensor) -> Tensor:
            for optimizer in (first, last):
                optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            for optimizer in (first, last):
                optimizer.step()
            return loss

        return Training(step, [model], [first, last])

    compare(build)


def test_two_updates_in_one_step() -> None:
    """Like a GAN: the second loss sees the parameters the first update wrote."""

    def build() -> Training:
        generator, judge = nn.Linear(4, 4), nn.Linear(4, 1)
        for_generator, for_judge = adamw(generator), adamw(judge)

        def step(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            for_judge.zero_grad()
            wrong = judge(generator(x).detach()).mean() - judge(x).mean()
            wrong.backward()
            for_judge.step()
            for_generator.zero_grad()
            loss = -judge(generator(x)).mean()
            loss.backward()
            for_generator.step()
            return wrong, loss

        return Training(step, [generator, judge], [for_generator, for_judge])

    compare(build)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("grads", ["drop", "keep"])
@pytest.mark.parametrize("stale", [False, True])
def test_frozen_parameters(stale: bool, grads: str) -> None:
    def build() -> Training:
        model = Mlp()
        if stale:
            F.mse_loss(model(torch.ones(1, 4)), torch.zeros(1, 2)).backward()
        model.norm.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return Training(step, [model], [optimizer])

    compare(build, grads=grads == "keep", graphs=1)


@pytest.mark.parametrize("grads", ["drop", "keep"])
def test_frozen_outside_the_optimizer(grads: str) -> None:
    def build() -> Training:
        model = Mlp()
        F.mse_loss(model(torch.ones(1, 4)), torch.zeros(1, 2)).backward()
        model.first.requires_grad_(False)
        optimizer = torch.optim.SGD(model.last.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            model.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return Training(step, [model], [optimizer])

    compare(build, grads=grads == "keep")


@pytest.mark.parametrize("grads", ["drop", "keep"])
def test_unreached_parameters_are_named(grads: str) -> None:
    def build() -> Training:
        model = nn.ModuleDict({"used": Mlp(), "unused": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
        model["frozen"].requires_grad_(False)
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = F.mse_loss(model["used"](x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Training(step, [model], [optimizer])

    mp = compare(build, grads=grads == "keep")
    assert mp.graphs[0].unreached == {
        "unused.weight": "the loss does not depend on it",
        "unused.bias": "the loss does not depend on it",
        "frozen.weight": "requires_grad is False",
        "frozen.bias": "requires_grad is False",
    }


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    def build() -> Training:
        model = Tied()
        optimizer = adamw(model)

        def step(tokens: Tensor, target: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens), target)
            loss.backward()
            optimizer.step()
            return loss

        draw = torch.Generator().manual_seed(3)
        calls = [tuple(torch.randint(11, (2, 9), generator=draw)) for _ in range(3)]
        return Training(step, [model], [optimizer], calls)

    compare(build)


def test_parameter_groups() -> None:
    def build() -> Training:
        model = Mlp()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.03},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return Training(step, [model], [optimizer])

    compare(build)


def test_an_input_that_requires_grad() -> None:
    """Its gradient is left in ``.grad``, as in eager: it belongs to no optimizer."""

    def run(compile: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> None:
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step = compile(step)
        found = []
        for x, y in batches():
            x.requires_grad_()
            step(x, y)
            assert x.grad is not None
            found.append(x.grad)
        return found

    mp = fxpass_backend(loss_scale=1024.0)
    same(run(lambda f: torch.compile(f, backend=mp)), run(lambda f: f), "x.grad")


# ---------------------------------------------------------------- models


def test_batch_norm() -> None:
    def build() -> Training:
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Adam magnifies the noise of zero gradients

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x.reshape(-1, 1, 4, 4)), y)
            loss.backward()
            optimizer.step()
            return loss

        draw = torch.Generator().manual_seed(2)
        calls = [(torch.randn(5, 16, generator=draw), torch.randn(5, 2, generator=draw)) for _ in range(3)]
        return Training(step, [model], [optimizer], calls)

    mp = compare(build)
    assert mp.stats().steps == 3


def test_dropout() -> None:
    """Random numbers cannot agree with eager bit by bit; what can is that they are drawn anew every step."""
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    mp = fxpass_backend()
    compiled = torch.compile(step, backend=mp)
    x, y = batches(1)[0]
    losses = {float(compiled(x, y)) for _ in range(4)}
    assert len(losses) == 4
    model.eval()
    same(compiled(x, y), step(x, y), "loss in eval mode")
    assert len(mp.graphs) == 2


@pytest.mark.parametrize("reentrant", [False])
def test_checkpoint(reentrant: bool) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            hidden = checkpoint(lambda x: model.norm(model.first(x)), x, use_reentrant=reentrant)
            loss = F.mse_loss(model.last(torch.relu(hidden)), y)
            loss.backward()
            optimizer.step()
            return loss

        return Training(step, [model], [optimizer])

    compare(build)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x * 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_autograd_function() -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(Square.apply(model(x)), y)
            loss.backward()
            optimizer.step()
            return loss

        return Training(step, [model], [optimizer])

    compare(build)


# ---------------------------------------------------------------- what else a step does


@pytest.mark.parametrize("how", ["lerp", "loop", "foreach"])
def test_ema_in_the_step(how: str) -> None:
    def build() -> Training:
        model, ema = Mlp(), Mlp()
        ema.load_state_dict(model.state_dict())
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if how == "foreach":
                    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.1)
                for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
                    if how == "lerp":
                        slow.lerp_(fast, 0.1)
                    elif how == "loop":
                        slow.copy_(slow * 0.9 + fast * 0.1)
            return loss

        return Training(step, [model, ema], [optimizer])

    compare(build)


def test_ema_sees_old_parameters_on_a_skipped_step() -> None:
    model, ema = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.5)

    mp = fxpass_backend()
    compiled = torch.compile(step, backend=mp)
    before, slow = clone(dict(model.named_parameters())), clone(dict(ema.named_parameters()))
    x, y = batches(1)[0]
    compiled(x * float("inf"), y)
    same(dict(model.named_parameters()), before, "model", exact=True)
    same(dict(ema.named_parameters()), {k: v.lerp(before[k], 0.5) for k, v in slow.items()}, "ema")
    assert mp.stats().skipped == 1


def test_no_grad_block_and_metrics() -> None:
    def build() -> Training:
        model, teacher = Mlp(), Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                target = teacher(x)
            out = model(x)
            loss = F.mse_loss(out, target) + F.mse_loss(out, y)
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                norm = sum(p.grad.pow(2).sum() for p in model.parameters()).sqrt()
            optimizer.step()
            return {"loss": loss.detach(), "norm": norm, "error": (out - y).abs().max().detach()}

        return Training(step, [model, teacher], [optimizer])

    compare(build)


@pytest.mark.parametrize("how", ["norm", "inf norm", "value", "norm no foreach"])
@pytest.mark.parametrize("grads", ["drop", "keep"])
def test_clipping_by_the_user_sees_unscaled_gradients(how: str, grads: str) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Any:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            norm = None
            if how == "value":
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
            elif how == "inf norm":
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float("inf"))
            else:
                norm = torch.nn.utils.clip_grad_norm_(
                    model.parameters(), 0.1, foreach=False if "no" in how.split() else None
                )
            optimizer.step()
            return loss, norm

        return Training(step, [model], [optimizer])

    handle = fxpass_backend(loss_scale=1024.0, grads=grads)
    compare(build, handle=handle, grads=grads == "keep")


@pytest.mark.parametrize("how", ["in place", "assigned", "data", "sign", "one is dropped"])
@pytest.mark.parametrize("grads", ["drop", "keep"])
def test_gradients_changed_by_the_user(how: str, grads: str) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Any:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            for p in model.parameters():
                if how == "in place":
                    p.grad.mul_(0.5)
                elif how == "assigned":
                    p.grad = p.grad + 0.01 * p.detach()
                elif how == "data":
                    p.grad.data.add_(0.01)
                elif how == "sign":
                    p.grad = p.grad.sign()
            if how == "one is dropped":
                model.first.weight.grad = None
            optimizer.step()
            return loss

        return Training(step, [model], [optimizer])

    handle = fxpass_backend(loss_scale=1024.0, grads=grads)
    compare(build, handle=handle, grads=grads == "keep")


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_region_of_the_user(enabled: bool) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Any:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = model(x)
            loss = F.mse_loss(out.float(), y)
            loss.backward()
            optimizer.step()
            return loss.detach(), out.dtype

        return Training(step, [model], [optimizer])

    compare(build)


def test_disabled_autocast_region_stays_in_float32() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> Any:
        hidden = model.norm(model.first(x))
        with torch.autocast("cpu", enabled=False):
            loss = F.mse_loss(model.last(hidden), y)
        loss.backward()
        optimizer.step()
        return loss

    mp = fxpass_backend(dtype="bfloat16")
    torch.compile(step, backend=mp)(*batches(1)[0])
    products = [line for line in mp.graphs[0].after.splitlines() if "linear" in line or "addmm" in line]
    assert any("bf16" in line or "bfloat16" in line for line in products)
    assert any("f32" in line or "float32" in line for line in products)


@pytest.mark.parametrize("what", ["item", "print", "print then more"])
def test_a_graph_break_after_the_update(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Any:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            if what == "item":
                return loss.item()
            print("loss", loss)
            return loss if what == "print" else loss * 2

        return Training(step, [model], [optimizer])

    compare(build, graphs=2 if what == "print then more" else 1)
    assert ("loss" in capsys.readouterr().out) == (what != "item")


def test_shapes() -> None:
    """A second batch size compiles once more, with a symbolic size, and no third time."""

    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        calls = [batches(1, rows)[0] for rows in (6, 6, 9, 4, 12, 6, 5)]
        return Training(step, [model], [optimizer], calls)

    compare(build, graphs=2)


def test_sequence_lengths() -> None:
    def build() -> Training:
        model = nn.Sequential(nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
        head = nn.Linear(8, 11)
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)

        def step(tokens: Tensor) -> Tensor:
            optimizer.zero_grad()
            out = head(model(tokens[:, :-1]))
            loss = F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            return loss

        draw = torch.Generator().manual_seed(3)
        calls = [(torch.randint(11, (3, length), generator=draw),) for length in (8, 8, 10, 7, 12)]
        return Training(step, [model, head], [optimizer], calls)

    compare(build, graphs=2)


def test_fullgraph() -> None:
    model = Mlp()
    optimizer = adamw(model)
    mp = fxpass_backend()

    @torch.compile(backend=mp, fullgraph=True)
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    losses = [float(step(*b)) for b in batches(1) * 4]
    assert losses == sorted(losses, reverse=True)
    assert len(mp.graphs) == 1


def test_parameters_once_marked_static() -> None:
    """The optimizer alone was compiled before: its parameters became attributes, not inputs, of later graphs."""

    def build() -> Training:
        model = Mlp()
        optimizer = adamw(model)
        F.mse_loss(model(torch.ones(1, 4)), torch.zeros(1, 2)).backward()
        torch.compile(optimizer.step, backend="eager")()
        optimizer.zero_grad()

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Training(step, [model], [optimizer])

    compare(build)


def test_changing_requires_grad_between_calls() -> None:
    def run(compile: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = Mlp()
        optimizer = adamw(model)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        step = compile(step)
        for index, batch in enumerate(batches(6)):
            model.first.requires_grad_(index % 3 != 1)
            step(*batch)
        return clone(list(model.parameters()))

    mp = fxpass_backend()
    same(run(lambda f: torch.compile(f, backend=mp)), run(lambda f: f), "parameters")
    assert len(mp.graphs) == 2


def test_evaluation_under_no_grad() -> None:
    model = Mlp().eval()
    mp = fxpass_backend(dtype="bfloat16")

    @torch.compile(backend=mp)
    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    x, y = batches(1)[0]
    with torch.no_grad():
        found = evaluate(x, y)
        torch.testing.assert_close(found, F.mse_loss(model(x), y), rtol=0.05, atol=0.05)
        assert found.dtype is torch.float32
    assert "bf16" in mp.graphs[0].after or "bfloat16" in mp.graphs[0].after
