"""Calls that only talk to people are no graph breaks, and say what they say in eager."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from fxpass import CaptureError, MixedPrecision
from tests.support.helpers import EAGER, FP32, Mlp, Training, batches, compare, same

logger = logging.getLogger("tests.talk")


@functools.lru_cache(None)
def _warning_once(self: logging.Logger, *args: Any) -> None:
    self.warning(*args)


class Chatty(logging.Logger):
    warning_once = _warning_once


chatty = Chatty("tests.chatty", logging.INFO)


class Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        sys.stdout.write(f"{record.levelname} {record.getMessage()}\n")


class Writer:
    """Like TensorBoard's, in Python."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def add_scalar(self, tag: str, value: Tensor, step: int) -> None:
        self.rows.append((tag, float(value), step))


class Trainer:
    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.history: list[float] = []
        self.writer, self.meter = Writer(), Meter()
        self.calls = 0
        self.note: Note | None = None

    def log(self, name: str, value: Any) -> None:
        self.metrics[name] = value.item() if isinstance(value, Tensor) else value


class Meter:
    def __init__(self) -> None:
        self.sum, self.count, self.average = 0.0, 0, 0.0

    def update(self, value: float, count: int) -> None:
        self.sum += value * count
        self.count += count
        self.average = self.sum / self.count

    def __str__(self) -> str:
        return f"average {self.average:.3f} of {self.count}"

    def __repr__(self) -> str:
        return f"Meter({self.count})"


@dataclasses.dataclass
class Note:
    rows: int
    text: str


Say = Callable[[Tensor, Tensor, nn.Module, Trainer], Any]


def _print(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    print("a string", x.shape, len(x), end="!\n", file=sys.stdout)
    print(loss.detach(), [loss.detach()], {"loss": loss.detach()})
    for p in net.parameters():
        print(p.shape)


def _texts(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    value = loss.item()
    print(f"{value:.3f}", f"{loss:.3f}", "%.3f %d" % (value, 3), f"{value:.2f}", round(value, 3))  # noqa: UP031
    print(str(value)[:4] if False else str(value > 0), ", ".join([f"{value:.3f}", "b"]), "a" + f"{value:.2f}")
    print(f"{value:.3f}".rjust(10), json.dumps({"perplexity": round(math.exp(value), 3)}))


def _log(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    logger.debug("quiet")
    logger.info("loss %.3f", loss)
    logger.log(logging.WARNING, "loss %.3f", loss.item())
    logger.error("error")
    logging.getLogger("tests.talk").critical("critical %d", 1)
    chatty.warning_once("once")
    if logger.isEnabledFor(logging.INFO):
        logger.info("enabled")


def _warn(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    warnings.warn("careful", stacklevel=1)
    warnings.warn("deprecated", FutureWarning, stacklevel=2)


def _history(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    me.history.append(loss.item())
    me.history.append(float(loss.detach()))
    me.history.append(math.exp(loss.item()))
    me.history.append((loss > 1).sum().item() / 3)
    me.history.append(min(loss.item(), 1.5) * 2)
    me.history.append(float(int(loss * 10)))


def _trainers(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    me.log("loss", loss)
    me.log("doubled", loss.item() * 2)
    me.writer.add_scalar("loss", loss, 3)
    me.meter.update(loss.item(), len(x))


def _gradients(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    """Unscaled, and the weights as they are before the update."""
    grad = net.first.weight.grad  # pyrefly: ignore[missing-attribute]
    assert grad is not None
    print(f"{grad.norm():.4f} {net.last.bias.detach().sum():.4f}")  # pyrefly: ignore[missing-attribute]


def _returned(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> Any:
    rows = torch.stack([loss, loss * 2]).detach()
    return {
        "loss": loss.item(),
        "positive": bool((loss > 0).item()),
        "rows": rows.tolist(),
        "n": (loss > 0).sum().item(),
    }


def _counted(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    print("call", me.calls, f"{me.calls}, {me.calls:03d}, {me.calls!r}")
    me.calls += 1


def _objects(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> None:
    """What an object says of itself then: what the step changes of it comes last."""
    print(me.meter, [me.meter])
    me.meter.update(loss.item(), len(x))
    print(me.meter, f"{me.meter} {me.meter!r}", "%s" % me.meter)  # noqa: UP031
    logger.warning("meter %s", me.meter)
    note = Note(len(x), f"{loss.item():.3f}")
    note.rows += 1
    me.note = note
    print(note, {"note": me.note}, me.note.rows)
    print(me.metrics)
    me.metrics["rows"] = len(x)
    print(me.metrics)


SAYS = [_print, _texts, _log, _warn, _history, _trainers, _gradients, _returned, _counted, _objects]


def _step(net: nn.Module, opt: Any, say: Say, me: Trainer) -> Callable[[Tensor, Tensor], Any]:
    def step(x: Tensor, y: Tensor) -> Any:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        said = say(loss, x, net, me)
        opt.step()
        return said

    return step


@contextlib.contextmanager
def _listening() -> Iterator[list[warnings.WarningMessage]]:
    handler = Told()
    logger.addHandler(handler)
    chatty.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    _warning_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield warned
    finally:
        logger.removeHandler(handler)
        chatty.removeHandler(handler)


def _run(say: Say, capsys: Any, mp: MixedPrecision | None) -> tuple[Any, ...]:
    torch.compiler.reset()
    torch.manual_seed(0)
    net, me = Mlp(), Trainer()
    step: Any = _step(net, torch.optim.SGD(net.parameters(), lr=0.1), say, me)
    step = step if mp is None else torch.compile(step, backend=mp)
    with _listening() as warned:
        outputs = [step(*batch) for batch in batches(3)]
    mine = [(str(w.message), w.category, w.lineno) for w in warned if w.filename == __file__]
    numbers = [me.metrics, me.history, me.writer.rows, vars(me.meter), me.calls]
    text = re.sub(r"\d+\.\d{4,}", lambda m: f"{float(m.group()):.3f}", capsys.readouterr().out)
    return text, mine, numbers, outputs


@pytest.mark.breadth
@pytest.mark.parametrize("say", SAYS, ids=lambda say: say.__name__[1:])
def test_it_says_what_eager_says(say: Say, capsys: Any) -> None:
    expected = _run(say, capsys, None)
    mp = MixedPrecision(**EAGER, loss_scale=1024.0)
    actual = _run(say, capsys, mp)
    assert actual[:2] == expected[:2]
    same(list(actual[2:]), list(expected[2:]), "numbers")
    assert mp.stats().steps == 3
    assert len(mp.graphs) <= 3  # a dict that grows, a count that has changed once, then a float


def test_all_of_it_under_the_default_options(capsys: Any) -> None:
    def say(loss: Tensor, x: Tensor, net: nn.Module, me: Trainer) -> Any:
        for each in (_texts, _history, _gradients, _objects):
            each(loss, x, net, me)
        return _returned(loss, x, net, me)

    expected = _run(say, capsys, None)
    mp = MixedPrecision(**FP32)
    actual = _run(say, capsys, mp)
    assert actual[0] == expected[0]
    same(list(actual[2:]), list(expected[2:]), "numbers")
    assert len(mp.graphs) <= 2  # a float that has changed


@pytest.mark.parametrize("say", [_history, _returned], ids=lambda say: say.__name__[1:])
def test_no_number_waits_in_the_graph(say: Say) -> None:
    net = Mlp()
    mp = MixedPrecision(**EAGER)
    step = _step(net, torch.optim.SGD(net.parameters(), lr=0.1), say, Trainer())
    torch.compile(step, backend=mp)(*batches(1)[0])
    assert "local_scalar" not in mp.graphs[0].before


# ---------------------------------------------------------------- where it is said


class Talking(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.net, self.checkpointed = Mlp(), checkpointed

    def body(self, x: Tensor) -> Tensor:
        print("in the model", x.shape)
        warnings.warn("in the model", stacklevel=1)
        chatty.warning_once("once in the model")
        return self.net(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_that_talks(checkpointed: bool, capsys: Any) -> None:
    def build() -> Training:
        net = Talking(checkpointed)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        return Training(_step(net, opt, lambda *_: None, Trainer()), [net], [opt])

    with _listening():
        compare(build, handle=MixedPrecision(**EAGER))
        said = capsys.readouterr().out
    eager = 6 if checkpointed else 3  # a checkpointed region runs, and speaks, twice in eager
    assert said.count("in the model torch.Size([6, 4])") == eager + 3
    assert said.count("once in the model") == 1


def test_a_loop_that_talks(capsys: Any) -> None:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> float:
            total = 0.0
            for i, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                opt.zero_grad()
                loss = mse_loss(net(a), b)
                print(i, f"{loss.item():.3f}")
                loss.backward()
                opt.step()
                total += loss.item()
            return total

        return Training(step, [net], [opt])

    compare(build, handle=MixedPrecision(**EAGER))
    said = capsys.readouterr().out.splitlines()
    assert said[:6] == said[6:]


def test_progress_bars(capsys: Any) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm

    def build() -> Training:
        net = Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        bar = tqdm(total=9, file=sys.stdout, mininterval=0, bar_format="{desc}{n}{postfix}\n")

        def step(x: Tensor, y: Tensor) -> None:
            for a, b in tqdm(
                list(zip(x.chunk(2), y.chunk(2), strict=True)), file=sys.stdout, bar_format="{n}\n"
            ):
                opt.zero_grad()
                loss = mse_loss(net(a), b)
                loss.backward()
                bar.update()
                bar.set_description(f"loss {loss.item():.3f}")
                bar.set_postfix(loss=loss.item(), refresh=True)
                opt.step()

        return Training(step, [net], [opt])

    compare(build, handle=MixedPrecision(**EAGER))
    assert capsys.readouterr().out.count("loss=") >= 12


def test_a_tensor_shown_inside_a_checkpointed_region_has_the_line() -> None:
    net = Mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def body(x: Tensor) -> Tensor:
        print(x.mean())  # HERE
        return net(x)

    @torch.compile(backend=MixedPrecision(**EAGER))
    def step(x: Tensor, y: Tensor) -> None:
        mse_loss(checkpoint(body, x, use_reentrant=False), y).backward()
        opt.step()

    with pytest.raises(CaptureError, match="checkpointed") as error:
        step(*batches(1)[0])
    assert "HERE" in error.value.where


# ---------------------------------------------------------------- a block that breaks after the update


@contextlib.contextmanager
def _block() -> Iterator[None]:
    yield


def _write(rows: list[Any], value: Any) -> None:
    with open(os.devnull):  # nothing that Dynamo traces
        rows.append(value)


def _in_a_block(say: Callable[[Any, Any, Tensor, list[Any]], Any], rows: list[Any]) -> Callable[[], Training]:
    def build() -> Training:
        rows.clear()
        net = Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)

        def step(x: Tensor, y: Tensor) -> None:
            with _block():
                opt.zero_grad()
                loss = mse_loss(net(x), y)
                loss.backward()
                opt.step()
                say(opt, scheduler, loss, rows)

        return Training(step, [net], [opt])

    return build


def test_a_scheduler_in_a_block() -> None:
    def say(opt: Any, scheduler: Any, loss: Tensor, rows: list[Any]) -> None:
        scheduler.step(loss.item())
        rows.append(scheduler.get_last_lr()[0])

    rows: list[Any] = []
    build = _in_a_block(say, rows)
    eager = build()
    eager.run(eager.step)
    expected = list(rows)
    compare(build, handle=MixedPrecision(**EAGER))
    assert rows == expected
    assert len(set(rows)) > 1


def test_a_call_in_a_block_that_may_read_what_the_step_changes_is_refused() -> None:
    def say(opt: Any, scheduler: Any, loss: Tensor, rows: list[Any]) -> None:
        rows.append(1.0)

    rows: list[Any] = []
    build = _in_a_block(say, rows)
    compare(build, handle=MixedPrecision(**EAGER))
    assert rows == [1.0] * 3
    net = Mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        rows.append(len(rows))
        with _block():
            mse_loss(net(x), y).backward()
            opt.step()
            _write(rows, 2.0)  # HERE

    with pytest.raises(CaptureError) as error:
        torch.compile(step, backend=MixedPrecision(**EAGER))(*batches(1)[0])
    assert "HERE" in str(error.value) or "devnull" in str(error.value)
    assert rows == [1.0] * 3
