"""An ``if`` on a value that the step computes: both sides go into the graph, and a select chooses.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo breaks the graph
there, and before the update a step has to stay whole. Each side is traced as far as where they
meet; what differs then is ``torch.where(condition, a, b)``. A side that raises becomes an assertion.

- The side that is not taken reads its inputs through ``where(taken, x, x.detach())``: what its
  derivative makes of values it was not written for (0 / 0) stays out of the gradient.
- A side may make tensors and nothing else. One that writes to what was there before, returns
  another shape, takes a backward or breaks the graph is left to Dynamo, from a new start.
"""

from __future__ import annotations

import contextlib
import dis
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo import exc, symbolic_convert
from torch._dynamo.bytecode_analysis import livevars_analysis
from torch._dynamo.current_scope_id import enter_new_scope
from torch._dynamo.variables import ConstantVariable, ctx_manager
from torch._dynamo.variables.tensor import (
    SymNodeVariable,
    TensorVariable,
    UnspecializedPythonVariable,
)
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
    free_unbacked_symbols,
)

from .dynamo_common import call, is_new, record_of_frame, user_line
from .frame_record import FrameRecord
from .given import answer
from .joins import END, is_conditional, meeting
from .selects import Declined, Raises, example, gate, keeps_statistics, select, storages, written_data

MOST = 8  # how often a branch may come again on one of its own sides: in a short loop that it leaves
_CONDITIONAL = frozenset(code for name, code in dis.opmap.items() if is_conditional(name))
_INLINED = symbolic_convert.InliningInstructionTranslator
_GENERATOR = symbolic_convert.InliningGeneratorInstructionTranslator
_REASONS = (
    Declined,
    exc.Unsupported,
    exc.UserError,
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)


def _why(error: Exception) -> str:
    if isinstance(error, Declined):
        return str(error)
    if "Unsafe side effect" in str(error):
        return "one of its sides changes what other code reads"
    return f"one of its sides can't be traced: {str(error).strip().splitlines()[0]}"


@dataclass
class _Side:
    """One side, traced: what it leaves on the stack, in variables, and as the function's result."""

    raises: str = ""  # what it raises
    stack: list[Any] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)
    result: Any = None  # of the function, if the sides meet at its end


def step_hook(original: Callable[..., bool]) -> Callable[..., bool]:
    """``InstructionTranslatorBase.step``: one instruction."""

    def step(self: Any) -> bool:
        ip = self.instruction_pointer
        inst = self.instructions[ip] if ip is not None else None
        if inst is None or inst.opcode not in _CONDITIONAL or not _undecided(self, inst):
            return original(self)
        record = record_of_frame()
        site = (self.f_code, inst.offset)
        if record.events:
            return original(self)
        if site in record.declined:
            return _decided(original, self, inst)
        if record.forking.count(site) == MOST:
            raise Declined("it decides how often a loop runs")
        broke, seen = record.broke, self.speculation_log.index
        record.forking.append(site)
        try:
            return _fork(self, inst, record)
        except _REASONS as error:
            if record.forking[0] is not site:
                raise  # the outer one is declined with it
            record.broke, record.declined[site] = broke, _why(error)
            del self.speculation_log.entries[seen:]  # of calls that the next attempt may not come to
            raise exc.SpeculationRestartAnalysis(restart_reason="a branch on data") from None
        finally:
            record.forking.pop()

    return step


def _decided(original: Callable[..., bool], tx: Any, inst: Any) -> bool:
    """The instruction where not both sides are in the graph: with the answer that the frame's inputs give."""
    value = tx.stack[-1]
    truth = answer(tx, value)
    if truth is None:
        return original(tx)  # a graph break
    tx.stack[-1] = known = ConstantVariable.create(truth)
    goes_on = original(tx)
    if inst.opname.endswith("OR_POP") and tx.stack and tx.stack[-1] is known:
        tx.stack[-1] = value
    return goes_on


def _undecided(tx: Any, inst: Any) -> bool:
    """Whether the jump is about a number of a tensor's, or one that depends on data."""
    if not tx.stack or _is_plain_assertion(tx.instructions[tx.instruction_pointer + 1 :]):
        return False
    value = tx.stack[-1].realize()
    if isinstance(value, SymNodeVariable):
        return bool(free_unbacked_symbols(value.sym_num))
    if not isinstance(value, TensorVariable) or isinstance(value, UnspecializedPythonVariable):
        return False
    return value.is_tensor() and example(value).numel() == 1


def _is_plain_assertion(following: list[Any]) -> bool:
    """Whether an assertion with a constant text, or none, comes next: Dynamo traces it."""
    names = [inst.opname for inst in itertools.takewhile(lambda i: i.opname != "RAISE_VARARGS", following)]
    others = set(names) - {"LOAD_CONST", "PRECALL", "CALL", "CALL_FUNCTION"}
    return names[:1] == ["LOAD_ASSERTION_ERROR"] and others == {"LOAD_ASSERTION_ERROR"}


# ---------------------------------------------------------------- both sides


def _fork(tx: Any, inst: Any, record: FrameRecord) -> bool:
    start = tx.instruction_pointer
    join = meeting(tx.instructions, tx.indexof, start)
    if join is None:
        raise Declined("its sides do not meet again")
    if join == END and (type(tx) is not _INLINED or isinstance(tx, _GENERATOR)):
        raise Declined  # one side ends the frame: whether the other goes on is not for a select to say
    tx.current_instruction = inst
    value = tx.stack[-1]
    taken = _condition(tx, value)
    other = call(tx, torch.logical_not, taken)
    jumps, keeps = "TRUE" in inst.opname, inst.opname.endswith("OR_POP")
    before = _State(tx)
    sides = []
    for when, unless, jumping in ((taken, other, jumps), (other, taken, not jumps)):
        tx.stack[:] = before.stack if jumping and keeps else before.stack[:-1]
        tx.instruction_pointer = tx.indexof[inst.target] if jumping else start + 1
        sides.append(_side(tx, before, join, record, when=when, unless=unless))
        before.restore(tx)
    for when, side in ((other, sides[0]), (taken, sides[1])):
        if side.raises:
            call(tx, torch._assert_async, when, side.raises)
    left = [side for side in sides if not side.raises]
    if not left:
        raise Declined("both of its sides raise")
    _leave(tx, join, left[0] if len(left) == 1 else _merged(tx, before, taken, left[0], left[1], join=join))
    return join != END


def _condition(tx: Any, value: Any) -> Any:
    """The condition as a 0-d boolean tensor."""
    if isinstance(value, SymNodeVariable):
        if isinstance(value.sym_num, torch.SymBool):
            value = call(tx, torch.sym_ite, value, 1, 0)
        return call(tx, operator.ne, call(tx, torch.scalar_tensor, value), 0)
    truth = call(tx, operator.ne, value, 0)
    return call(tx, torch.Tensor.reshape, truth, call(tx, tuple)) if example(truth).dim() else truth


class _State:
    """What tracing a side changes in the translator, to begin the other from the same."""

    def __init__(self, tx: Any) -> None:
        self.stack, self.names = list(tx.stack), dict(tx.symbolic_locals)
        self.blocks = list(tx.block_stack)
        self.one_graph, self.start_point = tx.one_graph, tx.start_point
        self.instruction, self.line = tx.current_instruction, tx.lineno
        self.storages = storages(tx.output.graph.nodes)

    def restore(self, tx: Any) -> None:
        tx.stack[:] = self.stack
        tx.symbolic_locals.clear()
        tx.symbolic_locals.update(self.names)
        tx.block_stack[:] = self.blocks
        tx.one_graph, tx.start_point = self.one_graph, self.start_point
        tx.current_instruction, tx.lineno = self.instruction, self.line
        tx.symbolic_result = None

    def kept(self, tx: Any) -> bool:
        """Whether the contexts are those from before."""
        return len(tx.block_stack) == len(self.blocks) and all(
            a is b for a, b in zip(tx.block_stack, self.blocks, strict=True)
        )


def _side(tx: Any, before: _State, join: int, record: FrameRecord, *, when: Any, unless: Any) -> _Side:
    """Trace from the translator's position to ``join``, for the side of the condition ``when``."""
    graph = tx.output.current_tracer.graph
    last, told = next(iter(reversed(graph.nodes))), len(record.told)
    with _only_makes_tensors(tx, record), enter_new_scope():
        tx.one_graph = True  # a graph break is an error, not a place to resume from
        while tx.instruction_pointer != join:
            inst = tx.instructions[tx.instruction_pointer]
            try:
                if inst.opname == "RAISE_VARARGS" and not _caught(tx, inst):
                    raise Raises(_raised(tx, inst))
                if not tx.step():
                    break
            except Raises as error:
                del record.told[told:]  # what it says on its way is not said: the text is in the error
                return _Side(raises=str(error))
    if not before.kept(tx):
        raise Declined("one side enters a with that the other does not")
    gate(graph, last, when.as_proxy().node, unless.as_proxy().node)
    result = getattr(tx, "symbolic_result", None)
    if join == END and result is None:
        raise Declined("one of its sides does not return")
    return _Side(stack=list(tx.stack), names=dict(tx.symbolic_locals), result=result)


def _merged(tx: Any, before: _State, taken: Any, a: _Side, b: _Side, *, join: int) -> _Side:
    both = lambda one, two: select(tx, before.storages, taken, one, two)  # noqa: E731
    if join == END:
        return _Side(result=both(a.result, b.result))
    if len(a.stack) != len(b.stack):
        raise Declined("its sides leave different things behind")
    stack = [both(x, y) for x, y in zip(a.stack, b.stack, strict=True)]
    live = livevars_analysis(tx.instructions, tx.instructions[join])
    names = {}
    for name in a.names.keys() | b.names.keys():
        one, two = a.names.get(name), b.names.get(name)
        if one is two or name in live:
            if one is None or two is None:
                raise Declined(f"{name!r} is there after one of its sides alone")
            names[name] = both(one, two)
    return _Side(stack=stack, names=names)


def _leave(tx: Any, join: int, side: _Side) -> None:
    """Go on behind the meeting point with what ``side`` says."""
    if join == END:
        tx.symbolic_result, tx.instruction_pointer = side.result, None
        return
    tx.stack[:] = side.stack
    tx.symbolic_locals.clear()
    tx.symbolic_locals.update(side.names)
    tx.instruction_pointer = tx.start_point = join


# ---------------------------------------------------------------- what a side may do


@contextlib.contextmanager
def _only_makes_tensors(tx: Any, record: FrameRecord) -> Iterator[None]:
    """Raise if what runs inside has another effect than new tensors."""
    effects, modes = tx.output.side_effects, _modes()
    changed, seen = _changed(effects), record.counts()
    graph = tx.output.current_tracer.graph
    older = {n: _version(n) for n in graph.nodes}
    yield
    if _changed(effects) != changed or _modes() != modes:
        raise Declined("one of its sides changes what other code reads")
    if record.counts() != seen:
        raise Declined("one of its sides takes a backward, updates, or tells something")
    made = [n for n in graph.nodes if n not in older and n.op != "placeholder"]
    inputs = {n: 0 for n in graph.nodes if n not in older and n.op == "placeholder"}
    written = any(_version(n) != version for n, version in (older | inputs).items())
    if written or written_data(made) & storages(older | inputs) or any(map(keeps_statistics, made)):
        raise Declined("one of its sides writes to a tensor in place")


def _version(node: torch.fx.Node) -> int:
    value = node.meta.get("example_value")
    return value._version if isinstance(value, torch.Tensor) else 0


def _changed(effects: Any) -> set[int]:
    return {id(v) for v in effects._get_modified_vars() if not is_new(v)}


def _modes() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


# ---------------------------------------------------------------- a side that raises


def _caught(tx: Any, inst: Any) -> bool:
    """Whether somebody may catch what is raised here: an exception is data then."""
    while tx is not None:
        entry = getattr(inst, "exn_tab_entry", None)
        if tx.block_stack if entry is None else not _is_with(tx, entry.target):
            return True
        tx = getattr(tx, "parent", None)
        inst = tx.current_instruction if tx is not None else None
    return False


def _is_with(tx: Any, target: Any) -> bool:
    """Whether what leaves a block goes to a context manager of torch's, which catches nothing."""
    contexts = [_context(tx, block) for block in tx.block_stack if block.target is target]
    ours, others = ctx_manager.ContextWrappingVariable, ctx_manager.GenericContextWrappingVariable
    return bool(contexts) and all(isinstance(c, ours) and not isinstance(c, others) for c in contexts)


def _context(tx: Any, block: Any) -> Any:
    """The context manager of a block: a called function's block knows it by what leaves it alone."""
    below = tx.stack[block.stack_index - 1] if block.stack_index else None
    left = below.ctx if isinstance(below, ctx_manager.WithExitFunctionVariable) else None
    return block.with_context or left


def _raised(tx: Any, inst: Any) -> str:
    """The exception on the stack as text, with the line that raises it."""
    tx.current_instruction = inst
    error = tx.stack[-1 if inst.argval == 1 else -2].realize()
    known = getattr(error, "args", None) or []
    texts = [str(a.as_python_constant()) for a in known if a.is_python_constant()]
    name = getattr(getattr(error, "exc_type", None) or getattr(error, "fn", None), "__name__", "an exception")
    return f"{name}: {', '.join(texts)} ({user_line()})"
