"""What is alive when, in the step graph as it is written.

A storage is what one allocation holds: a value, the views of it, and what is
written into it in place. It lives from the node that makes it to the last node
that reads any of its names, as the Python code of the graph frees it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ..ir.alias import view_of
from ..ir.dtypes import in_profile
from ..ir.graph import Phase, Role, StepGraph, phase
from ..ir.sizes import numel, storage_bytes

SCALER = "scaler"  # the loss scale, learning rates and what belongs to them
ROLES = {
    Role.PARAMETER: "parameter",
    Role.STATE: "optimizer state",
    Role.INPUT: "input",
    Role.LR: SCALER,
    Role.SCALER: SCALER,
}
LATE = (Phase.CHECK, Phase.UPDATE, Phase.GRADIENT, Phase.OUTPUT)


@dataclass(frozen=True)
class Storage:
    """One allocation."""

    name: str  # the node that makes it; with [i] if it is output i of several
    members: tuple[str, ...]  # the nodes whose values lie in it
    role: str
    phase: str
    dtype: torch.dtype
    shape: tuple[Any, ...]  # of the value it was made for
    size: sympy.Expr  # bytes
    birth: int  # index of the node that makes it; inputs: -1
    death: int  # index of the last node that reads it; inputs and outputs: len(nodes)
    external: bool  # the caller's: an input


@dataclass(frozen=True)
class Liveness:
    """The storages of a graph whose nodes run in the order of ``nodes``."""

    nodes: tuple[str, ...]
    phases: tuple[str, ...]
    storages: tuple[Storage, ...]


Value = int | tuple["Value", ...] | None  # where a value lies: indices of storages


@dataclass
class _Open:
    """A storage whose death is not known yet."""

    node: Node
    name: str
    tensor: Tensor
    birth: int
    members: list[Node]
    death: int
    users: list[Node]


def liveness(step: StepGraph) -> Liveness:
    """The storages of ``step`` and when each lives; linear in the size of the graph."""
    nodes = [n for n in step.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    index = {n: i for i, n in enumerate(nodes)}
    opened: list[_Open] = []
    values: dict[Node, Value] = {}
    for node in step.graph.nodes:
        if node.op == "output":
            for number in (s for n in node.all_input_nodes for s in _numbers(values.get(n))):
                opened[number].death = len(nodes)
                opened[number].users.append(node)
            continue
        for number in {s for n in node.all_input_nodes for s in _numbers(values.get(n))}:
            opened[number].death = max(opened[number].death, index[node])
            opened[number].users.append(node)
        values[node] = _value(node, values, opened, index.get(node, -1), len(nodes))
        for number in set(_numbers(values[node])):
            opened[number].members.append(node)
            opened[number].death = max(opened[number].death, index.get(node, len(nodes)))
    roles = _Roles(step)
    storages = tuple(
        Storage(
            name=s.name,
            members=tuple(n.name for n in s.members),
            role=roles.of(s),
            phase=phase(s.node).value,
            dtype=s.tensor.dtype,
            shape=tuple(s.tensor.shape),
            size=storage_bytes(s.tensor),
            birth=s.birth,
            death=s.death,
            external=s.node.op != "call_function",
        )
        for s in opened
    )
    return Liveness(tuple(n.name for n in nodes), tuple(phase(n).value for n in nodes), storages)


def _numbers(value: Value) -> Iterator[int]:
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    elif value is not None:
        yield value


def _value(node: Node, values: Mapping[Node, Value], opened: list[_Open], birth: int, end: int) -> Value:
    """Where the value of ``node`` lies: in storages of its inputs, or in new ones."""
    if node.target is operator.getitem:
        source = values[node.args[0]]  # pyrefly: ignore[bad-index]
        position = node.args[1]
        if isinstance(source, tuple) and isinstance(position, int):
            return source[position]
        return source
    shared = view_of(node)
    if shared is not None:
        result = node.meta.get("val")
        number = values.get(shared)
        if isinstance(number, int) and isinstance(result, (list, tuple)):
            return (number,) * len(result)  # split, unbind: all parts lie in one storage
        return number

    def new(value: object, name: str) -> Value:
        if isinstance(value, (list, tuple)):
            return tuple(new(v, f"{name}[{i}]") for i, v in enumerate(value))
        if not isinstance(value, Tensor):
            return None
        death = birth if birth >= 0 else end
        opened.append(
            _Open(node=node, name=name, tensor=value, birth=birth, members=[], death=death, users=[])
        )
        return len(opened) - 1

    return new(node.meta.get("val"), node.name)


class _Roles:
    """Names what a storage is for."""

    def __init__(self, step: StepGraph) -> None:
        self.step = step
        self.casts = weight_casts(step)

    def of(self, storage: _Open) -> str:
        node = storage.node
        if node.op != "call_function":
            return ROLES[self.step.roles[node]] if node in self.step.roles else "input"
        if any(user.op == "output" for user in storage.users):
            return "output"
        late = {phase(user) for user in storage.users}
        if phase(node) in (Phase.BACKWARD, Phase.GRADIENT) and late & set(LATE) and storage.tensor.ndim:
            return f"{in_profile(storage.tensor.dtype)} gradient"
        if node in self.casts:
            return "cast weight"
        if phase(node) is Phase.FORWARD and late & {Phase.BACKWARD, *LATE}:
            return "saved activation"
        return "temporary"


def weight_casts(step: StepGraph) -> set[Node]:
    """Nodes that are one parameter in another dtype or layout, wherever they are computed."""
    weights = {n: numel(n.meta["val"]) for n, role in step.roles.items() if role is Role.PARAMETER}
    casts: set[Node] = set()
    for node in step.nodes():
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or phase(node) not in (Phase.FORWARD, Phase.BACKWARD):
            continue
        large = [n for n in node.all_input_nodes if _ndim(n) != 0]
        if len(large) == 1 and large[0] in weights and numel(value) == weights[large[0]]:
            weights[node] = weights[large[0]]
            casts.add(node)
    return casts


def _ndim(node: Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else -1
