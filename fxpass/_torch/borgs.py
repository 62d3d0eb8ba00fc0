"""Objects that share one ``__dict__``, so that what is written to one is read from all of them.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Libraries keep
their state so (``self.__dict__ = Class._shared``, one object at each place that needs it).
Dynamo keeps what a frame writes by object, and would read the old value through another one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.variables import base

from .dynamo_common import record_of_frame


def one_of_many(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``VariableBuilder._wrap``: the variable of the object through which the state was met first."""

    def _wrap(self: Any, value: Any) -> Any:
        attributes = None if isinstance(value, (type, FunctionType, ModuleType)) else _attributes(value)
        if attributes is None or self.source is None:
            return original(self, value)
        first, source = record_of_frame().by_attributes.setdefault(id(attributes), (value, self.source))
        if first is value or type(first) is not type(value):
            return original(self, value)
        self.install_guards(GuardBuilder.ID_MATCH)
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        return base.VariableTracker.build(self.tx, first, source)

    return _wrap


def _attributes(value: Any) -> dict[str, Any] | None:
    """The ``__dict__``, whatever the class makes of a look-up."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None
