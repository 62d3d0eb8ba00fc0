"""What goes wrong on the command line: exit code 2 for its use, 1 for a step that cannot be compiled."""

from __future__ import annotations


class UsageProblem(Exception):
    """The command was used wrongly, or the target cannot be loaded: exit code 2."""

    def __init__(self, found: str, hint: str = "") -> None:
        self.found, self.hint = found, hint
        super().__init__(f"{found}\n  to do: {hint}" if hint else found)
