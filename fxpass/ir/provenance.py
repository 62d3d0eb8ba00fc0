"""Where a node comes from, the user's code or a pass: the one reader of stack traces in node metadata."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from torch.fx import Node

# Metadata that ties a node to the user's code: its line and module, its part of backward, its region.
INHERITED = ("stack_trace", "nn_module_stack", "seq_nr", "custom")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class Frame:
    """One line of a stack trace."""

    path: str
    line: int
    function: str

    @property
    def place(self) -> str:
        """``file.py:12``."""
        return f"{self.path.replace(chr(92), '/').rpartition('/')[2]}:{self.line}"


@dataclass(frozen=True)
class Origin:
    """Which pass inserted a node, and why."""

    pass_name: str
    reason: str


@functools.lru_cache(maxsize=4096)  # the nodes of one line of the user's have one trace
def frames_in(text: str) -> tuple[Frame, ...]:
    """The frames of a stack trace as Python prints it, outermost first."""
    return tuple(Frame(path, int(line), function) for path, line, function in _FRAME.findall(text))


def inherit(made: Node, replaced: Node) -> None:
    """Let a node be of the same line and module as the one in whose place it stands."""
    made.meta.update({key: replaced.meta[key] for key in INHERITED if key in replaced.meta})


def trace_of(node: Node) -> str:
    """The stack trace with which a node was made, or ""."""
    return node.meta.get("stack_trace") or ""


def user_frame(node: Node) -> Frame | None:
    """The innermost line of the user's code that made the node; of torch's, if there is no other."""
    frames = frames_in(trace_of(node))
    theirs = [frame for frame in frames if "/torch/" not in frame.path]
    return theirs[-1] if theirs else frames[-1] if frames else None


def user_place(node: Node) -> str:
    """``file.py:12``, or ""."""
    frame = user_frame(node)
    return frame.place if frame else ""


def user_line(node: Node) -> str:
    """``file.py:12 in forward``, or ""."""
    frame = user_frame(node)
    return f"{frame.place} in {frame.function}" if frame else ""


def innermost(node: Node) -> str:
    """The end of the trace in one line, path and code: for an error about a call of the user's."""
    return " ".join(line.strip() for line in trace_of(node).strip().splitlines()[-2:])


def origin(node: Node) -> Origin | None:
    """Who inserted the node; None if it comes from the user's code."""
    return node.meta.get("fxpass_origin")
