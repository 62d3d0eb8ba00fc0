"""``FXPASS_LOGS=graphs,passes,memory,recompiles,timing``: what was compiled, on stderr, without a handle.

Loggers below ``fxpass``, at level INFO. The variable switches them on;
Python's own ``logging`` does as well.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

from .graph_record import GraphRecord

VARIABLE = "FXPASS_LOGS"
KINDS: dict[str, Callable[[GraphRecord], str]] = {
    "graphs": lambda record: record.after,
    "passes": lambda record: record.summary(),
    "memory": lambda record: record.memory_summary(),
    "recompiles": lambda record: record.reason(),
}
TIMING = "timing"  # told when the compilation is over


def set_up(text: str | None = None) -> None:
    """Switch on what ``text`` (default: the environment variable) names, with a handler to stderr."""
    wanted = os.environ.get(VARIABLE, "") if text is None else text
    for kind in filter(None, (part.strip().lstrip("+") for part in wanted.split(","))):
        if kind not in (*KINDS, TIMING):
            warnings.warn(f"{VARIABLE}: {kind!r} is none of {', '.join((*KINDS, TIMING))}", stacklevel=2)
            continue
        logger = logging.getLogger(f"fxpass.{kind}")
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
            logger.addHandler(handler)
            logger.propagate = False


def log(record: GraphRecord) -> None:
    """Tell the loggers that listen about one compiled graph."""
    for kind, text in KINDS.items():
        _tell(kind, record, text)


def log_times(record: GraphRecord) -> None:
    """Tell the loggers that listen where the time of a compilation went, which is over now."""
    _tell(TIMING, record, GraphRecord.times)


def _tell(kind: str, record: GraphRecord, text: Callable[[GraphRecord], str]) -> None:
    logger = logging.getLogger(f"fxpass.{kind}")
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", text(record))


set_up()
