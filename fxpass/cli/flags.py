"""The backend's options as flags, generated from their dataclass; and the flags every command shares."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

from .. import scaling
from ..errors import OptionError
from ..hallway.dry_run import LARGE, fake_ranks
from ..options import _RULES, Options
from ..report.memory import AUTO, GRAPH, NOTES, PROGRAM
from .builtin import SPREAD
from .usage import UsageProblem

Command = Callable[..., Any]
# no text is a group: --ranks stands for it; the commands say themselves what they do
GROUP, PROGRESS = "data_parallel", "progress"
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse(name: str, text: str) -> Any:
    """The value of option ``name`` written as text.

    Numbers, ``none`` and words are themselves; a loss scale may be written as
    its constructor, ``DynamicLossScale(init_scale=1024)``.

    Raises:
        UsageProblem: there is no such option, or a value that cannot be read.
    """
    fields = {f.name: f for f in dataclasses.fields(Options)}
    name = name.replace("-", "_")
    if name not in fields:
        raise UsageProblem(f"option {name!r} does not exist", f"the options are {', '.join(fields)}")
    default = _default(fields[name])
    if isinstance(default, bool) and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if isinstance(default, tuple):
        return tuple(part for part in text.split(",") if part)
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("inf", "infinity"):
        return float("inf")
    if "(" in text:
        return _scale_object(name, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _scale_object(name: str, text: str) -> Any:
    """``DynamicLossScale(init_scale=1024)``, for the classes of fxpass/scaling/."""
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        cls = getattr(scaling, call.func.id)
        args = [ast.literal_eval(a) for a in call.args]
        made = cls(*args, **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
        assert isinstance(made, scaling.LossScale)
        return made
    except OptionError:
        raise
    except Exception:
        raise UsageProblem(
            f"{name}={text} cannot be read", "write DynamicLossScale(init_scale=1024)"
        ) from None


def parse_all(texts: dict[str, str]) -> dict[str, Any]:
    """Options by name from their texts, checked as the backend checks them."""
    options = {name: parse(name, text) for name, text in texts.items()}
    Options(**options)
    return options


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def backend_options(command: Command) -> Command:
    """Add one flag per field of the options dataclass; the command gets them as ``options``, a dict."""

    @functools.wraps(command)
    def with_options(**kwargs: Any) -> Any:
        given = {n: kwargs.pop(f"option_{n}") for n in names}
        given = {n: v for n, v in given.items() if v not in (None, ())}
        texts = {n: ",".join(v) if isinstance(v, tuple) else str(v) for n, v in given.items()}
        return command(options=parse_all(texts), **kwargs)

    left_out = (GROUP, PROGRESS)
    given = [f for f in dataclasses.fields(Options) if f.name not in left_out]
    fields = [f for f in given if not isinstance(_default(f), dict)]
    names = [f.name for f in fields]
    wrapped: Command = with_options
    for field in reversed(fields):
        default = _default(field)
        shown = str(default).removeprefix("torch.") if default != () else ""
        allowed = _RULES[field.name][1] if field.name in _RULES else ""
        text = f"{allowed}{f'  [default: {shown}]' if shown else ''}"
        flag = f"--{field.name.replace('_', '-')}"
        kind: dict[str, Any] = {"metavar": "VALUE"}
        if isinstance(default, bool):
            flag, kind = f"{flag}/--no-{flag[2:]}", {"is_flag": True, "default": None}
        elif isinstance(default, tuple):
            kind |= {"multiple": True}
        wrapped = click.option(flag, f"option_{field.name}", help=text, **kind)(wrapped)  # pyrefly: ignore[bad-argument-type]
    return wrapped


def capture_options(command: Command) -> Command:
    """``--device`` and ``--tensors``."""
    command = click.option(
        "--tensors",
        type=click.Choice(["auto", "fake", "real"]),
        default="auto",
        help="fake: shapes without memory; real: build the model; auto: fake if that works  [default: auto]",
    )(command)
    return click.option(
        "--device", metavar="DEVICE", help="build and trace for this device; cuda needs no GPU for it"
    )(command)


def across_ranks(command: Command) -> Command:
    """``--ranks``: option ``data_parallel`` over that many ranks, which need not be there; ``--sharded``."""

    @functools.wraps(command)
    def with_ranks(options: dict[str, Any], ranks: int | None, sharded: bool, **kwargs: Any) -> Any:
        if ranks is None and sharded:
            raise UsageProblem("--sharded without --ranks", "say over how many: --ranks 8 --sharded")
        if ranks is None:
            return command(options=options, **kwargs)
        with fake_ranks(ranks) as group:
            token = SPREAD.set(group if sharded else None)
            try:
                return command(options={**options, GROUP: group}, **kwargs)
            finally:
                SPREAD.reset(token)

    text = "average gradients over N ranks, as option data_parallel does; no other process is needed"
    with_ranks = click.option("--ranks", type=click.IntRange(2), metavar="N", help=text)(with_ranks)
    text = "spread a built-in step's weights over the ranks, as fxpass.shard_ does"
    return click.option("--sharded", is_flag=True, help=text)(with_ranks)


def memory_of(command: Command) -> Command:
    """``--of``: whose memory is profiled."""
    text = (
        f"memory {NOTES[PROGRAM]}; or {NOTES[GRAPH]}; auto: the program up to {LARGE} nodes  [default: auto]"
    )
    return click.option("--of", type=click.Choice([AUTO, PROGRAM, GRAPH]), default=AUTO, help=text)(command)


def common_options(command: Command) -> Command:
    """``--json`` and ``--traceback``."""
    command = click.option("--traceback", is_flag=True, help="show where an error came from")(command)
    return click.option("--json", "as_json", is_flag=True, help="print JSON (schema: docs/cli.md)")(command)
