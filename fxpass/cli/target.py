"""TARGET (``file.py:function``, ``package.module:function`` or a built-in name) to a step and arguments."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hallway.dry_run import Call
from .builtin import BUILTINS, SPREAD
from .usage import UsageProblem

WANTED = "a function that takes nothing and returns (step, args) or (step, args, kwargs)"


@dataclass(frozen=True)
class Target:
    """What to look at: ``make()`` builds the model and returns the step with its arguments."""

    name: str
    make: Callable[[], Call]


def load(text: str) -> Target:
    """The target called ``text``.

    Raises:
        UsageProblem: there is no such file, module or function, or importing it fails.
    """
    if text in BUILTINS:
        return Target(text, BUILTINS[text])
    if SPREAD.get() is not None:
        hint = "call fxpass.shard_(model, torch.distributed.group.WORLD) in it, before the optimizer is made"
        raise UsageProblem(f"--sharded is for built-in steps, and {text!r} is none", hint)
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        near = difflib.get_close_matches(text, BUILTINS, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UsageProblem(
            f"target {text!r} is neither a built-in step nor FILE.py:FUNCTION nor MODULE:FUNCTION",
            f"{guess}built-in are {', '.join(BUILTINS)}; a function is {WANTED}",
        )
    module = _from_file(Path(place)) if place.endswith(".py") or "/" in place else _from_module(place)
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"write {WANTED}"
        raise UsageProblem(f"{place} has no {name!r}", hint)
    if not callable(function):
        raise UsageProblem(f"{text} is a {type(function).__name__}, not a function", f"write {WANTED}")
    return Target(text, lambda: _call(text, function))


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageProblem(f"there is no file {str(path)!r}", "give the path from the current folder")
    name = f"fxpass_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageProblem(f"{str(path)!r} is not a Python file", "give the path of a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _raised(f"importing {path}", error) from error
    return module


def _from_module(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            hint = "give FILE.py:FUNCTION, or run fxpass where the package can be imported"
            raise UsageProblem(f"there is no module {name!r}", hint) from error
        raise _raised(f"importing {name}", error) from error
    except Exception as error:
        raise _raised(f"importing {name}", error) from error


def _call(text: str, function: Callable[[], Any]) -> Call:
    try:
        made = function()
    except Exception as error:
        raise _raised(f"{text}()", error) from error
    returned = f"{text}() returned a {{}}".format
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        what = f"tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise UsageProblem(returned(what), f"it must be {WANTED}")
    step, args, kwargs = (*made, {})[:3]
    if not callable(step):
        raise UsageProblem(returned(f"{type(step).__name__} as the step"), "return (step, args)")
    if not isinstance(args, (tuple, list)):
        raise UsageProblem(returned(f"{type(args).__name__} as args"), "return a tuple: (step, (x, y))")
    if not isinstance(kwargs, dict):
        raise UsageProblem(returned(f"{type(kwargs).__name__} as kwargs"), "return a dict of keywords")
    return step, tuple(args), kwargs


def _raised(doing: str, error: Exception) -> UsageProblem:
    """The user's own exception, with the last line of theirs that it passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _ours_or_torchs(f.filename)]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = str(error).strip().splitlines()
    hint = "run it by itself to see why, or give --traceback"
    return UsageProblem(f"{doing} raised {type(error).__name__}{where}: {text[0] if text else ''}", hint)


def _ours_or_torchs(file: str) -> bool:
    return any(part in file for part in ("/fxpass/", "/torch/", "importlib", "<frozen"))
