"""`python -m bench [--only rows] [--runs n] [--scale x] [--json file]`: run the benchmarks, print one table, write a
list of results.

Each result is {row, value, yardstick, ratio, unit, runs, spread}, as bench/result.py says.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import anyio
import msgspec
import structlog
from rich.console import Console
from rich.table import Table

from bench import rebuild, stream
from bench.ground import MODES
from bench.result import Result


class Measurement(NamedTuple):
    """Something that is measured in one go: the rows that it can give, and how, given those that are wanted."""

    rows: list[str]
    measure: Callable[[list[str]], Awaitable[list[Result]]]


def measurements(runs: int, scale: float) -> list[Measurement]:
    """All there are, in the order in which they are taken."""

    async def size(name: str, rows: list[str]) -> list[Result]:
        return await stream.measure(name, [row.split(".")[1] for row in rows], runs, scale)

    async def rebuilt(_: list[str]) -> list[Result]:
        return await rebuild.measure()

    return [
        *(
            Measurement([f"stream.{mode}.{name}" for mode in MODES], functools.partial(size, name))
            for name in stream.SIZES
        ),
        Measurement(["index.rebuild"], rebuilt),
    ]


def wanted(row: str, only: list[str]) -> bool:
    """Whether a choice takes in the row: it names the row, what the row begins with, or a part of its results."""
    return not only or any(f"{row}.".startswith(f"{one}.") or one.startswith(f"{row}.") for one in only)


async def run(chosen: list[tuple[Measurement, list[str]]], results: list[Result]) -> None:
    """Fill `results`, one measurement after the other so that none disturbs another."""
    for measurement, rows in chosen:
        Console(stderr=True).print(f"measuring {', '.join(rows)} …", style="dim")
        results += await measurement.measure(rows)


def show(results: list[Result]) -> None:
    """One table on stdout."""
    table = Table("row", *(("value", "yardstick", "ratio", "runs", "spread")), "what")
    for found in results:
        yardstick = f"{found.yardstick:,.1f}" if found.yardstick else ""
        ratio = f"{found.ratio:.2f}" if found.ratio else ""
        table.add_row(
            found.row, f"{found.value:,.1f}" if found.value < 1000 else f"{found.value:,.0f}", yardstick, ratio,
            str(found.runs), f"{found.spread:.0%}", found.unit,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure against a yardstick taken in the same run.")
    parser.add_argument("--only", default="", help="comma-separated rows or their beginnings at a dot")
    parser.add_argument("--runs", type=int, default=3, help="how often each is measured")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual sizes: 0.1 for a quick look")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    only = [part.strip() for part in options.only.split(",") if part.strip()]
    every = measurements(options.runs, options.scale)
    chosen = [(one, rows) for one in every if (rows := [row for row in one.rows if wanted(row, only)])]
    names = [row for one in every for row in one.rows]
    unknown = [part for part in only if not any(wanted(row, [part]) for row in names)]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)} (there are {', '.join(names)})")
    # The bridges that run in this process say nothing but what goes wrong.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    results: list[Result] = []
    try:
        anyio.run(run, chosen, results, backend_options={"use_uvloop": True})
    finally:
        show(results)
        if options.json:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
