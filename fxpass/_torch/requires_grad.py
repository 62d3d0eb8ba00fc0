"""``requires_grad_()`` on parameters in the step: a GAN freezes its critic for the generator's half.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo
breaks the graph there. Here a frozen parameter is read through ``detach()``,
which is what it is to autograd, and the flag is set on the object when the graph has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._functorch import get_inplace_requires_grad_allowed, set_inplace_requires_grad_allowed
from torch._dynamo.utils import set_example_value
from torch._dynamo.variables import builtin
from torch._dynamo.variables.base import AttributeMutationExisting
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.tensor import TensorVariable

from .dynamo_common import record_of_frame

# the method of Dynamo that traces setattr(), by class and name; torch 2.13 has a class of its own for it
SETATTR: tuple[Any, str] = (
    (builtin.SetAttrBuiltinVariable, "_call_setattr")
    if hasattr(builtin, "SetAttrBuiltinVariable")
    else (builtin.BuiltinVariable, "call_setattr")
)


def input_proxy(variable: Any) -> Any:
    """The graph input that a parameter is, be it frozen just now."""
    return record_of_frame().toggled.get(variable, variable.as_proxy())


def toggle_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``requires_grad_()``: a flag that differs from the tensor's is followed where it can be."""

    def method_requires_grad_(self: Any, tx: Any, requires_grad: Any = True) -> Any:
        wanted = requires_grad if isinstance(requires_grad, bool) else requires_grad.as_python_constant()
        given = input_proxy(self)
        fake = given.node.meta["example_value"]
        # what was computed from it before saw the flag as it was at the start
        used = wanted and not fake.requires_grad and bool(given.node.users)
        if self.source is None and not hasattr(tx.speculation_log, "graph_break_on_requires_grad_"):
            return self if self.requires_grad == wanted else _toggle_made(self, tx, wanted)
        if self.source is None or given.node.op != "placeholder" or self.has_grad_fn or used:
            return original(self, tx, requires_grad)
        if self.requires_grad == wanted:
            return self
        record_of_frame().toggled[self] = given
        if wanted:
            fake.requires_grad_(True)
            self.proxy = given
        else:
            self.proxy = tx.output.create_proxy("call_method", "detach", (given,), {})
            set_example_value(self.proxy.node, fake.detach())
        self.requires_grad = wanted
        if not tx.output.side_effects.is_attribute_mutation(self):
            self.mutation_type = AttributeMutationExisting()
        tx.output.side_effects.store_attr(self, "requires_grad", ConstantVariable.create(wanted))
        return self

    return method_requires_grad_


def _toggle_made(variable: Any, tx: Any, wanted: bool) -> Any:
    """For torch before 2.13: the flag of a tensor that the step computes, set in the graph as it is set here.

    functorch, under which AOTAutograd traces the graph once more, refuses it unless it is told otherwise.
    """
    allowed = get_inplace_requires_grad_allowed()
    tx.output.create_node("call_function", set_inplace_requires_grad_allowed, (True,), {})
    tx.output.create_proxy("call_method", "requires_grad_", (variable.as_proxy(), wanted), {})
    tx.output.create_node("call_function", set_inplace_requires_grad_allowed, (allowed,), {})
    set_inplace_requires_grad_allowed(True)
    try:
        variable.as_proxy().node.meta["example_value"].requires_grad_(wanted)
    finally:
        set_inplace_requires_grad_allowed(allowed)
    variable.requires_grad = wanted
    if wanted:
        tx.output.leaf_var_creation_order.append(variable)
    return variable


def assignment_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``p.requires_grad = flag``, by the method; ``p.data = p.data.to(device)``, where it changes nothing."""

    def call_setattr(self: Any, tx: Any, obj: Any, name_var: Any, val: Any) -> Any:
        name = name_var.as_python_constant() if name_var.is_python_constant() else ""
        if isinstance(obj, TensorVariable) and name == "requires_grad" and val.is_python_constant():
            obj.call_method(tx, "requires_grad_", [val], {})
            return val
        if name == "data" and isinstance(obj, TensorVariable) and _is_itself(obj, val.realize()):
            return val
        return original(self, tx, obj, name_var, val)

    return call_setattr


def _is_itself(obj: Any, val: Any) -> bool:
    """Whether two variables stand for the same elements of the same storage."""
    if not isinstance(val, TensorVariable):
        return False
    a, b = (v.as_proxy().node.meta["example_value"] for v in (obj, val))
    same = all(getattr(a, name) == getattr(b, name) for name in ("dtype", "shape", "device"))
    in_place = a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    return same and in_place and a.untyped_storage()._cdata == b.untyped_storage()._cdata
