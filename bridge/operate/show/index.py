"""What `verify` and `dlq` found, for a terminal or as JSON: keys are shown, values of rows only where they are asked
for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

import msgspec
from rich.table import Table as Grid
from rich.text import Text

from bridge.event import Event
from bridge.index.expected import KINDS, REFUSED
from bridge.index.letters import Dead, Retried, Shown, reasons
from bridge.index.verify import Report
from bridge.operate.show.status import left_off, plain

HIDDEN = "…"
_SAID = {
    "missing": "rows without their document",
    "extra": "documents without a row",
    "stale": "documents of an older version of their row",
    "different": "documents with other content than their row's",
    "refused": "rows that the index refused (see bridge dlq)",
}


def _printed(found: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"


def _key(raw: msgspec.Raw | None) -> str:
    return bytes(raw).decode() if raw is not None else ""


# verify


def reports_as_json(reports: Sequence[Report]) -> str:
    """Everything as one JSON object, with `same` on top."""
    found = [{"same": report.same, **msgspec.structs.asdict(report)} for report in reports]
    return _printed({"same": all(report.same for report in reports), "generations": found})


def report(found: Report, out: TextIO) -> None:
    """Print what a comparison found in one generation."""
    console = plain(out)
    good = found.same
    verdict = "as the log says" if good else "differs from the log"
    console.print(
        Text(f"{found.physical} ({found.state}): {verdict}", style="bold green" if good else "bold red"), soft_wrap=True
    )
    for line in _lines(found):
        console.print(Text(f"  {line}"), soft_wrap=True)
    if found.findings:
        grid = Grid(box=None, padding=(0, 2, 0, 0))
        for column in ("  found", "document", "key"):
            grid.add_column(column, overflow="fold")
        for finding in found.findings:
            grid.add_row(f"  {finding.kind}", Text(finding.id), Text(_key(finding.key)))
        console.print(grid)
    left_off(console, {kind: found.counts.get(kind, 0) for kind in KINDS}, [finding.kind for finding in found.findings])


def _lines(found: Report) -> list[str]:
    lines = [f"{found.rows:,} rows at sequence {found.seq:,} of the log, {found.documents:,} documents"]
    if not found.reader:
        behind = (
            f"{found.behind:,} events behind, which are not compared" if found.behind else "nothing is left to read"
        )
        lines.append(f"its reader does not get on: {behind}")
    elif found.behind:
        lines.append(f"{found.behind:,} events came meanwhile, up to sequence {found.end:,}")
    for kind in KINDS:
        before, now = found.found.get(kind, 0), found.counts.get(kind, 0)
        if before or now:
            lines.append(f"{before:,} {_SAID[kind]}" + (f", {now:,} now" if now != before else ""))
    if found.changed:
        lines.append(f"{found.changed:,} more changed meanwhile, so that nothing can be said of them")
    if found.repaired or found.refused:
        asked = sum(count for kind, count in found.found.items() if kind != REFUSED)
        lines.append(f"{found.mended:,} of {asked:,} mended, {found.repaired:,} rows written anew")
    lines += [f"{count:,} could not be repaired: {reason}" for reason, count in found.refused.items()]
    if found.lost:
        lines.append(f"{found.lost:,} events do not say which row they change, and were left out")
    return lines


# dlq


def letters_as_json(found: Sequence[Dead]) -> str:
    """The letters, with their reasons counted on top."""
    letters = [{"number": one.number, "state": one.state, "letter": one.letter} for one in found]
    return _printed({"count": len(found), "reasons": reasons(found), "letters": letters})


def letters(found: Sequence[Dead], name: str, limit: int, out: TextIO) -> None:
    """Print the letters' reasons, and the first of them."""
    console = plain(out)
    console.print(Text(f"{name}: {len(found):,} dead letters", style="bold"))
    for reason, count in reasons(found).items():
        console.print(Text(f"  {count:,}  {reason}"), soft_wrap=True)
    if not found:
        return
    grid = Grid(box=None, padding=(0, 2, 0, 0))
    for column in ("letter", "event", "op", "key", "at", "generation", "reason"):
        grid.add_column(column, overflow="fold")
    for one in found[:limit]:
        letter = one.letter
        if letter is None:
            grid.add_row(str(one.number), "", "", "", "", "", "not readable")
            continue
        gone = f"{letter.generation}" + (" (gone)" if one.state == "gone" else "")
        cells = (str(letter.seq), letter.op, _key(letter.key), letter.at, gone, letter.reason)
        grid.add_row(str(one.number), *(Text(cell) for cell in cells))
    console.print(grid)
    if len(found) > limit:
        console.print(f"… and {len(found) - limit:,} more (--limit)")


def letter(found: Shown, *, values: bool) -> str:
    """One letter with its event as JSON; without `values` of the row only its columns' names are told."""
    event = _told(found.event, values=values) if found.event is not None else None
    return _printed({
        "number": found.dead.number, "generation": found.dead.state, "letter": found.dead.letter,
        "event": event, **({"why": found.why} if found.why else {}),
    })  # fmt: skip


def _told(event: Event, *, values: bool) -> dict[str, Any]:
    told = {name: value for name, value in msgspec.structs.asdict(event).items() if value not in (None, ())}
    for name in ("key", "before", "after"):
        raw = told.pop(name)
        if not bytes(raw):
            continue
        if name != "key" and not values:
            columns = msgspec.json.decode(raw, type=dict[str, msgspec.Raw] | None) or {}
            raw = dict.fromkeys(columns, HIDDEN)
        told[name] = raw
    return told


def retried(found: Retried, name: str, out: TextIO) -> None:
    """Print what a retry did."""
    console = plain(out)
    console.print(
        f"{name}: {found.written:,} written, {found.deleted:,} deleted as the log has them no more, "
        f"{found.newer:,} newer already; {found.letters:,} letters removed",
        soft_wrap=True,
    )
    if found.refused:
        console.print(Text(f"{len(found.refused):,} letters stay:", style="bold red"))
        for one in found.refused:
            console.print(Text(f"  {one.number}  {_key(one.key)}  {one.reason}"), soft_wrap=True)
    if found.gone:
        console.print(
            f"{found.gone:,} letters are of generations that are gone: bridge dlq {name} drop removes them",
            soft_wrap=True,
        )
