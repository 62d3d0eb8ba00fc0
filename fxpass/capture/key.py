"""A captured step as text: what decides the program that is made of it, for the cache on disk.

Two steps of equal text, options and versions compile to the same program, so a second process
needs neither trace nor passes nor Inductor. The text holds all that capture knows; what it
cannot put into words (a function of the user's in the graph, a size that is a symbol) makes
the step one that is compiled anew in each process.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import hashlib
import inspect
import marshal
import math
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node
from torch.optim import Optimizer

from .. import _torch
from ..ir.marks import TEXT
from ..ir.slots import Slot
from .events import Event
from .step import Captured

_NAMESPACES = frozenset(("aten", "prim", "prims", "fxpass"))
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
# what the tracer notes for itself, and the values that the inputs' determine
_NO_MATTER = frozenset(
    "example_value val grapharg tensor_dict source_fn_stack creation_timestamp seq_nr from_node".split()
)


class Unspeakable(Exception):
    """A step that the cache cannot hold; the message says why."""


def text_of(captured: Captured, names: Mapping[str, str]) -> str:
    """The text of a step; ``names`` are the user's, by Dynamo input.

    Raises:
        Unspeakable: it has none.
    """
    if _torch.has_modes():
        raise Unspeakable("a mode that torch functions go through is active")
    lines = [_say(names), *_graph(captured), *map(_event, captured.events)]
    rest = (captured.gradients, captured.writes, captured.kept, captured.outputs, captured.handed_over)
    lines += [_say(rest), _say((sorted(captured.numbers), sorted(captured.in_place), captured.data))]
    lines += [_say([*captured.scaler]), _say([*captured.slots])]
    return "\n".join((*lines, _machine()))


@functools.cache
def code_hash() -> str:
    """Of fxpass itself: every pass is part of what decides a program."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _machine() -> str:
    """What the process and the machine decide, beyond Inductor's own settings, which torch adds."""
    facts = (
        code_hash(),
        sys.version,
        torch.__version__,
        torch.version.git_version,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cpu.get_cpu_capability(),
        torch.backends.mkldnn.is_available(),
        _torch.cpu_has_half_gemm(),
    )
    return _say(facts)


# ---------------------------------------------------------------- the graph


def _graph(captured: Captured) -> Iterator[str]:
    storages: dict[int, int] = {}
    for node in captured.gm.graph.nodes:
        value = node.meta.get("example_value")
        shape = _input(value, storages) if node.op == "placeholder" else ""
        target = "" if node.op == "output" else _target(node)
        facts = {key: fact for key, fact in sorted(node.meta.items()) if key not in _NO_MATTER}
        if stack := facts.pop("nn_module_stack", None):
            # their names decide, by option keep_fp32; their classes' do not: __main__ in a script of its own
            facts["modules"] = [path for path, _ in stack.values()]
        yield f"{node.name} {node.op} {target} {_say(node.args)} {_say(node.kwargs)} {shape} {_say(facts)}"


def _input(value: Any, storages: dict[int, int]) -> str:
    """An input's shape, and which of the others share its storage."""
    if value is None:  # one of ours: shapes by captured.slots and the scaler's settings
        return ""
    if not isinstance(value, Tensor):
        raise Unspeakable(f"an input is a {type(value).__name__}, which may change")
    number = storages.setdefault(_torch.storage_id(value), len(storages))
    return f"{_say(value)} {number}"


def _target(node: Node) -> str:
    target: Any = node.target
    if node.op in ("placeholder", "call_method"):
        return str(target)
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        name = str(target)
        if name.split(".")[0].split("::")[0] not in _NAMESPACES:
            raise Unspeakable(f"operator {name} may be another one in the next process")
        return name
    if node.op != "call_function":
        raise Unspeakable(f"{node.op} of {target}")
    if (text := getattr(target, TEXT, None)) is not None:
        return str(text)
    return _function(target)


def _function(target: Any) -> str:
    """The name of a function of Python's or torch's that leads to it."""
    name, module = getattr(target, "__name__", ""), sys.modules.get(getattr(target, "__module__", "") or "")
    owner = getattr(target, "__self__", None)
    for holder in (operator, math, builtins, torch, torch.Tensor, module, owner):
        if name and getattr(holder, name, None) is target and _is_known(holder):
            return f"{getattr(holder, '__name__', '')}.{name}"
    raise Unspeakable(f"{target} is called in the graph")


def _is_known(holder: Any) -> bool:
    name = getattr(holder, "__module__", None) if isinstance(holder, type) else None
    top = (name or getattr(holder, "__name__", "")).split(".")[0]
    return top in ("torch", "_operator", "operator", "math", "builtins")


def _class(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


# ---------------------------------------------------------------- optimizers


def _event(event: Event) -> str:
    optimizer = event.optimizer()
    kind = type(optimizer)
    if (
        not kind.__module__.startswith("torch.optim.")
        or getattr(torch.optim, kind.__name__, None) is not kind
    ):
        raise Unspeakable(f"{kind.__qualname__} is no optimizer of torch's: its code may change")
    groups = [_settings(group) for group in optimizer.param_groups]
    attributes = {k: v for k, v in vars(optimizer).items() if isinstance(v, _PLAIN) and k[0] != "_"}
    numbers = [
        (slot, key, value)
        for slot in event.params
        for key, value in optimizer.state.get(slot.read(optimizer), {}).items()
        if not isinstance(value, Tensor)
    ]
    parts = (
        (event.index, event.number, event.params, event.reads, event.without, event.lr, event.dynamic),
        (event.where, event.backwards, event.state, event.settings, event.counters),
        (event.habits.first, event.habits.alone, kind.__name__, groups, attributes, numbers),
        [type(slot.read(optimizer)).__name__ for slot in event.lr],
    )
    return f"{_say(parts)} {_code(kind)}"


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the trace reads of a param group; the learning rate is an input of the graph."""
    return {k: v for k, v in sorted(group.items()) if k not in ("params", "lr", "initial_lr")}


@functools.cache
def _code(kind: type[Optimizer]) -> str:
    """Of the functions that update, as they are in this process: somebody may have replaced one."""
    module = sys.modules[kind.__module__]
    functions: Iterable[Any] = [*vars(module).values(), *(v for c in kind.__mro__ for v in vars(c).values())]
    codes = [inspect.unwrap(f).__code__ for f in functions if inspect.isfunction(f)]
    return hashlib.sha256(b"".join(map(_bytes, codes))).hexdigest()


def _bytes(code: CodeType) -> bytes:
    return marshal.dumps(code)


# ---------------------------------------------------------------- values


def _say(value: Any) -> str:
    """``value`` in words that only an equal one has.

    Raises:
        Unspeakable: of a kind that has none.
    """
    if isinstance(value, Node):
        return f"%{value.name}"
    if type(value) in _PLAIN or isinstance(value, _NAMED):
        return repr(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise Unspeakable("a size or number of the step is a symbol")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_say(k)}: {_say(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice{_say((value.start, value.stop, value.step))}"
    if isinstance(value, Sequence):
        return f"{type(value).__name__}({', '.join(map(_say, value))})"
    if isinstance(value, Slot) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        fields = dataclasses.fields(value)
        return f"{type(value).__name__}({', '.join(_say(getattr(value, f.name)) for f in fields)})"
    raise Unspeakable(f"the step holds a {_class(type(value))}")


def _tensor(value: Tensor) -> str:
    if type(value) not in (Tensor, torch.nn.Parameter) and not _torch.is_fake(value):
        raise Unspeakable(f"the step holds a {_class(type(value))}")
    if value.layout is not torch.strided:
        raise Unspeakable(f"a tensor of layout {value.layout}")
    kind = "parameter" if isinstance(value, torch.nn.Parameter) else "tensor"
    where = (value.device, value.dtype, tuple(value.shape), tuple(value.stride()), value.storage_offset())
    return f"{kind}{_say((*where, value.requires_grad))}"
