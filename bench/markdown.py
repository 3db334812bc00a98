"""`python -m bench.markdown FILE.json`: a run's results as the table that docs/performance.md holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.budgets import BUDGETS
from bench.compare import read
from bench.result import Result
from bench.show import figure

HEAD = ["row", "value", "yardstick", "ratio", "spread", "at least", "aim", "reached"]


def table(results: list[Result]) -> str:
    """One line a row, in the order of the results."""
    lines = [HEAD, ["---", *["---:"] * 6, "---"], *(_cells(one) for one in results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(one: Result) -> list[str]:
    budget = BUDGETS.get(one.row)
    return [
        f"`{one.row}`",
        figure(one.value),
        figure(one.yardstick) if one.yardstick else "",
        f"{one.ratio:.2f}" if one.ratio else "",
        f"{one.spread:.0%}",
        f"{budget.least:g}" if budget else "",
        f"{budget.aim:g}" if budget else "",
        budget.verdict(one) if budget else "",
    ]


def main() -> int:
    """Parse the argument and print."""
    parser = argparse.ArgumentParser(prog="bench.markdown", description="A run's results as a Markdown table.")
    parser.add_argument("file", type=Path, help="what --json wrote")
    sys.stdout.write(table(read(parser.parse_args().file)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
