"""What is known of each gradient: written by the graph on the device, read when somebody asks."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch

WATCH, REPORT = "watch", "report"  # scaler inputs that belong to one graph


class Row(IntEnum):
    """Rows of a graph's watch table: float64, one column per checked gradient, in backward's order."""

    LARGEST = 0  # magnitude in the last step, unscaled; inf or nan if an element is
    PEAK = 1  # the largest finite magnitude so far, unscaled
    FIRST_STEP = 2  # the first step with inf or nan, counted from 1; 0: never
    FIRST_VALUE = 3  # and which of the two
    LAST_STEP = 4
    LAST_VALUE = 5
    TIMES = 6  # steps with inf or nan
    TINY = 7  # sampled elements below float16's normal numbers in the last step, zeros included
    ZERO = 8  # sampled elements equal to zero in the last step


class Report(NamedTuple):
    """What the host wants to hear of a step: one float64 vector, in this order."""

    steps: float
    skipped: float
    stuck: float  # overflows in a row at the minimum scale
    scale: float  # of the next step
    first: float  # column of the first gradient of backward that is not finite; -1: none
    value: float  # inf or nan


class ParameterDiagnosis(NamedTuple):
    """One parameter's gradient. Steps count from 1, 0 is never; magnitudes are unscaled."""

    name: str
    first_step: int  # the first step whose gradient was not finite
    first_kind: str  # "inf", "nan" or ""
    last_step: int
    last_kind: str
    times: int  # steps with inf or nan
    largest: float  # magnitude in the last step
    peak: float  # largest finite magnitude of any step
    underflow: float  # share of elements below float16's normal numbers in the last step, zeros included
    zeros: float  # share of elements equal to zero
    weight: str  # "inf" or "nan" if the parameter itself is not finite now


@dataclass(frozen=True)
class Column:
    """Whose gradient a column of the watch table is about."""

    name: str  # of the parameter, qualified, as the user knows it
    sampled: int  # elements; 0 where underflow is not counted
    weight: Callable[[], Tensor | None]  # a weak reference


@dataclass
class Watch:
    """The watch table and the report of one compiled graph."""

    table: Tensor
    report: Tensor
    columns: list[Column] = field(default_factory=list)  # those in use

    @classmethod
    def make(cls, columns: int, device: torch.device) -> Watch:
        """Everything zero, for at most ``columns`` gradients."""
        table = torch.zeros(len(Row), max(columns, 1), dtype=torch.float64, device=device)
        return cls(table, torch.zeros(len(Report._fields), dtype=torch.float64, device=device))

    def clear(self) -> None:
        """Forget what was seen."""
        self.table.zero_()
        self.report.zero_()

    def read(self) -> Iterator[tuple[Column, list[float]]]:
        """Every gradient with its values; reads the device."""
        return zip(self.columns, self.table[:, : len(self.columns)].t().tolist(), strict=True)


class Summary(NamedTuple):
    """All gradients of the last step together."""

    nonfinite: tuple[str, ...]  # "parameter: inf", of the last skipped step, in backward's order
    largest: float
    underflow: float
    zeros: float


def summary(watches: Sequence[Watch]) -> Summary:
    """Read the device for what ``stats()`` shows."""
    columns = [column for watch in watches for column in watch.read()]
    last = max((values[Row.LAST_STEP] for _, values in columns), default=0.0)
    bad = [f"{c.name}: {kind(v[Row.LAST_VALUE])}" for c, v in columns if last and v[Row.LAST_STEP] == last]
    newest = max(watches, key=lambda watch: float(watch.report[0]), default=None)
    now = list(newest.read()) if newest else []
    elements = sum(column.sampled for column, _ in now) or 1
    magnitudes = [v[Row.LARGEST] for _, v in now]
    largest = math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes, default=0.0)
    tiny, zero = (sum(v[row] for _, v in now) / elements for row in (Row.TINY, Row.ZERO))
    return Summary(tuple(dict.fromkeys(bad)), largest, tiny, zero)


def kind(value: float) -> str:
    """``"nan"``, ``"inf"`` or, for a finite value, ``""``."""
    return "nan" if math.isnan(value) else "inf" if math.isinf(value) else ""


class Diagnosis(tuple[ParameterDiagnosis, ...]):
    """One row per parameter; ``str()`` is a text table, and rich prints a coloured one.

    The gradient that was first non-finite comes first: the earliest step, and
    in it the one that backward computed first.
    """

    @property
    def first(self) -> ParameterDiagnosis | None:
        """The parameter whose gradient was first non-finite; None if all were finite."""
        return self[0] if self and self[0].first_step else None

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, without its head."""
        return [tuple(_cell(value) for value in row) for row in self]

    def __str__(self) -> str:
        rows = [_HEAD, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        """The table for ``rich.print``."""
        if importlib.util.find_spec("rich") is None:
            return str(self)
        from rich.table import Table

        table = Table(title="gradients")
        for column in _HEAD:
            table.add_column(column, overflow="fold", no_wrap=column == _HEAD[0])
        for row, cells in zip(self, self.cells(), strict=True):
            table.add_row(*cells, style="red" if row.first_step or row.weight else None)
        return table


_HEAD = tuple(field.replace("_", " ") for field in ParameterDiagnosis._fields)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value or "-")


def diagnose(watches: Sequence[Watch]) -> Diagnosis:
    """One row per parameter over all graphs; reads the device.

    A second model's parameter of the same name is told apart by a number: ``weight (2)``.
    """
    by_weight: dict[object, list[ParameterDiagnosis]] = {}
    for watch in watches:
        for column, values in watch.read():
            tensor = column.weight()
            # names repeat from model to model
            of_one = column.name if tensor is None else (column.name, id(tensor))
            by_weight.setdefault(of_one, []).append(_row(column, values, tensor))
    taken: Counter[str] = Counter()
    rows = []
    for row in map(_merge, by_weight.values()):
        taken[row.name] += 1
        rows.append(row if taken[row.name] == 1 else row._replace(name=f"{row.name} ({taken[row.name]})"))
    return Diagnosis(sorted(rows, key=lambda row: row.first_step or math.inf))


def _row(column: Column, v: list[float], weight: Tensor | None) -> ParameterDiagnosis:
    state = "" if weight is None else kind(float(_torch.part_of(weight.detach()).abs().amax()))
    size = column.sampled
    return ParameterDiagnosis(
        column.name,
        int(v[Row.FIRST_STEP]),
        kind(v[Row.FIRST_VALUE]),
        int(v[Row.LAST_STEP]),
        kind(v[Row.LAST_VALUE]),
        int(v[Row.TIMES]),
        v[Row.LARGEST],
        v[Row.PEAK],
        v[Row.TINY] / size if size else 0.0,
        v[Row.ZERO] / size if size else 0.0,
        state,
    )


def _merge(parts: list[ParameterDiagnosis]) -> ParameterDiagnosis:
    """One row of several gradients of one parameter: micro-batches, or graphs of other shapes."""
    first = min(parts, key=lambda p: p.first_step or math.inf)
    last = max(parts, key=lambda p: p.last_step)
    largest = max((p.largest for p in parts), key=lambda x: math.inf if math.isnan(x) else x)
    return first._replace(
        last_step=last.last_step,
        last_kind=last.last_kind,
        times=max(p.times for p in parts),
        largest=largest,
        peak=max(p.peak for p in parts),
        underflow=max(p.underflow for p in parts),
        zeros=max(p.zeros for p in parts),
    )
