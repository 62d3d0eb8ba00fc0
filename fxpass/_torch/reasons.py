"""Why Dynamo compiles a frame again, in the user's terms: which value changed, from what to what.

Written for torch 2.11 to 2.13. Dynamo says which guard of the graph used last does not hold
(``0/1: L['x'].size()[0] == 8``); what the value is now is read from the frame.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..ir.provenance import frames_in
from .dynamo_common import is_users
from .frame_record import Change

_TENSOR = re.compile(
    r"tensor '(?P<name>.+?)' (?P<what>[\w ]+?) mismatch(?: at index (?P<index>\d+))?\. "
    r"expected (?P<was>.+?)(?:, actual (?P<now>.+?))?(?:\. Guard failed.*)?$"
)
_OBJECT = re.compile(r"___check_obj_id\((?P<name>.+), \d+\)")
_TYPE = re.compile(r"___check_type_id\((?P<name>.+), \d+\), type=<class '(?P<was>[^']+)'>")
_FREED = re.compile(r"Cache line invalidated because (?P<name>.+) got deallocated")
_GLOBAL = re.compile(r"GLOBAL_STATE changed: (?P<names>.+)")
_BOUNDS = {ast.LtE: ("at most", "at least"), ast.GtE: ("at least", "at most")}
_CELL = re.compile(r"(?P<function>[\w.\[\]']+)\.__closure__\[(?P<number>\d+)\]\.cell_contents")
_LONG = 40  # characters of a value


def change_of(reason: str, locals_: Mapping[str, Any], globals_: Mapping[str, Any]) -> Change:
    """What ``reason``, as Dynamo gives it, says about a frame with these variables."""
    first = re.sub(r"^[\d/ -]+:\s*", "", reason.splitlines()[0]) if reason else ""
    guard = re.sub(r"\s+# .*", "", first).strip()
    frame = _Frame({**vars(builtins), "G": globals_, "L": locals_, **locals_})
    try:
        text = _in_words(guard, frame)
    except Exception:  # a way to write guards that is new: Dynamo's words will do
        text = ""
    frames = frames_in(reason)
    own = [f for f in frames if is_users(f.path)] or frames
    where = f"{own[-1].path}:{own[-1].line} in {own[-1].function}" if own else ""
    return Change(guard, text or f"not {guard}", where)


class _Frame:
    """What Dynamo's expressions stand for in a frame, now and in the user's words."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope

    def value(self, expression: str) -> Any:
        """No code of the user's runs: what Dynamo guards on, it has just read itself."""
        return eval(expression, self.scope)

    def read(self, expression: str) -> str:
        """The value, in so many characters."""
        value = self.value(expression)
        if isinstance(value, torch.Tensor):
            return f"a tensor of {'x'.join(map(str, value.shape)) or 'one element'}"
        text = " ".join(repr(value).split())
        return text if len(text) <= _LONG else f"{text[:_LONG]}..."

    def plain(self, expression: str) -> str:
        """As a user writes it: ``model.layers.0.weight``, ``x.shape[0]``, a closure's variable by name."""
        text = _CELL.sub(self._variable, expression)
        text = re.sub(r"\b[GL]\['(\w+)'\]", r"\1", text)
        text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", text)
        return re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", text)

    def _variable(self, match: re.Match[str]) -> str:
        return str(self.value(f"{match['function']}.__code__.co_freevars[{match['number']}]"))


def _in_words(guard: str, frame: _Frame) -> str:
    if match := _TENSOR.match(guard):
        return _of_tensor(match, frame)
    if match := _OBJECT.match(guard):
        name = match["name"]
        kind = type(frame.value(name)).__name__
        plain = kind in ("bool", "NoneType", "str", "int", "float")
        return f"{frame.plain(name)} is {frame.read(name) if plain else 'another ' + kind} now"
    if match := _TYPE.match(guard):
        kind = type(frame.value(match["name"])).__qualname__
        return f"the type of {frame.plain(match['name'])} was {match['was']}, is {kind}"
    if match := _FREED.match(guard):
        return f"{frame.plain(match['name'])} is another object now: the one before was freed"
    if match := _GLOBAL.match(guard):
        return f"a setting of torch changed: {', '.join(match['names'].split())}"
    if guard.startswith("BACKEND_MATCH"):
        return "the first call through this backend"
    if guard.startswith("Duplicate tensor"):
        return "two inputs are the same tensor now"
    return _of_expression(ast.parse(guard, mode="eval").body, frame)


def _of_tensor(match: re.Match[str], frame: _Frame) -> str:
    name, what, was, now = frame.plain(match["name"]), match["what"], match["was"], match["now"]
    if what == "size":
        return f"{name}.shape[{match['index']}] was {was}, is {now}"
    if what == "stride":
        return f"{name}.stride({match['index']}) was {was}, is {now}"
    if what == "rank":
        return f"{name}.ndim was {was}, is {now}"
    if what == "dtype":
        return f"{name}.dtype was {_dtype(was)}, is {_dtype(now)}"
    if what == "requires_grad":
        before = was.endswith("1")
        return f"{name}.requires_grad was {before}, is {not before}"
    if what == "dispatch key set" and ("Autograd" in was) != ("Autograd" in now):
        before = "Autograd" not in was
        return f"{name}.is_inference() was {before}, is {not before}"
    return f"the {what} of {name} was {was}, is {now}" if now else ""


def _of_expression(guard: ast.expr, frame: _Frame) -> str:
    """In words, for a comparison of something with a value, and for what is none or empty."""
    if isinstance(guard, ast.UnaryOp) and isinstance(guard.op, ast.Not):
        inner = ast.unparse(guard.operand)
        return f"{frame.plain(inner)} was empty or false, is {frame.read(inner)}"
    if parts := _parts(guard):  # which of them does not hold?
        failed = (part for part in parts if not frame.value(ast.unparse(part)))
        return _of_expression(next(failed), frame)
    if not isinstance(guard, ast.Compare):
        return ""
    left, op, right = guard.left, guard.ops[0], guard.comparators[0]
    left_is_value = isinstance(left, ast.Constant)
    value, other = (left, right) if left_is_value else (right, left)
    name, was = ast.unparse(other), ast.unparse(value)
    if not _is_value(value):
        sides = f"{frame.read(ast.unparse(left))} and {frame.read(ast.unparse(right))}"
        return f"{frame.plain(ast.unparse(guard))} no longer holds: {sides}"
    if isinstance(op, (ast.Eq, ast.Is)):
        return f"{frame.plain(name)} was {was}, is {frame.read(name)}"
    if isinstance(op, (ast.NotEq, ast.IsNot)):
        return f"{frame.plain(name)} was not {was}, is {frame.read(name)}"
    if type(op) in _BOUNDS:
        return f"{frame.plain(name)} was {_BOUNDS[type(op)][left_is_value]} {was}, is {frame.read(name)}"  # pyrefly: ignore[bad-index]
    if isinstance(op, (ast.In, ast.NotIn)) and left_is_value:
        had = isinstance(op, ast.In)
        return f"{frame.plain(name)} {'had' if had else 'had no'} {was}, has {'none' if had else 'it'} now"
    return ""


def _parts(guard: ast.expr) -> list[ast.expr]:
    """What a chain (``2 <= n <= 8``) or a conjunction says, one by one; nothing if it is neither."""
    if isinstance(guard, ast.BoolOp) and isinstance(guard.op, ast.And):
        return guard.values
    if isinstance(guard, ast.Compare) and len(guard.ops) > 1:
        sides = [guard.left, *guard.comparators]
        return [ast.Compare(a, [op], [b]) for a, op, b in zip(sides, guard.ops, sides[1:], strict=False)]
    return []


def _is_value(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _dtype(name: str) -> str:
    return str(getattr(torch, name.lower(), name)).removeprefix("torch.")
