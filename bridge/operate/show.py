"""A status as one page for a terminal, or as JSON."""

from __future__ import annotations

from datetime import datetime
from typing import TextIO

import msgspec
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from bridge.operate.health import size, span
from bridge.operate.parts import Index, Status
from bridge.stream.state import Again

WIDE = 500
STATES = {
    "streaming": "running, reading the slot",
    "running": "running, not reading the slot",
    "stopped": "not running",
    "unknown": "unknown",
}


def as_json(found: Status) -> str:
    """Everything as one JSON object, with `in_step` on top."""
    whole = {"in_step": found.in_step, **msgspec.to_builtins(found)}
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n"


def plain(out: TextIO) -> Console:
    """Prints as wide as the terminal, or as its lines are where there is none."""
    return Console(file=out, highlight=False, width=None if out.isatty() else WIDE)


def page(found: Status, out: TextIO) -> None:
    """Print the page."""
    console = plain(out)
    good = found.in_step
    verdict = "in step" if good else "needs a look"
    console.print(Text(f"bridge {found.source}: {verdict}", style="bold green" if good else "bold red"))
    grid = Grid.grid(padding=(0, 2), expand=False)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, lines in _parts(found):
        for number, line in enumerate(lines):
            grid.add_row("" if number else name, Text(line))
    console.print(grid)
    for finding in found.findings:
        problem = finding.level == "problem"
        console.print(
            Text("✗ " if problem else "· ", style="red" if problem else "dim").append(finding.what, "default")
        )
        if finding.next:
            console.print(Text(f"  → {finding.next}", style="dim"))


def _parts(found: Status) -> list[tuple[str, list[str]]]:
    parts = [
        ("bridge", [_process(found)]),
        ("slot", _slot(found)),
        ("checkpoint", [_checkpoint(found)]),
        ("stream", _stream(found)),
        ("lag", [_lag(found)]),
        ("publish", [f"{found.publishing}: {found.publishing_why}"]),
        ("sync", [f"{found.settings.sync}: {found.durability}"]),
        ("tables", _tables(found)),
        ("rebuild", [f"from the start: {found.rebuild}"]),
        ("indexes", [line for index in found.indexes for line in _index(index)]),
    ]
    return [(name, lines) for name, lines in parts if lines]


def _process(found: Status) -> str:
    process = found.process
    who = f", {process.who}" if process.who else ""
    return f"{STATES[process.state]}{who}" + (f", epoch {process.epoch}" if process.epoch else "")


def _slot(found: Status) -> list[str]:
    slot = found.slot
    if slot is None:
        return ["unknown: PostgreSQL is away"]
    if not slot.exists:
        return [f"{slot.name}: not there"]
    activity = "active" if slot.active else "not active"
    kept = f"confirmed {slot.confirmed_flush} of {slot.flushed}, PostgreSQL keeps {size(slot.retained)} of WAL for it"
    return [f"{slot.name}: {activity}, WAL {slot.wal_status or 'status unknown'}", kept]


def _checkpoint(found: Status) -> str:
    kept = found.checkpoint
    if kept is None:
        return "unknown: NATS is away" if found.stream is None else "none"
    phase = " (initial snapshot)" if kept.phase == "snapshot" else ""
    return f"{kept.lsn} at sequence {kept.stream_seq:,}, {span(kept.age)} ago{phase}"


def _stream(found: Status) -> list[str]:
    stream = found.stream
    if stream is None:
        return ["unknown: NATS is away"]
    if not stream.exists:
        return [f"{stream.name}: not there"]
    limits = [f"max_bytes {size(stream.max_bytes)}"] if stream.max_bytes else []
    limits += [f"max_msgs {stream.max_msgs:,}"] if stream.max_msgs else []
    limits += [f"max_age {span(stream.max_age)}"] if stream.max_age else []
    kept = f", {', '.join(limits)}, discard {stream.discard}" if limits else ", no limits"
    lines = [f"{stream.name}: {stream.messages:,} messages, {size(stream.bytes)}{kept}"]
    if stream.messages:
        lines.append(f"reaches back to sequence {stream.first_seq:,} of {_minute(stream.first_at)}")
        lines.append(f"ends at sequence {stream.last_seq:,} of {_minute(stream.last_at)}")
    elif stream.last_seq:
        lines.append(f"empty; {stream.last_seq:,} messages were removed")
    if stream.replicas > 1:
        behind = f", behind: {', '.join(stream.behind)}" if stream.behind else ", all current"
        lines.append(f"{stream.replicas} replicas, leader {stream.leader or 'none'}{behind}")
    return lines


def _lag(found: Status) -> str:
    lag = found.lag
    if lag is None:
        return "unknown"
    if not lag.bytes:
        return "none"
    return f"{size(lag.bytes)} of WAL" + (f", {span(lag.seconds)}" if lag.seconds is not None else "")


def _tables(found: Status) -> list[str]:
    counts: dict[str, int] = {}
    for table in found.tables:
        counts[table.state] = counts.get(table.state, 0) + 1
    done = counts.pop("done", 0)
    lines = [f"{done} of {len(found.tables)} complete"] if found.tables else []
    for table in found.tables:
        if table.state != "done":
            of = f" of about {table.estimate:,}" if table.estimate else ""
            rows = f", {table.rows:,} rows{of}" if table.state in ("running", "waiting") else ""
            why = f", {table.error}" if table.error else ""
            lines.append(f"{table.name}: {table.state}{rows}{why}")
        if table.again is not None:
            lines.append(f"{table.name}: being read again, {reading(table.again)}")
    return lines


def reading(again: Again) -> str:
    """How far a table is that is read while the stream flows."""
    of = f" of about {again.estimate:,}" if again.estimate else ""
    left = f", {span(again.eta)} left" if again.eta is not None and again.state == "running" else ""
    return f"{again.state}, {again.rows:,} rows{of}{left}"


def _index(index: Index) -> list[str]:
    reader = f"fed by {index.reader}" if index.reader else "no reader"
    dead = f", {index.dead:,} dead letters" if index.dead else ""
    lines = [f"{index.name}: {index.state}, {reader}{dead}"]
    for one in index.generations:
        behind = "consumer is gone" if one.behind is None else f"{one.behind:,} events behind"
        lines.append(f"  {one.physical}: {one.state}, at sequence {one.seq:,}, {behind}")
    return lines + [f"  {name}: of the past, nothing feeds it" for name in index.past]


def _minute(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
