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

from ..errors import CaptureError
from .dynamo_common import fail, record_of_frame, user_line
from .frame_record import FrameRecord


def one_of_many(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``VariableBuilder._wrap``: the variable of the object through which the state was met first."""

    def _wrap(self: Any, value: Any) -> Any:
        if isinstance(value, dict):
            record_of_frame().dicts.setdefault(id(value), user_line())
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


def refuse_two_ways(record: FrameRecord, effects: Any) -> None:
    """Raise if attributes that the frame writes are also read from the dict, as a new object does.

    Raises:
        CaptureError: what was read may be older than what was written.
    """
    for number in record.dicts.keys() & record.by_attributes.keys():
        owner = record.by_attributes[number][0]
        variable = effects.id_to_variable.get(id(owner))
        if variable is not None and effects.is_modified(variable):
            name = type(owner).__name__
            found = (
                f"the step changes the state that all objects of {name} share, and reads it from a new one"
            )
            hint = f"make the {name} before the step, and use that one in it"
            raise fail(CaptureError(found, where=record.dicts[number], hint=hint))


def _attributes(value: Any) -> dict[str, Any] | None:
    """The ``__dict__``, whatever the class makes of a look-up."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None
