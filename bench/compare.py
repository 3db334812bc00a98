"""`python -m bench.compare A.json B.json`: two runs side by side, what changed, and whether that is more than noise.

What is compared is the ratio to the yardstick, where a row has none the value. A change has a mark where it is larger
than the spread of either run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.result import Result


class Change(NamedTuple):
    """One row in two runs, None where a run lacks it; `change` is B over A less one."""

    row: str
    a: Result | None
    b: Result | None
    change: float | None
    marked: bool


def compare(a: list[Result], b: list[Result]) -> list[Change]:
    """Every row of either run, in the order of A, then what only B has."""
    first, second = {one.row: one for one in a}, {one.row: one for one in b}
    return [_change(row, first.get(row), second.get(row)) for row in dict.fromkeys([*first, *second])]


def _change(row: str, a: Result | None, b: Result | None) -> Change:
    if a is None or b is None:
        return Change(row, a, b, None, marked=False)
    before, after = (a.ratio, b.ratio) if a.ratio and b.ratio else (a.value, b.value)
    change = after / before - 1 if before else None
    return Change(row, a, b, change, marked=change is not None and abs(change) > max(a.spread, b.spread))


def read(file: Path) -> list[Result]:
    """What `python -m bench --json` wrote.

    Raises:
        SystemExit: it cannot be read, or is something else.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Result])
    except (OSError, msgspec.DecodeError) as error:
        raise SystemExit(f"{file}: {error}") from None


def main() -> int:
    """Parse the arguments and print."""
    from bench import show

    parser = argparse.ArgumentParser(prog="bench.compare", description="Two runs of the benchmark side by side.")
    parser.add_argument("a", type=Path, help="what --json wrote in the first run")
    parser.add_argument("b", type=Path, help="and in the second")
    files = parser.parse_args()
    show.changes(compare(read(files.a), read(files.b)), files.a.name, files.b.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
