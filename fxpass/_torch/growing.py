"""Lists that a step only appends to: what is in them already is no business of the graph.

Written for torch 2.11 to 2.13. Dynamo guards on the length of every list it
meets, so ``losses.append(loss.detach())`` compiles the step anew at each call
until a limit is reached. Here the guard waits until something but an append
asks for the list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch._dynamo.bytecode_transformation import create_call_method, create_instruction
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import DequeVariable, ListVariable


class _Growing:
    """Has no ``items`` yet: whoever asks for them makes it an ordinary list, guarded and with them."""

    _ordinary: type
    _appended: list[Any]
    _present: list[Any]

    @property
    def items(self) -> list[Any]:
        grown: Any = self
        grown.__class__ = self._ordinary
        install_guard(grown.source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
        grown.items = [*self.__dict__.pop("_present"), *self.__dict__.pop("_appended")]
        return grown.items

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "append" and len(args) == 1 and not kwargs:
            tx.output.side_effects.mutation(self)
            self._appended.append(args[0])
            return ConstantVariable.create(None)
        _ = self.items
        return self.call_method(tx, name, args, kwargs)  # by now the ordinary list's

    def replay(self, codegen: Any) -> list[Any]:
        """Bytecode that extends the list by what was appended; returns what has to come last."""
        grown: Any = self
        codegen(grown.source)
        codegen.load_method("extend")
        codegen.foreach(self._appended)
        codegen.append_output(create_instruction("BUILD_LIST", arg=len(self._appended)))
        return [*create_call_method(1), create_instruction("POP_TOP")]


class GrowingList(_Growing, ListVariable):
    """A list, which Dynamo extends in one call once the step is over."""

    _ordinary = ListVariable


class GrowingDeque(_Growing, DequeVariable):
    """A deque, likewise."""

    _ordinary = DequeVariable


_KINDS = {ListVariable: GrowingList, DequeVariable: GrowingDeque}


def wrap_growing(builder: Any, value: list[Any] | deque[Any]) -> Any:
    """A deque of the user's that the step only appends to."""

    """A list of the user's that the step only appends to."""

    """What ``VariableBuilder.wrap_listlike`` makes of a list, without the guard on its length for now.

    Called from ``_wrap``: Dynamo keeps ``wrap_listlike`` in a table of the process, where
    a patch of it would stay for every backend.
    """
    builder.install_guards = lambda *_: None
    try:
        variable = builder.wrap_listlike(value)
    finally:
        del builder.install_guards
    grown = _KINDS.get(type(variable))
    if grown is None or variable.source is None:
        builder.install_guards(GuardBuilder.SEQUENCE_LENGTH)
        return variable
    builder.install_guards(GuardBuilder.TYPE_MATCH)
    present = variable.__dict__.pop("items")
    variable.__class__ = grown
    vars(variable).update(_present=present, _appended=[])
    return variable


def codegen_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SideEffects.codegen_update_mutated``, which extends growing lists."""

    def codegen_update_mutated(self: Any, codegen: Any, *args: Any, **kwargs: Any) -> None:
        modified = list(self._get_modified_vars())
        grown = [v for v in modified if isinstance(v, _Growing)]
        if grown:
            self._get_modified_vars = lambda: [v for v in modified if not isinstance(v, _Growing)]
        suffixes = [variable.replay(codegen) for variable in grown]
        for suffix in reversed(suffixes):
            codegen.extend_output(suffix)
        try:
            original(self, codegen, *args, **kwargs)
        finally:
            vars(self).pop("_get_modified_vars", None)

    return codegen_update_mutated
