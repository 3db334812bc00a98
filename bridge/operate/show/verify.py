"""What comparing tables with the log has found, for a terminal or as JSON: keys are shown, values where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote as typed
from typing import Any, TextIO

import msgspec
from rich.table import Table as Grid
from rich.text import Text

from bridge.operate.agreement import KINDS, Finding, Report
from bridge.operate.show.status import left_off, plain

_SAID = {
    "missing": "rows that the log does not have",
    "extra": "rows of the log that the table does not have",
    "different": "rows of which the log has other values",
}


def as_json(reports: Sequence[Report], *, values: bool) -> str:
    """Everything as one JSON object, with `same` on top."""
    found = [{"same": one.same, **msgspec.structs.asdict(_shown(one, values=values))} for one in reports]
    printed = msgspec.json.encode({"same": all(one.same for one in reports), "tables": found})
    return msgspec.json.format(printed, indent=2).decode() + "\n"


def _shown(report: Report, *, values: bool) -> Report:
    if values:
        return report
    hidden = [msgspec.structs.replace(one, table=None, log=None) for one in report.findings]
    return msgspec.structs.replace(report, findings=hidden)


def report(found: Report, out: TextIO, *, values: bool) -> None:
    """Print what a comparison found in one table."""
    console = plain(out)
    if found.why:
        about = f" (about {found.estimate:,} rows)" if found.estimate else ""
        console.print(Text(f"{found.table}: not compared{about}: {found.why}", style="yellow"), soft_wrap=True)
        return
    verdict, style = ("as the log says", "bold green") if found.same else ("differs from the log", "bold red")
    console.print(Text(f"{found.table}: {verdict}", style=style), soft_wrap=True)
    for line in _lines(found):
        console.print(Text(f"  {line}"), soft_wrap=True)
    if found.findings:
        console.print(_grid(found.findings, values=values))
    left_off(console, {kind: found.counts.get(kind, 0) for kind in KINDS}, [one.kind for one in found.findings])


def _lines(found: Report) -> list[str]:
    lines = [f"{found.rows:,} rows, {found.logged:,} in the log; read up to sequence {found.seq:,}"]
    lines += [f"{found.counts[kind]:,} {_SAID[kind]}" for kind in KINDS if found.counts.get(kind)]
    if found.changing:
        lines.append(f"{found.changing:,} rows were changed at each look: nothing can be said of them now")
    if found.unread:
        lines.append(f"{found.unread:,} rows are nested too deep to be compared")
    if found.lost:
        lines.append(f"{found.lost:,} events do not say which row they change")
    if not found.same:
        lines.append(f"bring the rows into the log again: bridge snapshot {typed(found.table)}")
    return lines


def _grid(findings: Sequence[Finding], *, values: bool) -> Grid:
    grid = Grid(box=None, padding=(0, 2, 0, 0))
    for column in ("  found", "key", "columns", *(("table", "log") if values else ())):
        grid.add_column(column, overflow="fold")
    for one in findings:
        told: list[Any] = [_raw(one.table, one.columns), _raw(one.log, one.columns)] if values else []
        grid.add_row(f"  {one.kind}", Text(_raw(one.key, ())), Text(", ".join(one.columns)), *map(Text, told))
    return grid


def _raw(raw: msgspec.Raw | None, columns: Sequence[str]) -> str:
    """JSON as text; of a row only some columns, where there are any."""
    if raw is None:
        return ""
    if columns:
        row = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        raw = msgspec.Raw(msgspec.json.encode({name: row[name] for name in columns if name in row}))
    return bytes(raw).decode()
