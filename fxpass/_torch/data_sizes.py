"""Questions about sizes that depend on data, asked while a frame of ours is traced.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Is
there an element at all, do two sizes agree? Nobody knows until the step runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import sympy
from torch._dynamo import utils as dynamo_utils
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from ..ir.unbacked import Asker, asked_by, asker


@contextlib.contextmanager
def no_pending(fake_mode: Any) -> Iterator[None]:
    """Symbols made inside need not be in any result: those of gradients on the way to a leaf's."""
    with fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        yield


def operator_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For Dynamo's ``run_node``: who asks about a size there is an operator."""

    def run_node(*args: Any, **kwargs: Any) -> Any:
        with asked_by(Asker.OPERATOR):
            return original(*args, **kwargs)

    return run_node


def answer_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``ShapeEnv.evaluate_expr``: what an operator may take for granted of a size that depends on data.

    Whether it is 0 or 1 asks for a special case that the general one covers, as
    torch's own size-oblivious tests assume. Two sizes that are compared have to
    agree: that is checked when the step runs. Anything else breaks the graph.
    """

    def evaluate_expr(self: ShapeEnv, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, orig_expr, *args, **kwargs)
        except GuardOnDataDependentSymNode as error:
            who = asker()
            sides = orig_expr.args if isinstance(orig_expr, (sympy.Eq, sympy.Ne)) else ()
            if who is Asker.USER or len(sides) != 2 or not all(side.is_integer for side in sides):
                raise
            if any(side in (0, 1) for side in sides):
                return sympy.false if isinstance(orig_expr, sympy.Eq) else sympy.true
            if who is Asker.TRACE:
                raise
            if not self.guard_or_defer_runtime_assert(sympy.Eq(*sides), "two sizes of one operator differ"):
                raise error
            return sympy.true if isinstance(orig_expr, sympy.Eq) else sympy.false

    return evaluate_expr


HOOKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (dynamo_utils, "run_node", operator_hook),
    (ShapeEnv, "evaluate_expr", answer_hook),
]
