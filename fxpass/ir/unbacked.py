"""Sizes that depend on data: symbols without a value, known only when the step runs.

A node that makes such a symbol makes a new one whenever its fake value is
computed; here it keeps the first. Operators ask about sizes while they are
computed: who asks is remembered for ``_torch/unbacked.py``, which answers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, rebind_unbacked
from torch.utils._pytree import KeyPath, key_get

SIZES = "unbacked_bindings"  # torch's name for the sizes that a node makes from data, in its meta
_local = threading.local()


class Asker(Enum):
    """Who wants to know something about a size."""

    USER = "user"  # or whoever else: nobody may answer
    OPERATOR = "operator"  # an operator in Dynamo's graph, which can be given an assertion
    TRACE = "trace"  # an operator in the ATen graph


@contextlib.contextmanager
def asked_by(who: Asker) -> Iterator[None]:
    """Questions about sizes that depend on data come from ``who`` inside."""
    before, _local.asker = asker(), who
    try:
        yield
    finally:
        _local.asker = before


def asker() -> Asker:
    """Who asks now, on this thread."""
    return getattr(_local, "asker", Asker.USER)


def recompute(node: Node, fake_mode: Any, run: Callable[[], Any]) -> Any:
    """``run()``, which computes the fake value of ``node`` again, in the symbols it had."""
    env = getattr(fake_mode, "shape_env", None)
    with fake_mode or contextlib.nullcontext(), torch.no_grad():
        if env is None:
            return run()
        with env.ignore_fresh_unbacked_symbols(), asked_by(Asker.TRACE):
            value = run()
        keep_sizes(node, env, value)
    return value


def keep_sizes(node: Node, env: ShapeEnv | None, value: Any) -> None:
    """Make the sizes of ``value``, just computed for ``node``, those that it had."""
    made = node.meta.get(SIZES) or {}
    if env is not None and any(_is_new(env, value, symbol, path) for symbol, path in made.items()):
        rebind_unbacked(env, node, value)


def _is_new(env: ShapeEnv, value: Any, symbol: sympy.Symbol, path: KeyPath) -> bool:
    size = key_get(value, path)
    symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return symbolic and size.node.expr != env.replace(symbol)
