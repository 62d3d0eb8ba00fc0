"""Python's search for garbage in cycles, made rare while a step is compiled.

Graphs and fake tensors are many small objects that live to the end of the compilation. Every 700
of them Python looks for cycles among the young ones, and again and again through all that torch has
imported: a tenth of what compiling costs beside the C++ compiler, measured on two layers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 50_000  # new objects before Python looks: some 25 MB


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python look for cycles only every ``YOUNG`` objects inside, or less often if the user has it so."""
    young, *older = gc.get_threshold()
    if 0 < young < YOUNG:
        gc.set_threshold(YOUNG, *older)
    try:
        yield
    finally:
        gc.set_threshold(young, *older)
