"""``requires_grad_()`` on parameters in the step: a GAN freezes its critic for the generator's half.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo
breaks the graph there. Here a frozen parameter is read through ``detach()``,
which is what it is to autograd, and the flag is set on the object when the graph has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo.utils import set_example_value
from torch._dynamo.variables.base import AttributeMutationExisting
from torch._dynamo.variables.constant import ConstantVariable

from .dynamo_common import record_of_frame


def input_proxy(variable: Any) -> Any:
    """The graph input that a parameter is, be it frozen just now."""
    return record_of_frame().toggled.get(variable, variable.as_proxy())


def toggle_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def method_requires_grad_(self: Any, tx: Any, requires_grad: Any = True) -> Any:
        wanted = requires_grad if isinstance(requires_grad, bool) else requires_grad.as_python_constant()
        given = input_proxy(self)
        fake = given.node.meta["example_value"]
        # what was computed from it before saw the flag as it was at the start
        used = wanted and not fake.requires_grad and bool(given.node.users)
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
