"""How far tables are that are read while the stream flows: as text, and as bars on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.progress import TaskID
from rich.table import Table as Grid
from rich.text import Text

from bridge import log
from bridge.config import join_name
from bridge.operate.progress import SAY_EVERY, logs_above
from bridge.operate.progress import bars as progress_bars
from bridge.operate.show.status import plain
from bridge.operate.status.health import span
from bridge.stream.state import SnapshotStatus
from bridge.stream.trim import Trimmed

NAMED = 5
COLUMNS = ("table", "state", "rows", "from sequence", "")
# What the last column is not to be narrower than.
REST = 24
Tables = dict[tuple[str, str], SnapshotStatus]


def told(found: Tables, out: TextIO, *, asked: bool, running: bool) -> None:
    """Print a line for each table, or a few where the terminal is too narrow for that."""
    console = plain(out)
    rows = [_cells(root, status) for root, status in sorted(found.items())]
    widths = [max(map(cell_len, column)) + 2 for column in zip(COLUMNS, *rows, strict=True)]
    if sum(widths[:-1]) + min(widths[-1], REST) > console.width:
        _stacked(console, rows)
    else:
        grid = Grid(box=None, padding=(0, 2, 0, 0))
        for column in COLUMNS[:-1]:
            grid.add_column(column, no_wrap=True)
        grid.add_column(COLUMNS[-1], overflow="fold")
        for cells in rows:
            grid.add_row(*map(Text, cells))
        console.print(grid)
    if asked and not running:
        console.print("no bridge is running: it begins with the next `bridge run`")


def _stacked(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """A table's name on a line of its own, what is said of it below."""
    for name, state, count, start, rest in rows:
        console.print(Text(name), soft_wrap=True)
        known = [state, f"{count} rows", f"{COLUMNS[3]} {start}" if start != "-" else "", rest]
        console.print(Padding(Text(", ".join(filter(None, known)), overflow="fold"), (0, 0, 0, 2)))


def idle(found: Sequence[tuple[str, str]], action: str, tables: Tables, out: TextIO) -> None:
    """Print for which tables there was nothing to pause, resume or cancel."""
    first = [root for root in found if root in tables and tables[root].state in ("waiting", "running")]
    rest = [root for root in found if root not in first]
    for some, why in (
        (first, "the initial snapshot reads it, and goes on"),
        (rest, "nobody asked for it to be read"),
    ):
        if some:
            names = ", ".join(join_name(*root) for root in some[:NAMED])
            more = f" and {len(some) - NAMED:,} more" if len(some) > NAMED else ""
            plain(out).print(f"nothing to {action} of {names}{more}: {why}", markup=False, soft_wrap=True)


def trimmed(found: Trimmed, out: TextIO) -> None:
    """Print what was removed from the log."""
    oldest = f"the oldest complete picture is that of {found.table}"
    out.write(f"{found.messages:,} messages removed, the log begins at sequence {found.first:,}; {oldest}\n")
    if found.behind:
        how = "removed although they had not acked it" if found.forced else "kept, because they have not acked it yet"
        out.write(f"{how}: {', '.join(found.behind)}\n")


def _cells(root: tuple[str, str], status: SnapshotStatus) -> tuple[str, ...]:
    again = status.again
    picture = status.complete_from and status.state not in ("waiting", "running")
    start = f"{status.complete_from:,}" if picture else "-"
    if again is None:
        running = status.state == "running"
        of = f" of about {status.estimate:,}" if running and status.estimate else ""
        left = f"{span(status.eta)} left" if running and status.eta is not None else status.error
        return (join_name(*root), status.state, f"{status.rows:,}{of}", start, left)
    of = f" of about {again.estimate:,}" if again.estimate else ""
    left = f"{span(again.eta)} left" if again.eta is not None and again.state == "running" else ""
    return (join_name(*root), again.state, f"{again.rows:,}{of}", start, again.why or left or status.error)


@contextmanager
def progress() -> Iterator[Callable[[Tables], None]]:
    """The function to call with what is known: bars on a terminal, a log line now and then elsewhere."""
    bars = progress_bars()
    if bars is None:
        yield _Lines()
        return
    tasks: dict[tuple[str, str], TaskID] = {}

    def show(found: Tables) -> None:
        for root, status in found.items():
            again = status.again
            if root not in tasks:
                tasks[root] = bars.add_task(join_name(*root), total=None, rest="")
            rows = again.rows if again is not None else status.rows
            total = max(again.estimate, again.rows) if again is not None else status.rows
            rest = f"{again.rate:,.0f}/s" if again is not None and again.rate else ""
            state = again.state if again is not None else status.state
            bars.update(
                tasks[root], description=f"{join_name(*root)}: {state}", completed=rows, total=total or None, rest=rest
            )

    with bars, logs_above():
        yield show


@contextmanager
def initial() -> Iterator[Callable[[Tables], None] | None]:
    """The function to call with how far an initial snapshot is, on a terminal: a bar for all tables, and one for each
    that is being read. None elsewhere."""
    bars = progress_bars()
    if bars is None:
        yield None
        return
    whole = bars.add_task("snapshot", total=None, rest="")
    tasks: dict[tuple[str, str], TaskID] = {}

    def show(found: Tables) -> None:
        rows, about = sum(s.rows for s in found.values()), sum(max(s.rows, s.estimate) for s in found.values())
        done = sum(status.state == "done" for status in found.values())
        bars.update(
            whole, description=f"snapshot: {done:,} of {len(found):,} tables", completed=rows, total=about or None
        )
        for root, status in found.items():
            if status.state != "running":
                if root in tasks:
                    bars.remove_task(tasks.pop(root))
                continue
            if root not in tasks:
                tasks[root] = bars.add_task(f"  {join_name(*root)}", total=None, rest="")
            total = max(status.rows, status.estimate) or None
            left = f", {span(status.eta)} left" if status.eta else ""
            bars.update(tasks[root], completed=status.rows, total=total, rest=f"{status.rate:,.0f}/s{left}")

    with bars, logs_above():
        yield show


class _Lines:
    """A line for each new state of a table, and every ten seconds."""

    def __init__(self) -> None:
        self._states: dict[tuple[str, str], str] = {}
        self._said = 0.0

    def __call__(self, found: Tables) -> None:
        due = time.monotonic() - self._said >= SAY_EVERY
        for root, status in found.items():
            again = status.again
            state = again.state if again is not None else status.state
            if due or self._states.get(root) != state:
                self._states[root], self._said = state, time.monotonic()
                rows = again.rows if again is not None else status.rows
                log.get().info("snapshot", table=join_name(*root), state=state, rows=rows)
