"""Calls that only talk to people: ``print``, logging, warnings, progress bars, made when the graph has run.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo
breaks the graph at each, or leaves it out. Here a call is kept, with a copy of
each tensor as it is at that moment, and made after the graph and its side
effects, in the order of the program. So is what Python makes of a number or a text that
is known only then: ``f"{loss:.3f}"``, ``math.exp(loss.item())``.
"""

from __future__ import annotations

import io
import logging
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch._dynamo.bytecode_transformation import create_call_function, create_instruction
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import base, misc
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import TupleVariable

from .dynamo_common import record_of_frame, user_line
from .shown import as_now

VariableTracker = base.VariableTracker

# Packages that show what a program does; objects of theirs read no tensor that they were not given.
_PACKAGES = frozenset(
    "logging tqdm rich loguru structlog absl wandb tensorboardX tensorboard mlflow comet_ml neptune".split()
)
_TALKING = (logging.Logger, io.IOBase, torch.profiler.profile)
_SAYING = frozenset(
    "debug info warning warn error critical exception log fatal warning_once info_once".split()
)
_ASKING = frozenset("isEnabledFor getEffectiveLevel hasHandlers".split())


def is_talk(value: Any) -> bool:
    """Whether calls of ``value``, or of its methods, only tell people something."""
    if value is print or value is warnings.warn or isinstance(value, _TALKING):
        return True
    kind = value if isinstance(value, type) else type(value)
    if kind is types.ModuleType:
        return False
    modules = [getattr(k, "__module__", "") for k in kind.__mro__]
    modules += [getattr(value, "__module__", "")] if isinstance(value, types.FunctionType) else []
    return any(isinstance(m, str) and _shows(m) for m in modules)


def _shows(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES or module.startswith("torch.utils.tensorboard")


@torch.compiler.disable
def call_now(callee: Any, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What the compiled function calls once the graph has run."""
    return (getattr(callee, method) if method else callee)(*arguments, **keywords)


class Later(VariableTracker):
    """The result of a Python call that is made when the graph has run: of a function, or of a method.

    What a call that tells something returns tells too; ``log = logging.getLogger(); log.info(...)``.
    """

    _nonvar_fields: ClassVar[set[str]] = {"function", "method", "tells", *VariableTracker._nonvar_fields}  # pyrefly: ignore[bad-override]

    def __init__(
        self,
        callee: Any,
        arguments: list[Any],
        keywords: dict[str, Any],
        *,
        method: str = "",
        tells: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        known = isinstance(callee, VariableTracker)
        self.callee, self.function = (callee, None) if known else (None, callee)
        self.arguments, self.keywords, self.method, self.tells = arguments, keywords, method, tells

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        text = str if name in _SAYING else None
        return call_later(tx, self, args, kwargs, method=name, tells=self.tells, text=text)

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        return call_later(tx, self, args, kwargs, tells=self.tells)

    def var_getattr(self, tx: Any, name: str) -> Any:
        return misc.GetAttrVariable(self, name)

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from(__name__, "call_now"))
        if self.callee is not None:
            codegen(self.callee)
        else:
            name = codegen.tx.output.install_global_by_id("__fxpass", self.function)
            codegen.append_output(codegen.create_load_global(name, add=True))
        codegen.append_output(codegen.create_load_const(self.method))
        codegen.foreach(self.arguments)
        codegen.append_output(create_instruction("BUILD_TUPLE", arg=len(self.arguments)))
        for key, value in self.keywords.items():
            codegen.append_output(codegen.create_load_const(key))
            codegen(value)
        codegen.append_output(create_instruction("BUILD_MAP", arg=len(self.keywords)))
        codegen.extend_output(create_call_function(4, False))


class Bar(VariableTracker):
    """A progress bar around what the step iterates over: shown, as full, when the graph has run."""

    def __init__(self, items: list[Any], later: Later, **options: Any) -> None:
        super().__init__(**options)
        self.items, self.later = items, later

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        return self.later.call_method(tx, name, args, kwargs)

    def var_getattr(self, tx: Any, name: str) -> Any:
        return misc.GetAttrVariable(self.later, name)

    def iterated(self, tx: Any) -> Any:
        """The items, as a tuple."""
        call_later(tx, _exhaust, [self.later], {}, tells=True)
        return TupleVariable(self.items)

    def reconstruct(self, codegen: Any) -> None:
        codegen(self.later)


class Talker(VariableTracker):
    """Something that only talks to people; a call of it or of a method is made when the graph has run."""

    _nonvar_fields: ClassVar[set[str]] = {"value", *VariableTracker._nonvar_fields}  # pyrefly: ignore[bad-override]

    def __init__(self, value: Any, **options: Any) -> None:
        super().__init__(**options)
        self.value = value

    def python_type(self) -> type:
        return type(self.value)

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        if self._name() in _ASKING and all(a.is_python_constant() for a in args):
            return VariableTracker.build(tx, self.value(*(a.as_python_constant() for a in args)))
        if (
            hasattr(self.value, "__iter__")
            and isinstance(self.value, type)
            and args
            and (items := _items(tx, args[0])) is not None
        ):
            return Bar(items, call_later(tx, self, [_range(tx, len(items)), *args[1:]], kwargs, tells=True))
        callee = _Warn(tx, *args, **kwargs) if self.value is warnings.warn else self
        text = str if self.value in (print, warnings.warn) or self._name() else None
        return self._result(call_later(tx, callee, args, kwargs, tells=True, text=text))

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        return self.var_getattr(tx, name).call_function(tx, args, kwargs)

    def var_getattr(self, tx: Any, name: str) -> Any:
        value, source = getattr(self.value, name), self.source and AttrSource(self.source, name)
        return Talker(value, source=source) if callable(value) else VariableTracker.build(tx, value, source)

    def _result(self, later: Later) -> Any:
        """None where it is known to be None: the value of ``print()`` may be tested."""
        says = self.value in (print, warnings.warn) or self._name() in _SAYING
        return ConstantVariable.create(None) if says else later

    def _name(self) -> str:
        """The name of the logger's method that this is; empty if it is something else."""
        of_logger = isinstance(getattr(self.value, "__self__", None), logging.Logger)
        return getattr(self.value, "__name__", "") if of_logger else ""

    def reconstruct(self, codegen: Any) -> None:
        codegen(self.source)


def _items(tx: Any, variable: Any) -> list[Any] | None:
    """What ``variable`` iterates over, if that is known while tracing."""
    if variable.is_python_constant() and isinstance(variable.as_python_constant(), str):
        return None
    return list(VariableTracker.build(tx, tuple).call_function(tx, [variable], {}).items)


def _range(tx: Any, length: int) -> Any:
    return VariableTracker.build(tx, range).call_function(tx, [ConstantVariable.create(length)], {})


def _exhaust(bar: Iterable[Any]) -> None:
    for _ in bar:
        pass


class _Warn:
    """``warnings.warn`` that tells the line it was traced at, once per line as in eager."""

    def __init__(self, tx: Any, message: Any, category: Any = None, stacklevel: Any = None, **_: Any) -> None:
        level = 1 if stacklevel is None else int(stacklevel.as_python_constant())
        frame = tx
        while level > 1 and getattr(frame, "parent", None) is not None:
            frame, level = frame.parent, level - 1
        summary = frame.frame_summary()
        self.at = (summary.filename, summary.lineno)
        self.globals = frame.f_globals

    def __call__(
        self, message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **_: Any
    ) -> None:
        registry = self.globals.setdefault("__warningregistry__", {})
        module = self.globals.get("__name__") or "<unknown>"
        kind = category or UserWarning
        warnings.warn_explicit(message, kind, *self.at, module=module, registry=registry, source=source)


def call_later(
    tx: Any,
    callee: Any,
    args: Any,
    kwargs: Any,
    *,
    method: str = "",
    tells: bool = False,
    settles: bool = False,
    text: Any = None,
) -> Later:
    """A call to make when the graph has run, with what its arguments are now.

    ``settles``: it changes what an optimizer reads, so none of the step comes after it.
    ``text``: all it does with objects is to write them by this function.
    """
    arguments = [as_now(tx, a, text) for a in args]
    keywords = {k: as_now(tx, v, text) for k, v in kwargs.items()}
    later = Later(callee, arguments, keywords, method=method, tells=tells)
    if tells:
        record_of_frame().told.append(later)
    if settles:
        record_of_frame().settled = user_line()
    return later


# ---------------------------------------------------------------- at the end of the frame


def codegen_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SideEffects.codegen_hooks``, and what was told, before objects change."""

    def codegen_hooks(self: Any, codegen: Any) -> None:
        original(self, codegen)
        for later in record_of_frame().told:
            codegen(later)
            codegen.append_output(create_instruction("POP_TOP"))

    return codegen_hooks


def empty_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SideEffects.is_empty``: a frame that tells something has more to do than to return."""

    def is_empty(self: Any) -> bool:
        return original(self) and not record_of_frame().told

    return is_empty


def prune_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SideEffects.prune_dead_object_new``: what was told of is alive."""

    def prune_dead_object_new(self: Any, tx: Any) -> None:
        told = record_of_frame().told
        tx.stack.extend(told)
        original(self, tx)
        del tx.stack[len(tx.stack) - len(told) :]

    return prune_dead_object_new
