"""Was the step captured whole? Says what is missing, where, and what to do."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule

from .. import _torch
from ..errors import CaptureError, OptimizerError
from ..ir.graph import Read
from ..ir.provenance import innermost
from ..ir.shards import Shard
from ..ir.slots import Slot
from . import gradients
from .breaks import Break
from .events import Event


def check_frame(gm: GraphModule, record: Any, last_break: Break | None) -> None:
    """Raise ``CaptureError`` unless the frame is a whole training step or needs no gradients.

    Args:
        gm: Dynamo's graph of the frame.
        record: what the hooks saw (``_torch.FrameRecord``).
        last_break: reason and user line of the last graph break in an enclosing frame.
    """
    broke = Break.of(record, last_break)
    where = broke.where
    _refuse_sparse(gm)
    if record.backwards and not record.reached:
        found = "backward() reached no parameter: nothing in the loss requires grad"
        if broke:
            hint = broke.hint
            found = _found("backward() reaches nothing that the graph has computed", broke, "backward()")
            raise CaptureError(found, where=where, hint=hint)
        hint = "check requires_grad of the model's parameters"
        raise CaptureError(found, where=record.backwards[0], hint=hint)
    if record.backwards and not record.events:
        hint = "call optimizer.step() in the compiled function, with any accumulation loop inside it"
        raise CaptureError(
            _found("gradients leave the graph without an optimizer step", broke, "optimizer.step()"),
            where=where or record.backwards[-1],
            hint=broke.hint if broke else hint,
        )
    for event in record.events:
        with_grad = [p for p in event.params if p.read is not None]
        if not (record.reached or gradients.computes_gradients(gm.graph, event.index)) or not with_grad:
            hint = "compile the whole step: forward, loss.backward() and optimizer.step() in one function"
            raise CaptureError(
                _found("optimizer.step() finds no gradient of the compiled function", broke, "it")
                if broke
                else "optimizer.step() finds no gradient computed in the compiled function",
                where=where or event.where,
                hint=broke.hint if broke else hint,
            )
    if not record.events and (by_hand := gradients.updated_by_hand(gm.graph)):
        hint = "leave the update to an optimizer (torch.optim.SGD, say): p.grad = g, then optimizer.step()"
        found = "a parameter is updated from its gradient by hand, where no step can be skipped"
        raise CaptureError(found, where=innermost(by_hand), hint=hint)
    escaping = _outputs_requiring_grad(gm, record)
    if escaping and not record.backwards:
        hint = (
            "compile the whole step, not the model alone: def step(batch): loss = ...; loss.backward(); "
            "optimizer.step(); for evaluation, call it under torch.no_grad()"
        )
        raise CaptureError(
            _found(
                f"the graph's outputs still need a backward ({', '.join(escaping[:3])})", broke, "backward()"
            ),
            where=where,
            hint=broke.hint if broke else hint,
        )
    if escaping:
        hint = "detach it before it leaves the step"
        found = f"output {escaping[0]} requires grad, but no backward() of the step went through it"
        raise CaptureError(found, where=record.backwards[-1], hint=hint)


def check_all_sharded(
    record: Any, events: Sequence[Event], shards: Mapping[str, Shard], names: Mapping[str, str]
) -> None:
    """Raise unless all ranks learn the same of every gradient of a step that has sharded parameters."""
    if len({(shard.group, shard.ranks) for shard in shards.values()}) > 1:
        hint = "shard them by one mesh, or train each in a step of its own"
        found = "models of one step are sharded over different ranks"
        raise CaptureError(found, where=next(iter(record.backwards), ""), hint=hint)
    for event in events:
        for slot, node in event.params.items():
            if node not in shards and id(slot.read(event.optimizer())) not in record.replicated:
                hint = "give the model that holds it to fxpass.shard_ too, or set data_parallel=mesh"
                found = (
                    f"{slot.name} is not sharded, and others of the step are: each rank would train its own"
                )
                raise CaptureError(found, where=event.where, hint=hint)
    if leaf := next((leaf for leaf in record.escaping if leaf in shards), None):
        hint = "give it to an optimizer of the step, set requires_grad=False, or call model.zero_grad() after"
        name = names.get(leaf, leaf)
        found = f"the gradient of {name}, which is sharded, is left in .grad: no optimizer of the step has it"
        raise CaptureError(found, where=record.backwards[-1], hint=hint)


def still_requires_grad(record: Any, last_break: Break | None) -> CaptureError:
    """The error for a graph whose results or updates AOTAutograd would have to differentiate."""
    broke = last_break or Break()
    found = "the graph's outputs or updates require grad after it"
    if record.backwards:
        hint = "return detached tensors, and update only inside torch.no_grad() or optimizer.step()"
        return CaptureError(found, where=record.backwards[-1], hint=hint)
    hint = "compile the whole step, and let only torch.no_grad() code write to parameters"
    hint = broke.hint if broke else hint
    return CaptureError(_found(found, broke, "backward()"), where=broke.where, hint=hint)


def module_hooks_stay(record: Any) -> Callable[[], None]:
    """A check for every call: the hooks registered for all modules are those of the capture."""
    known = _torch.global_module_hooks()
    where = record.events[0].where if record.events else ""

    def check() -> None:
        if _torch.global_module_hooks() != known:
            found = "a hook for all modules was registered or removed after the step was compiled"
            hint = "call torch.compiler.reset() after it, or register it on the modules themselves"
            raise CaptureError(found, where=where, hint=hint)

    return check


def uncompiled(last_break: Break | None, where: str) -> CaptureError:
    """The error for a backward that is about to run as plain Python inside the compiled function."""
    broke = last_break or Break()
    found = "backward() is about to run uncompiled, without scaling, skip and casts"
    if broke and "disable" not in broke.reason:
        hint = (
            "no graph can be resumed inside a loop, a try or a with block: take what breaks it "
            "out of there, or compile what stands there as a function of its own"
        )
        return CaptureError(f"{found}; {broke.cause}", where=broke.where or where, hint=hint)
    hint = "take the training step out of torch.compiler.disable, or call it outside of the compiled function"
    return CaptureError(found, where=where, hint=hint)


@dataclass
class Compilations:
    """Which codes were compiled as training steps, and how often for the same optimizers."""

    done: list[tuple[CodeType, tuple[weakref.ref[torch.optim.Optimizer], ...]]] = field(default_factory=list)

    def note(self, record: Any) -> None:
        """Count one more compilation."""
        if record.events:
            self.done.append((record.code, tuple(event.optimizer for event in record.events)))

    def refuse(self, record: Any) -> None:
        """Refuse one more compilation than torch's limit allows.

        Raises:
            CaptureError: the code was compiled for these optimizers as often as that.
        """
        optimizers = tuple(event.optimizer for event in record.events)
        self.done = [d for d in self.done if all(o() is not None for o in d[1])]
        live = [o() for o in optimizers]
        same = [1 for code, known in self.done if code is record.code and _same([o() for o in known], live)]
        if record.events and len(same) >= record.limit:
            hint = (
                "make it a tensor or let it change outside of the step; if the step needs so many graphs, "
                "raise torch._dynamo.config.recompile_limit"
            )
            found = f"the step was compiled {record.limit} times and has to be compiled again"
            if (changed := record.changed) is not None:
                found += f": not {changed.guard} ({changed.text})"
            where = changed.where if changed is not None else ""
            raise CaptureError(found, where=where or record.events[0].where, hint=hint)


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def check_reads(events: Sequence[Event], reads: Sequence[Read]) -> None:
    """Raise ``OptimizerError`` if no optimizer makes anything of a gradient: no verdict is about it."""
    if events and not reads:
        found = f"{type(events[0].optimizer()).__name__}.step() reads no gradient"
        hint = "call an optimizer that reads none outside of the compiled function"
        raise OptimizerError(found, where=events[0].where, hint=hint)


def computes(gm: GraphModule) -> bool:
    """Whether there is anything to compile: what follows a print() after the step is often a read alone."""
    reads = ("detach", "item", torch.scalar_tensor)  # the last is how Dynamo hands a number back
    return any(n.op.startswith("call") and n.target not in reads for n in gm.graph.nodes)


def _found(what: str, broke: Break, before: str) -> str:
    """The cause first, if the graph broke; else where the compiled function ends."""
    if not broke:
        return f"{what}; the compiled function ends before {before}"
    return f"the graph broke before {before}: {broke.cause}; {what}"


def _outputs_requiring_grad(gm: GraphModule, record: Any) -> list[str]:
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    return [
        n.name
        for n in output.all_input_nodes
        if n.op != "placeholder"
        and getattr(n.meta.get("example_value"), "requires_grad", False)
        and n.name not in record.consumed
    ]


def _refuse_sparse(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        sparse = node.kwargs.get("sparse", False)
        if node.target is torch.nn.functional.embedding and len(node.args) > 6:
            sparse = sparse or node.args[6]
        if sparse is True:
            hint = "build the embedding with sparse=False"
            found = "an embedding with sparse=True makes sparse gradients"
            raise CaptureError(found, where=innermost(node), hint=hint)


def device_of(optimizers: Sequence[torch.optim.Optimizer], inputs: Sequence[Any]) -> torch.device:
    """The one device of the step's parameters."""
    devices = {p.device for o in optimizers for g in o.param_groups for p in g["params"]}
    if len(devices) > 1:
        hint = "keep the parameters of one compiled step on one device"
        raise CaptureError(f"parameters on several devices: {sorted(map(str, devices))}", hint=hint)
    if devices:
        return devices.pop()
    return next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))


def input_names(gm: GraphModule, record: _torch.FrameRecord) -> dict[str, str]:
    """The user's name of each of Dynamo's inputs, in order.

    A parameter is called as ``named_parameters()`` of the outermost module that
    holds it calls it, behind that module's own name if another has one of the
    same name; anything else as the expression that reaches it.
    """
    known: dict[int, tuple[str, str]] = {}  # by parameter: its name in the module, and with the module's own
    for module_name, module in record.modules:
        for name, param in module.named_parameters():
            known.setdefault(id(param), (name, f"{module_name}.{name}"))
    short = Counter(name for name, _ in known.values())
    names = {n.name: _torch.source_name(n) for n in gm.graph.nodes if n.op == "placeholder"}
    for node, param in record.real.items():
        if id(param) in known:
            name, full = known[id(param)]
            names[node] = name if short[name] == 1 else full  # two models of one step
    return names


def unreached(events: Sequence[Event]) -> dict[str, str]:
    """Trainable parameters of the optimizers that are not updated, and why."""
    reasons = {}
    for event in events:
        for slot in event.without:
            frozen = not slot.read(event.optimizer()).requires_grad
            reasons[slot.name] = "requires_grad is False" if frozen else "the loss does not depend on it"
    return reasons


def escaping(record: _torch.FrameRecord, names: Mapping[str, str], kept: Sequence[Slot]) -> dict[str, str]:
    """Leaves whose gradient outlives the step, and why; ``kept``: those of them that an optimizer has."""
    reason = "left in .grad: grads='keep', and no zero_grad() after its update"
    reasons = {slot.name: reason for slot in kept}
    reason = "left in .grad: no optimizer of the step updates it"
    return reasons | {names.get(leaf, leaf): reason for leaf in record.escaping}
