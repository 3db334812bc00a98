"""`python -m bench [--only rows] [--json file]`: run the benchmarks, print one table, write a list of results.

Each result is {row, value, yardstick, ratio, unit, runs, spread}: value and yardstick are medians over `runs` taken
alternately, spread is (largest - smallest) / median of the values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import msgspec
from rich.console import Console
from rich.table import Table

from bench import rebuild, stream
from bench.result import Result

ROWS: dict[str, Callable[[], Awaitable[list[Result]]]] = {
    "stream.tx1": lambda: stream.measure("stream.tx1", rows=100_000, per_transaction=1),
    "stream.tx1000": lambda: stream.measure("stream.tx1000", rows=200_000, per_transaction=1000),
    "index.rebuild": rebuild.measure,
}


async def run(only: list[str]) -> list[Result]:
    """The results of the chosen rows, one after the other so that none disturbs another."""
    results: list[Result] = []
    for name, measure in ROWS.items():
        if not only or any(name == chosen or name.startswith(f"{chosen}.") for chosen in only):
            Console(stderr=True).print(f"measuring {name} …", style="dim")
            results += await measure()
    return results


def show(results: list[Result]) -> None:
    """One table on stdout."""
    table = Table("row", *(("value", "yardstick", "ratio", "runs", "spread")), "what")
    for found in results:
        yardstick = f"{found.yardstick:,.0f}" if found.yardstick else ""
        ratio = f"{found.ratio:.2f}" if found.ratio else ""
        table.add_row(
            found.row, f"{found.value:,.1f}" if found.value < 1000 else f"{found.value:,.0f}", yardstick, ratio,
            str(found.runs), f"{found.spread:.0%}", found.unit,
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure against a yardstick taken in the same run.")
    parser.add_argument("--only", default="", help=f"comma-separated rows or their beginnings: {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    only = [part.strip() for part in options.only.split(",") if part.strip()]
    unknown = [part for part in only if not any(row == part or row.startswith(f"{part}.") for row in ROWS)]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)} (there are {', '.join(ROWS)})")
    results = anyio.run(run, only, backend_options={"use_uvloop": True})
    show(results)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
