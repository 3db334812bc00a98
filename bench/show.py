"""The tables that people read: one run beside its budgets, or two runs side by side."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.budgets import BUDGETS
from bench.compare import Change
from bench.result import Result

WIDTH = 170  # where there is no terminal, so that a file has one line a row
STYLES = {"aim met": "bold green", "met": "green", "not met": "bold red"}


def results(found: list[Result]) -> None:
    """One table on stdout."""
    table = _table("row", "value", "yardstick", "ratio", "spread", "runs", "at least", "aim", "", "what")
    for one in found:
        budget = BUDGETS.get(one.row)
        verdict = budget.verdict(one) if budget else ""
        table.add_row(
            one.row,
            figure(one.value),
            figure(one.yardstick) if one.yardstick else "",
            f"{one.ratio:.2f}" if one.ratio else "",
            f"{one.spread:.0%}",
            str(one.runs),
            f"{budget.least:g}" if budget else "",
            f"{budget.aim:g}" if budget else "",
            Text(verdict, STYLES.get(verdict, "")),
            one.unit,
        )
    _console().print(table)


def changes(found: list[Change], a: str, b: str) -> None:
    """Two runs side by side on stdout; a change larger than what the runs themselves vary by has a mark."""
    table = _table("row", f"A: {a}", f"B: {b}", "A ratio", "B ratio", "change", "spreads", "", "what")
    for one in found:
        some = one.b or one.a
        table.add_row(
            one.row,
            figure(one.a.value) if one.a else "",
            figure(one.b.value) if one.b else "",
            f"{one.a.ratio:.2f}" if one.a and one.a.ratio else "",
            f"{one.b.ratio:.2f}" if one.b and one.b.ratio else "",
            f"{one.change:+.1%}" if one.change is not None else "",
            " / ".join(f"{side.spread:.0%}" for side in (one.a, one.b) if side),
            Text("◀ " + ("more" if (one.change or 0) > 0 else "less") if one.marked else "", "bold yellow"),
            some.unit if some else "",
        )
    _console().print(table)


def figure(value: float) -> str:
    """Three or more digits that say something."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        left = column in ("row", "what", "")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "what")
    return table


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)
