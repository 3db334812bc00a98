"""One benchmark's result, and how it follows from its runs."""

from __future__ import annotations

import statistics

import msgspec


class Result(msgspec.Struct, frozen=True):
    """One row of the table: medians over `runs`; `spread` is (largest - smallest) / median of the values."""

    row: str
    value: float
    yardstick: float
    ratio: float
    unit: str
    runs: int
    spread: float


def result(row: str, unit: str, values: list[float], yardsticks: list[float] | None = None) -> Result:
    """The result of several runs, taken alternately with those of the yardstick."""
    value = statistics.median(values)
    yardstick = statistics.median(yardsticks) if yardsticks else 0.0
    return Result(
        row,
        round(value, 2),
        round(yardstick, 2),
        round(value / yardstick, 3) if yardstick else 0.0,
        unit,
        len(values),
        round((max(values) - min(values)) / value, 3),
    )
