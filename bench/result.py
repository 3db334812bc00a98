"""One benchmark's result, and how it follows from its runs. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec


class Result(msgspec.Struct, frozen=True):
    """One row of the table. `value` and `yardstick` are medians over `runs`, `ratio` is that of the medians (0: no
    yardstick); `spread` is (largest - smallest) / median over the runs' own ratios, without a yardstick over their
    values."""

    row: str
    value: float
    yardstick: float
    ratio: float
    unit: str
    runs: int
    spread: float


def result(row: str, unit: str, values: Sequence[float], yardsticks: Sequence[float] = ()) -> Result:
    """The result of several runs; the nth value and the nth yardstick were taken one after the other."""
    value = statistics.median(values)
    yardstick = statistics.median(yardsticks) if yardsticks else 0.0
    ratios = [v / y for v, y in zip(values, yardsticks, strict=True) if y] if yardstick else []
    return Result(
        row,
        round(value, 3),
        round(yardstick, 3),
        round(value / yardstick, 3) if yardstick else 0.0,
        unit,
        len(values),
        round(spread(ratios or values), 3),
    )


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median; 0 where the median is."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ordered values that at least `share` of them do not exceed: 0.5 the median, 0.99 p99."""
    if not ordered:
        raise ValueError("no values")
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
