"""Optimizers while Dynamo traces: ``step()`` as one opaque node, ``zero_grad()`` without reading.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any, ClassVar

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource
from torch._dynamo.variables import functions, misc, user_defined
from torch._dynamo.variables.constant import ConstantVariable

from ..errors import CaptureError, OptimizerError
from ..ir.marks import MARK, READ
from ..ir.slots import Slot
from .dtensors import is_replaced
from .dynamo_common import (
    VariableTracker,
    call,
    fail,
    is_none,
    no_grad,
    record_of_frame,
    store_grad,
    user_line,
)
from .frame_record import StepEvent, StepParam
from .optimizer import has_own_zero_grad, is_front
from .requires_grad import input_proxy

_PLAIN = (bool, int, float, str, type(None))  # settings that a guard compares by value


def optimizer_step(index: int, params: list[Any], grads: list[Any], dynamic: list[Any]) -> None:
    """The opaque node that stands for ``optimizer.step()`` in Dynamo's graph; never executed."""
    raise AssertionError("an optimizer_step node reached execution")


class _Method(functions.UserMethodVariable):
    """``optimizer.step`` or ``optimizer.zero_grad``, not called yet: libraries ask for its signature."""

    _nonvar_fields: ClassVar[set[str]] = {"method", *functions.UserMethodVariable._nonvar_fields}  # pyrefly: ignore[bad-override]

    def __init__(self, function: Any, owner: Any, method: str, **options: Any) -> None:
        super().__init__(function, owner, **options)
        self.method = method

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        return self.obj.call_method(tx, self.method, list(args), kwargs)


def optimizer_var_getattr(self: Any, tx: Any, name: str) -> Any:
    """For ``OptimizerVariable.var_getattr``: ``step`` and ``zero_grad`` are ours, the rest is read."""
    if is_front(self.value):
        return user_defined.UserDefinedObjectVariable.var_getattr(self, tx, name)
    if name not in ("step", "zero_grad"):
        _refuse_settled()
    if name in ("step", "zero_grad"):
        source = self.source and AttrSource(self.source, name)
        function = getattr(type(self.value), name)
        if isinstance(function, types.FunctionType):
            return _Method(function, self, name, source=source)
        return misc.GetAttrVariable(self, name, source=source)
    return user_defined.UserDefinedObjectVariable.var_getattr(self, tx, name)


def optimizer_call_method(self: Any, tx: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """For ``OptimizerVariable.call_method``: ``step()`` and ``zero_grad()`` as events of the step."""
    if is_front(self.value):
        return user_defined.UserDefinedObjectVariable.call_method(self, tx, name, args, kwargs)
    if name != "zero_grad":
        _refuse_settled()
    if name == "zero_grad":
        return _optimizer_zero_grad(self, tx, *args, **kwargs)
    if name == "step":
        return _optimizer_step(self, tx, *args, **kwargs)
    return user_defined.UserDefinedObjectVariable.call_method(self, tx, name, args, kwargs)


def _refuse_settled() -> None:
    """A scheduler's step, made when the graph has run, would come too late for what reads its rates."""
    if line := record_of_frame().settled:
        hint = "call scheduler.step() last, or outside of the compiled step"
        found = "an optimizer is used after scheduler.step(), inside a block that the graph cannot leave"
        raise fail(CaptureError(found, where=line, hint=hint))


def _params(self: Any, tx: Any) -> Iterator[tuple[Slot, torch.Tensor, Any]]:
    """Slot, parameter and its variable; guards on the structure of ``param_groups``."""
    number = record_of_frame().number_of(self.value)
    groups = AttrSource(self.source, "param_groups")
    install_guard(groups.make_guard(GuardBuilder.SEQUENCE_LENGTH))
    for g, group in enumerate(self.value.param_groups):
        params = DictGetItemSource(GetItemSource(groups, g), "params")
        install_guard(params.make_guard(GuardBuilder.SEQUENCE_LENGTH))
        for p, param in enumerate(group["params"]):
            if torch.nn.parameter.is_lazy(param):
                continue  # no tensor yet: the model makes one of it when it is called
            if is_replaced(param):
                hint = "call fxpass.shard_(model, mesh) first, and make the optimizer of what it leaves"
                found = (
                    f"{type(self.value).__name__} was made before fxpass.shard_ and holds parameters of then"
                )
                raise fail(OptimizerError(found, where=user_line(), hint=hint))
            # realized: side effects are kept by variable, and a lazy one is another object
            variable = VariableTracker.build(tx, param, GetItemSource(params, p)).realize()
            record_of_frame().real[input_proxy(variable).node.name] = param
            yield Slot(number, g, p), param, variable


def _may_have_grad(tx: Any, param: torch.Tensor, variable: Any) -> bool:
    """Whether ``.grad`` is, or in this frame becomes, anything but None."""
    pending = tx.output.side_effects.has_pending_mutation_of_attr(variable, "grad")
    return param.requires_grad or param.grad is not None or pending or variable in record_of_frame().toggled


def _optimizer_zero_grad(self: Any, tx: Any, set_to_none: Any = None) -> Any:
    if has_own_zero_grad(self.value):
        found = f"{type(self.value).__name__} has a zero_grad() of its own, which would not run"
        hint = "write p.grad = None for each parameter, and what else it does, in the step itself"
        raise fail(OptimizerError(found, where=user_line(), hint=hint))
    to_none = set_to_none is None or set_to_none.as_python_constant()
    for _, param, variable in _params(self, tx):
        if to_none:
            if _may_have_grad(tx, param, variable):
                store_grad(tx, variable, ConstantVariable(None))
        elif not is_none(old := variable.var_getattr(tx, "grad")):
            store_grad(tx, variable, call(tx, torch.zeros_like, old))
    return ConstantVariable.create(None)


def _optimizer_step(self: Any, tx: Any, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
    record = record_of_frame()
    name = type(self.value).__name__
    if args or kwargs:
        hint = (
            "set what the step needs in optimizer.param_groups: a number there may change from call to call"
        )
        raise fail(OptimizerError(f"{name}.step() was given arguments", where=user_line(), hint=hint))
    if closure is not None and not is_none(closure):
        hint = "compute the loss and call backward() in the step itself, then optimizer.step()"
        raise fail(OptimizerError(f"{name}.step() was given a closure", where=user_line(), hint=hint))
    if isinstance(self.value, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        hint = "use a first-order optimizer with dense gradients, such as torch.optim.AdamW"
        raise fail(OptimizerError(f"{name} cannot be traced into the step", where=user_line(), hint=hint))
    index, params, nodes, grads = len(record.events), [], [], []
    for slot, param, variable in _params(self, tx):
        grad = variable.var_getattr(tx, "grad") if _may_have_grad(tx, param, variable) else None
        has_grad = grad is not None and not is_none(grad)
        node = input_proxy(variable).node.name
        params.append(StepParam(slot, node, record.reads if has_grad else None))
        if has_grad:
            nodes.append(input_proxy(variable))
            with no_grad(tx):
                grads.append(call(tx, MARK, grad, READ, record.reads).as_proxy())
            record.reads += 1
    counters = record.counters_of(self.value)
    dynamic = _hyperparameters(self, tx, counters)
    record.events.append(
        StepEvent(
            index=index,
            number=record.number_of(self.value),
            optimizer=weakref.ref(self.value),
            params=params,
            dynamic=[d for d, _ in dynamic],
            where=user_line(),
            counters=counters,
        )
    )
    arguments = (index, nodes, grads, [proxy for _, proxy in dynamic])
    tx.output.create_proxy("call_function", optimizer_step, arguments, {})
    return ConstantVariable.create(None)


def _hyperparameters(self: Any, tx: Any, counters: Container[Slot]) -> list[tuple[Slot, Any]]:
    """Guard on the settings of the optimizer but ``lr`` and ``counters``; the symbolic ones, as graph values.

    A float that changed once (a momentum cycled by OneCycleLR) is a symbolic
    float from the second compilation on; ``lr`` is read anew at every call.
    What the step itself has set (``group["lr"] = lr``) reaches the object only
    after the graph has run: that value is used, be it a number.
    """
    groups = AttrSource(self.source, "param_groups")
    number = record_of_frame().number_of(self.value)
    settings: list[tuple[Slot, Any]] = []
    for g, group in enumerate(self.value.param_groups):
        source = GetItemSource(groups, g)
        written = _written_settings(tx, group, source)
        settings += [(Slot(number, g, key=key), value) for key, value in written.items()]
        for key in self.value.defaults:
            # load_state_dict adds defaults of torch's that the groups of a user's own optimizer lack
            if (
                key in written
                or key in ("params", "lr")
                or key not in group
                or Slot(number, g, key=key) in counters
            ):
                continue
            value = group[key]
            if type(value) not in (*_PLAIN, tuple, list):
                continue
            at = DictGetItemSource(source, key)
            items = enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]
            for item, plain in items:
                if type(plain) not in _PLAIN:
                    continue
                item_source = at if item is None else GetItemSource(at, item)
                variable = VariableTracker.build(tx, plain, item_source).realize()
                if not variable.is_python_constant():
                    # a guard, for the optimizer's Python branches on it: "if weight_decay != 0"
                    bool(variable.as_proxy().node.meta["example_value"] != 0)
                    settings.append((Slot(number, g, key=key, item=item), variable.as_proxy()))
    return settings


def _written_settings(tx: Any, group: dict[str, Any], source: Any) -> dict[str, Any]:
    """The settings of ``group`` that the frame has changed so far: graph values or Python numbers."""
    variable = tx.output.side_effects.id_to_variable.get(id(group))
    if variable is None or not tx.output.side_effects.is_modified(variable):
        return {}
    settings = {}
    for key in group.keys() - {"params"}:
        value = variable.call_method(tx, "__getitem__", [ConstantVariable.create(key)], {})
        if value.source == DictGetItemSource(source, key):
            continue
        value = value.realize()
        settings[key] = value.as_python_constant() if value.is_python_constant() else value.as_proxy()
    return settings


def _module_zero_grad(module: Any, set_to_none: bool = True) -> None:
    for p in module.parameters():
        if set_to_none:
            p.grad = None
        elif p.grad is not None:
            p.grad = torch.zeros_like(p.grad)


def module_zero_grad_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``NNModule`` methods: ``model.zero_grad()`` in Python that Dynamo can trace."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.fn is torch.nn.Module.zero_grad:
            inlined = VariableTracker.build(tx, _module_zero_grad)
            return inlined.call_function(tx, [self.obj, *args], kwargs)
        return original(self, tx, args, kwargs)

    return call_function
