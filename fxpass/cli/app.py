"""The list of commands, and what happens to an error on its way out."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

from .. import __version__
from ..errors import FxpassError, OptionError
from .compile import compile_
from .doctor import doctor
from .explain import explain
from .graph import graph
from .inspect import inspect
from .memory import memory
from .output import report_error
from .passes import passes
from .report import report
from .usage import UsageProblem

COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "graph": graph,
    "memory": memory,
    "report": report,
    "compile": compile_,
    "passes": passes,
    "explain": explain,
    "doctor": doctor,
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fxpass")
def app() -> None:
    """Look into a training step that fxpass compiles: what was captured, what was inserted and why.

    TARGET is FILE.py:FUNCTION or MODULE:FUNCTION, a function that returns (step, args) or
    (step, args, kwargs), or a built-in step: gpt, cnn, lstm, bert, gpt-124M, gpt-1.3B, gpt-7B.
    Only compile runs the step.
    """


for _name, _command in COMMANDS.items():
    app.add_command(click.command(_name)(_command))


def run(args: Sequence[str]) -> int:
    """Run one command line; returns the exit code: 0, 1 (the step cannot be compiled) or 2 (usage)."""
    as_json = "--json" in args
    try:
        code = app.main(list(args), prog_name="fxpass", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "fxpass"
        report_error(UsageProblem(error.format_message(), f"see {path} --help"), 2, as_json)
        return 2
    except click.Abort:
        return 130
    except (UsageProblem, OptionError) as error:
        return _failed(error, 2, args)
    except FxpassError as error:
        return _failed(error, 1, args)
    except Exception as error:
        return _failed(_unexpected(error), 1, args, cause=error)


def _unexpected(error: Exception) -> FxpassError:
    """What torch or the user's step raised while it was traced, in one message."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    where = next((lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("from user code")), "")
    hint = "run the step uncompiled to see whether it works there; --traceback shows all"
    found = f"the step cannot be traced: {type(error).__name__}: {lines[0] if lines else ''}"
    return FxpassError(found[:500], where=where.strip(), hint=hint)


def _failed(error: Exception, code: int, args: Sequence[str], cause: Exception | None = None) -> int:
    if "--traceback" in args:
        traceback.print_exception(cause or error)
    report_error(error, code, "--json" in args)
    return code
