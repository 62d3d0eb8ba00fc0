"""Let what is not linear in the gradient, inside backward, see unscaled gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.homogeneous import (
    ADDED,
    DIVISORS,
    Growth,
    gradients,
    growth_of,
    is_product,
    is_zero,
    operands,
)
from ..analysis.policy import op_name
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase, source
from ..ir.marks import GRAD, MARK, SEED
from ..ir.provenance import user_line
from .graph_pass import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class UnscaleNonlinear(GraphPass):
    """Unscale gradients, in float32, before operations of backward that are not linear in them.

    A backward of the user's (a custom Function, a hook on an activation) may
    clamp, normalise or compare gradients, or add to them. It is meant for
    gradients without the loss scale. Each value that descends from the seed has
    a degree: 1 if it grows with the scale, 0 if it does not. Operators that are
    homogeneous pass it on; before any other the operands are divided by the
    scale. A value of degree 0 is multiplied by it where a product reads it, where
    it meets one of degree 1, or where it leaves backward.

    An overflow that such an operation would hide (a clamped inf) is put back:
    the multiplication then gives nan, and the step is skipped.

    Before: ``clamp(g, -1, 1)``. After: ``clamp(g.float() * (1 / scale), -1, 1) * scale``.
    """

    name: ClassVar[str] = "unscale_nonlinear"

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.trains or "scale" not in step.scaler:
            edit.decline("no optimizer step or no loss scale")
            return
        _Degrees(step, edit).run()


class _Degrees:
    def __init__(self, step: StepGraph, edit: Editor) -> None:
        self.step, self.edit = step, edit
        self.degree: dict[Node, int] = {}  # of what descends from a seed
        self.hidden: dict[Node, frozenset[Node]] = {}  # values whose infinities a value of degree 0 hides
        self.memo: dict[tuple[str, Node], Node] = {}
        self.where: dict[str, None] = {}  # user lines, in order
        self.user: Node | None = None  # the node that is being looked at

    def run(self) -> None:
        for node in list(self.step.graph.nodes):
            self.user = node
            if node.target is MARK and node.args[1] == SEED:
                self.degree[node] = 1
            elif node.target is MARK and node.args[1] == GRAD:
                self._leave(source(node))
            elif node.op == "call_function" and phase(node) is Phase.BACKWARD:
                self._visit(node)
        for where in self.where:
            warnings.warn(
                f"fxpass: {where} is not linear in the gradient that backward gives it: "
                "it works on gradients without the loss scale, in float32",
                stacklevel=2,
            )

    def _leave(self, grad: Node) -> None:
        """A gradient leaves backward with the scale, also one that does not descend from the seed."""
        if self.degree.get(grad, 0) == 0 and not is_zero(grad):
            self._scale(grad)

    def _visit(self, node: Node) -> None:
        read = [n for n in operands(node) if n in self.degree]
        growth = growth_of(node) if read else Growth.SHAPE
        if growth is Growth.SHAPE:
            return
        hidden = self._hidden(read)
        if all(self.degree[n] == 0 for n in read):
            if not is_product(node):
                self._note(node, 0, hidden)
                return
            read = [self._scale(n) if _floats(n) else n for n in read]
        result = self._result(node, growth, read)
        if result != 1 and op_name(node.target) != "nan_to_num":  # which the user wrote to hide them
            hidden |= frozenset(n for n in read if self.degree[n] == 1)
        if result is None:
            self._unscale_operands(node, read)
        elif growth is Growth.FREE:
            self._tell(node)
        self._note(node, result or 0, hidden)

    def _result(self, node: Node, growth: Growth, read: list[Node]) -> int | None:
        """The degree of the result; None if the operands have to be unscaled."""
        if growth in (Growth.JOINT, Growth.FREE):
            for operand in operands(node):
                if _floats(operand) and self.degree.get(operand, 0) == 0 and not is_zero(operand):
                    self._scale(operand)
            return int(growth is Growth.JOINT)
        if growth is Growth.GRADS:
            linear = gradients(node)
            if any(self.degree[n] == 1 and n not in linear for n in read):
                return None
            for operand in linear:
                if self.degree.get(operand, 0) == 0 and not is_zero(operand):
                    self._scale(operand)
            return 1
        if growth is Growth.OTHER:
            return None
        return self._of_product(node, growth)

    def _of_product(self, node: Node, growth: Growth) -> int | None:
        name = op_name(node.target)
        divisors = (1,) if growth is Growth.QUOTIENT else DIVISORS.get(name, ())
        added = ADDED.get(name, ())
        if name == "lerp":  # start + weight * (end - start)
            return None
        total = 0
        for position, operand in enumerate(node.args):
            if position not in added:
                sign = -1 if position in divisors else 1
                parts = operand if isinstance(operand, (list, tuple)) else [operand]
                total += sign * sum(self.degree.get(n, 0) for n in parts if isinstance(n, Node))
        if total not in (0, 1):
            return None
        for position in added:
            operand = node.args[position]
            if not isinstance(operand, Node) or is_zero(operand):
                continue
            if self.degree.get(operand, 0) > total:
                return None
            if self.degree.get(operand, 0) < total:
                self._scale(operand)
        return total

    def _note(self, node: Node, degree: int, hidden: frozenset[Node]) -> None:
        self.degree[node] = degree
        if not _floats(node):
            self.degree[node] = 0
        if self.degree[node] == 0:
            self.hidden[node] = hidden
        elif hidden and op_name(node.target) in ("where", "masked_fill"):
            self._poison(node, hidden)

    def _hidden(self, nodes: Iterable[Node]) -> frozenset[Node]:
        return frozenset().union(*(self.hidden.get(n, frozenset()) for n in nodes))

    # ------------------------------------------------------------ rewriting

    def _call(self, target: object, *args: object, why: str) -> Node:
        return self.edit.call(target, *args, when=Phase.BACKWARD, reason=why)  # pyrefly: ignore[bad-argument-type]

    def _wide(self, value: Node, why: str) -> Node:
        """``value`` in float32, spelled out: it may be of low precision once casts have been inserted."""
        dtype = torch.promote_types(value.meta["val"].dtype, torch.float32)
        return self.edit.call(aten._to_copy.default, value, dtype=dtype, when=Phase.BACKWARD, reason=why)

    def _inverse(self) -> Node:
        scale = self.step.scaler["scale"]
        if ("inverse", scale) not in self.memo:
            with self.edit.after(scale):
                made = self._call(aten.reciprocal.default, scale, why="one factor for all gradients")
            self.memo["inverse", scale] = made
        return self.memo["inverse", scale]

    def _unscale_operands(self, node: Node, read: list[Node]) -> None:
        why = f"{op_name(node.target)} is not linear in the gradient"
        for value in read:
            if self.degree[value] == 1:
                if ("unscaled", value) not in self.memo:
                    with self.edit.before(node):
                        wide = self._wide(value, why)
                        self.memo["unscaled", value] = self._call(
                            aten.mul.Tensor, wide, self._inverse(), why=why
                        )
                self.edit.read_instead(node, value, self.memo["unscaled", value])
        self.edit.refresh(node)
        self._tell(node)

    def _tell(self, node: Node) -> None:
        self.where[f"{op_name(node.target)} at {user_line(node) or 'an unknown line'}"] = None

    def _scale(self, value: Node) -> Node:
        """Make the node being looked at read ``value`` times the scale, or nan if an overflow is hidden."""
        assert self.user is not None, "there is a node that reads the value"
        if ("scaled", value) not in self.memo:
            why = "a gradient again, with the loss scale"
            with self.edit.before(self.user):
                factor = self._poisoned(self.step.scaler["scale"], self.hidden.get(value, frozenset()), why)
                scaled = self._call(aten.mul.Tensor, self._wide(value, why), factor, why=why)
                dtype = value.meta["val"].dtype
                new = self.edit.cast(scaled, dtype, when=Phase.BACKWARD, reason=why)
            self.memo["scaled", value] = new
            self.degree[new] = 1
        self.edit.read_instead(self.user, value, self.memo["scaled", value])
        return self.memo["scaled", value]

    def _poison(self, node: Node, hidden: frozenset[Node]) -> None:
        """Make ``node`` nan if one of the values that its condition compared is not finite."""
        why = "an overflow that a comparison hides"
        with self.edit.after(node):
            one = self.edit.call(
                aten.full.default,
                [],
                1.0,
                dtype=torch.float32,
                device=node.meta["val"].device,
                when=Phase.BACKWARD,
                reason=why,
            )
            new = self._call(aten.mul.Tensor, node, self._poisoned(one, hidden, why), why=why)
        made = set(self.edit.inserted)
        self.edit.replace_uses(node, new, keep=lambda user: user in made)
        self.degree[new] = 1

    def _poisoned(self, factor: Node, hidden: frozenset[Node], why: str) -> Node:
        """``factor``, or nan if a value in ``hidden`` is not finite."""
        order = {n: i for i, n in enumerate(self.step.graph.nodes)}
        for value in sorted(hidden, key=order.__getitem__):
            if ("probe", value) not in self.memo:
                total = self._call(aten.sum.default, self._wide(value, why), why=why)
                self.memo["probe", value] = self._call(aten.mul.Tensor, total, 0.0, why=why)
            factor = self._call(aten.add.Tensor, factor, self.memo["probe", value], why=why)
        return factor


def _floats(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)
