"""What changes from call to call without a new graph, and what is said where the limit is reached."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import CaptureError, MixedPrecision, OptimizerError
from fxpass._torch.reasons import change_of
from tests.support.helpers import EAGER, Mlp, Training, batches, compare

CALLS = batches(11)


def _with(around: Callable[[Mlp, Tensor, Tensor], Tensor]) -> Callable[[], Training]:
    """A step whose loss and notes are ``around``'s."""

    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            loss = around(net, x, y)
            loss.backward()
            opt.step()

        return Training(step, [net], [opt], CALLS)

    return build


def _after(note: Callable[[Tensor], None]) -> Callable[[], Training]:
    """A step that notes its loss after the update."""

    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            loss = mse_loss(net(x), y)
            loss.backward()
            opt.step()
            note(loss)

        return Training(step, [net], [opt], CALLS)

    return build


@pytest.mark.parametrize("codegen", ["inductor", "eager"])
def test_histories_grow_without_a_new_graph(codegen: str) -> None:
    history: list[Tensor] = []
    last: deque[Tensor] = deque(maxlen=3)
    by_name: dict[str, list[Tensor]] = {"loss": []}

    def note(loss: Tensor) -> None:
        history.append(loss.detach())
        last.append(loss)
        by_name["loss"].append(loss * 2)

    build = _after(note)
    training = build()
    expected = training.run(training.step) and list(history)
    twice = [float(x.detach()) for x in by_name["loss"]]
    for kept in (history, last, by_name["loss"]):
        kept.clear()
    torch.manual_seed(0)
    training, mp = build(), MixedPrecision(dtype="float32", codegen=codegen)
    training.run(torch.compile(training.step, backend=mp))
    assert len(mp.graphs) == 1
    assert mp.stats().steps == len(history) == len(expected) == len(CALLS)
    assert len(last) == 3
    assert last[-1] is not None
    assert len(twice) == len(by_name["loss"])
    assert float(by_name["loss"][-1].detach()) == pytest.approx(2 * float(history[-1]))


@pytest.mark.breadth(2)
@pytest.mark.parametrize(
    ("where", "codegen"),
    [("list", "inductor"), ("attribute", "eager"), ("dict", "eager"), ("closure", "eager")],
)
def test_running_sums_of_the_loss(where: str, codegen: str) -> None:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        kept, held, box, total = SimpleNamespace(total=0.0), {"total": 0.0}, [0.0], 0.0

        def step(x: Tensor, y: Tensor) -> float:
            nonlocal total
            loss = mse_loss(net(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if where == "attribute":
                kept.total += loss.item()
                return kept.total
            if where == "list":
                box[0] += loss.item()
                return box[0]
            if where == "dict":
                held["total"] += loss.item()
                return held["total"]
            total += loss.item()
            return total

        return Training(step, [net], [opt], CALLS)

    compare(build, graphs=2, handle=MixedPrecision(dtype="float32", codegen=codegen))


def test_lists_of_other_backends_are_as_ever() -> None:
    """Dynamo keeps a table of its methods for the whole process: neither side may see the other's."""
    seen: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        seen.append(x + 1)
        return x * len(seen)

    for backend in ("eager", MixedPrecision(**EAGER), "eager"):
        torch.compiler.reset()
        seen.clear()
        compiled = torch.compile(note, backend=backend)
        assert [float(compiled(torch.ones(()))) for _ in range(3)] == [1.0, 2.0, 3.0]
    test_histories_grow_without_a_new_graph("eager")


def test_a_list_that_the_step_reads_is_guarded() -> None:
    factors: list[float] = [1.0]
    build = _with(lambda net, x, y: mse_loss(net(x), y) * sum(factors))
    net = build()
    mp = MixedPrecision(**EAGER)
    step = torch.compile(net.step, backend=mp)
    step(*CALLS[0])
    factors.append(2.0)
    step(*CALLS[1])
    assert [g.why for g in mp.graphs] == ["the first call", "len(factors) was 1, is 2"]
    assert mp.graphs[1].reason().startswith("step (test_recompiles.py:")
    assert mp.stats().steps == 2


class Annealed(nn.Module):
    """A module that counts its calls and anneals a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.factor = Mlp(), 0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * (1.0 + self.factor)


@pytest.mark.breadth(2)
@pytest.mark.parametrize("where", ["object", "module", "closure", "counter"])
def test_numbers_that_reach_only_tensor_maths(where: str) -> None:
    def build() -> Training:
        net = Annealed()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        notes = SimpleNamespace(calls=0, beta=0.0)
        seen: Counter[str] = Counter()
        sums: dict[str, Any] = defaultdict(int)
        number = 0

        def step(x: Tensor, y: Tensor) -> None:
            nonlocal number
            number += 1
            notes.calls += 1
            factor = {"object": 0.5 + notes.beta, "closure": 1.0 / (number + 1)}.get(where, 1.0)
            opt.zero_grad()
            loss = mse_loss(net(x), y) * factor
            loss.backward()
            opt.step()
            if where == "object":
                notes.beta += 0.1
            elif where == "module":
                net.factor += 0.01
            elif where == "counter":
                seen["steps"] += 1
                sums["loss"] += loss.detach()

        return Training(step, [net], [opt], CALLS)

    torch.manual_seed(0)
    eager = build()
    eager.run(eager.step)
    torch.compiler.reset()
    torch.manual_seed(0)
    compiled, mp = build(), MixedPrecision(**EAGER)
    compiled.run(torch.compile(compiled.step, backend=mp))
    for ours, theirs in zip(compiled.models[0].parameters(), eager.models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert compiled.models[0].calls == eager.models[0].calls == len(CALLS)
    assert mp.stats().steps == len(CALLS)
    assert len(mp.graphs) <= (4 if where == "counter" else 3)  # an empty Counter, a 1, then any number


@pytest.mark.breadth(2)
@pytest.mark.parametrize("one_handle", [True, False])
def test_a_new_model_through_the_same_code_is_a_new_step(one_handle: bool) -> None:
    mp, alive, counted = MixedPrecision(**EAGER), [], 0
    for _ in range(10):
        training = _with(lambda net, x, y: mse_loss(net(x), y))()
        handle = mp if one_handle else MixedPrecision(**EAGER)
        step = torch.compile(training.step, backend=handle)
        step(*CALLS[0])
        step(*CALLS[1])
        alive.append((training, step))
        counted += 0 if one_handle else handle.stats().steps
    assert (mp.stats().steps if one_handle else counted) == 20


@pytest.mark.slow
def test_models_as_arguments_are_new_steps_too() -> None:
    mp, alive = MixedPrecision(**EAGER), []

    @torch.compile(backend=mp)
    def step(net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()

    for _ in range(10):
        net = Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        alive.append((net, opt))
        step(net, opt, *CALLS[0])
    assert mp.stats().steps == 10
    assert {g.why for g in mp.graphs[1:]} == {"opt is another SGD now"}


def _replace(what: str, net: Mlp, opt: torch.optim.Optimizer) -> None:
    new = nn.Linear(net.last.in_features, net.last.out_features)
    if what == "layer":
        net.last = new
    elif what == "weight":
        net.last.weight = new.weight
    else:
        params = opt.param_groups[0]["params"]
        params[next(i for i, p in enumerate(params) if p is net.last.weight)] = new.weight


@pytest.mark.parametrize("what", ["layer", "weight", "entry of the optimizer"])
def test_what_no_longer_is_the_optimizers_is_not_updated(what: str) -> None:
    results = []
    for backend in (None, MixedPrecision(**EAGER)):
        torch.compiler.reset()
        torch.manual_seed(0)
        net = Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor, net: Mlp = net, opt: torch.optim.Optimizer = opt) -> None:
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            opt.step()

        run = step if backend is None else torch.compile(step, backend=backend)
        run(*CALLS[0])
        before = [*net.parameters()]
        _replace(what, net, opt)
        run(*CALLS[1])
        results.append([*before, *net.parameters(), *opt.param_groups[0]["params"]])
        assert backend is None or backend.stats().steps == 2
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


_ELSEWHERE = nn.ModuleList([nn.Linear(4, 2)])


def test_a_layer_by_a_local_and_a_global_name() -> None:
    """In the first call they are one layer, in the second two."""
    results = []
    for backend in (None, MixedPrecision(**EAGER)):
        torch.compiler.reset()
        torch.manual_seed(0)
        first, second = nn.Linear(4, 2), nn.Linear(4, 2)
        _ELSEWHERE[0] = first
        opt = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)

        def step(layer: nn.Module, x: Tensor, y: Tensor, opt: torch.optim.Optimizer = opt) -> None:
            opt.zero_grad()
            mse_loss(layer(x) + 0.5 * _ELSEWHERE[0](x), y).backward()
            opt.step()

        run = step if backend is None else torch.compile(step, backend=backend)
        for layer, call in zip((first, second, first), CALLS, strict=False):
            run(layer, *call)
        results.append([*first.parameters(), *second.parameters()])
        assert backend is None or backend.stats().steps == 3
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_a_whole_run_takes_three_graphs() -> None:
    """Warm-up and decay, batches of three sizes, evaluation, a checkpoint."""
    net, mp = Mlp(), MixedPrecision(**EAGER)
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4)
    schedule = torch.optim.lr_scheduler.SequentialLR(opt, [warm_up, decay], [2])
    evaluate = torch.compile(lambda x: net(x), backend=mp)

    @torch.compile(backend=mp)
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    for epoch in range(3):
        for rows in (8, 12, 5):
            step(*batches(1, rows)[0])
            schedule.step()
        net.eval()
        with torch.no_grad():
            evaluate(batches(1, 8)[0][0])
        net.train()
        if epoch == 1:
            saved = (net.state_dict(), opt.state_dict(), schedule.state_dict(), mp.state_dict())
            for owner, state in zip((net, opt, schedule, mp), copy.deepcopy(saved), strict=True):
                owner.load_state_dict(state)
    assert mp.stats().steps == 9
    assert [g.why for g in mp.graphs] == ["the first call", "x.shape[0] was 8, is 12", "the first call"]


GUARDS = {
    "0/0: tensor 'x' size mismatch at index 1. expected 8, actual 12": "x.shape[1] was 8, is 12",
    "0/0: tensor 'x' stride mismatch at index 0. expected 8, actual 1": "x.stride(0) was 8, is 1",
    "0/0: tensor 'm._modules['0']._parameters['weight']' requires_grad mismatch. expected requires_grad=1. "
    "Guard failed on a parameter, consider using ...": "m.0.weight.requires_grad was True, is False",
    "0/1: tensor 'x' dtype mismatch. expected Float, actual BFloat16": "x.dtype was float32, is bfloat16",
    "0/2: G['epoch'] == 0   # if epoch == 0:  # train.py:7 in step": "epoch was 0, is 3",
    "0/0: x.size()[0] <= 3": "x.shape[0] was at most 3, is 4",
    "0/0: x.size()[0] == x.size()[1]": "x.shape[0] == x.shape[1] no longer holds: 4 and 2",
    "0/0: 2 <= x.size()[0] <= 3": "x.shape[0] was at most 3, is 4",
    "0/0: 5 <= x.size()[0] <= 9": "x.shape[0] was at least 5, is 4",
    "0/0: epochs == 2.5 and mode == 'slow'": "mode was 'slow', is 'fast'",
    "0/0: mode is None": "mode was None, is 'fast'",
    "0/0: not hooks  # f()": "hooks was empty or false, is [1]",
    "0/0: 'a' in options": "options had 'a', has none now",
    "0/0: ___check_obj_id(flag, 93), type=<class 'bool'>": "flag is True now",
    "0/0: ___check_type_id(epochs, 93), type=<class 'int'>": "the type of epochs was int, is float",
    "0/0: GLOBAL_STATE changed: grad_mode ": "a setting of torch changed: grad_mode",
    "0/0: Cache line invalidated because L['m'] got deallocated": "m is another object now: the one before "
    "was freed",
    "0/0: a guard that torch 3 writes": "not a guard that torch 3 writes",
    "0/0: mode.missing == 3": "not mode.missing == 3",
}


@pytest.mark.breadth
@pytest.mark.parametrize("guard", GUARDS)
def test_a_reason_is_in_the_users_words(guard: str) -> None:
    values = {
        "x": torch.ones(4, 2),
        "mode": "fast",
        "hooks": [1],
        "options": {},
        "flag": True,
        "epochs": 2.5,
        "m": nn.Sequential(nn.Linear(2, 2)),
    }
    assert change_of(guard, values, {"epoch": 3}).text == GUARDS[guard]


@pytest.mark.slow
def test_past_the_limit_the_error_names_the_guard_and_its_line() -> None:
    history: list[Tensor] = []

    def note(loss: Tensor) -> None:
        history.append(loss.detach())
        if len(history) > 100:  # HERE
            history.clear()

    training, mp = _after(note)(), MixedPrecision(**EAGER)
    step = torch.compile(training.step, backend=mp)
    before: list[Tensor] = []
    with pytest.raises(CaptureError, match=r"compiled 8 times .* not len\(.* was 7, is 8") as error:  # noqa: PT012
        for call in CALLS:
            before = [p.detach().clone() for p in training.models[0].parameters()]
            step(*call)
    assert "test_recompiles.py" in error.value.where
    assert mp.stats().steps == 8
    for now, then in zip(training.models[0].parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_the_advice_for_it_works() -> None:
    """Let it change outside of the step."""
    history: list[Tensor] = []
    training, mp = _after(lambda loss: history.append(loss.detach()))(), MixedPrecision(**EAGER)
    step = torch.compile(training.step, backend=mp)
    for call in CALLS:
        step(*call)
        if len(history) > 4:
            history.clear()
    assert mp.stats().steps == len(CALLS)
    assert len(mp.graphs) == 1


def test_evaluation_may_be_compiled_for_many_models() -> None:
    mp = MixedPrecision(**EAGER)
    alive = []
    for _ in range(10):
        net = Mlp()
        alive.append(net)
        with torch.no_grad():
            torch.compile(lambda x, net=net: net(x), backend=mp)(CALLS[0][0])


def test_compare_counts_steps() -> None:
    """The comparison itself fails when a call runs uncompiled."""
    mp = MixedPrecision(**EAGER)
    build = _with(lambda net, x, y: mse_loss(net(x), y))
    with pytest.raises(AssertionError, match="a call ran uncompiled"):
        compare(build, steps=2, handle=mp)


def test_a_compilation_that_fails_does_not_count() -> None:
    """The user mends its cause and goes on, however often it failed."""

    class Unready(torch.optim.SGD):
        ready = False

        def step(self) -> None:  # pyrefly: ignore[bad-override]
            if not self.ready:
                raise ValueError("not ready")
            for param in self.param_groups[0]["params"]:
                param.sub_(0.01 * param.grad)

    net = Mlp()
    opt = Unready(net.parameters())
    mp = MixedPrecision(**EAGER)

    @torch.compile(backend=mp)
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()

    for _ in range(9):  # one more than torch's limit
        with pytest.raises(OptimizerError, match="not ready"):
            step(*CALLS[0])
    Unready.ready = True
    step(*CALLS[0])
    assert mp.stats().steps == 1
