"""A status as one page for a terminal, or as JSON."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import NamedTuple, TextIO, cast

import msgspec
from rich.console import Console, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from bridge.console import Plain, escaped
from bridge.operate.status.health import size, span
from bridge.operate.status.parts import (
    NATS,
    POSTGRES,
    Finding,
    Generation,
    Index,
    Rates,
    Slot,
    Standby,
    Status,
    Stream,
    Table,
)
from bridge.stream.state import Again

WIDE = 500
STATES = {
    "streaming": "running, reading the slot",
    "running": "running, not reading the slot",
    "stopped": "not running",
    "unknown": "unknown",
}


class Signs(NamedTuple):
    """How an output is written: what stands before a problem, a note and a remedy, and what its encoding can show."""

    problem: str
    note: str
    remedy: str
    encoding: str = "utf-8"

    def of(self, text: str) -> str:
        """A text of which a terminal takes nothing for a command, and that is as long as it will be there: a table may
        be called anything."""
        shown = text if text.isprintable() else escaped(text)
        return shown.encode(self.encoding, "backslashreplace").decode(self.encoding)


def as_json(found: Status) -> str:
    """Everything as one JSON object, with `in_step` on top."""
    return msgspec.json.format(as_line(found), indent=2).decode() + "\n"


def as_line(found: Status) -> bytes:
    """The same on one line, without its end."""
    return msgspec.json.encode({"in_step": found.in_step, **msgspec.to_builtins(found)})


class _Unpadded(io.TextIOBase):
    """Takes away the blanks at the ends of lines, which are there to fill a terminal's columns."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._out.encoding or "utf-8"

    def write(self, text: str) -> int:
        self._out.write(_PADDING.sub("", text))
        return len(text)

    def flush(self) -> None:
        self._out.flush()


_PADDING = re.compile(r" +$", re.MULTILINE)


def plain(out: TextIO) -> Console:
    """Prints as wide as the terminal, or as its lines are where there is none."""
    if out.isatty():
        return Plain(file=out, highlight=False)
    return Plain(file=cast(TextIO, _Unpadded(out)), highlight=False, width=WIDE)


def left_off(console: Console, counts: Mapping[str, int], listed: Iterable[str]) -> None:
    """Print how many findings of each kind are not in a list.

    Args:
        counts: of all, by kind.
        listed: the kinds of those in the list.
    """
    shown = Counter(listed)
    left = {kind: count - shown[kind] for kind, count in counts.items() if count > shown[kind]}
    if left:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left.items())
        console.print(f"  … and {sum(left.values()):,} more: {kinds} (--limit)", soft_wrap=True)


def signs(console: Console) -> Signs:
    """Those that this output can show."""
    if console.encoding.startswith("utf"):
        return Signs("✗", "·", "→")
    return Signs("x", "-", "->", console.encoding)


def page(found: Status, out: TextIO) -> None:
    """Print the page: what needs a look comes last, where the eye is."""
    console = plain(out)
    mark = signs(console)
    for part in [_verdict(found), _grid(found, mark), *_findings(found.findings, mark)]:
        console.print(part)


def screen(found: Status, mark: Signs) -> list[RenderableType]:
    """The page for a screen: what needs a look comes first."""
    return [_verdict(found), *_problems(found, mark), *rest(found, mark)]


def head(found: Status, mark: Signs, *, remedies: bool) -> list[RenderableType]:
    """What a screen that is too small for the page shows of it in any case: in step or not, how far behind, and what
    has failed; with what to do about that, or without, which takes half the lines."""
    overview = Text(mark.of("; ".join(_overview(found))))
    return [_verdict(found), overview, *_problems(found, mark, remedies=remedies)]


def rest(found: Status, mark: Signs) -> list[RenderableType]:
    """All parts, and what is worth a note."""
    return [_grid(found, mark), *_findings([one for one in found.findings if one.level == "note"], mark)]


def _problems(found: Status, mark: Signs, *, remedies: bool = True) -> list[Text]:
    problems = [one for one in found.findings if one.level == "problem"]
    return _findings(problems if remedies else [msgspec.structs.replace(one, next="") for one in problems], mark)


def _overview(found: Status) -> list[str]:
    """Log, tables and indexes, in a few words each."""
    done = sum(one.state == "done" for one in found.tables)
    said = [f"lag {_lag(found)}", f"{done} of {len(found.tables)} tables complete"]
    states = [_standing(one) for one in found.indexes]
    behind = [g.behind for one in found.indexes for g in one.generations if g.state == "live" and g.behind is not None]
    most = f", {max(behind):,} events behind" if behind else ""
    if len(states) == 1:
        return [*said, f"index {found.indexes[0].name} {states[0]}{most if states[0] == 'live' else ''}"]
    return [*said, f"{states.count('live')} of {len(states)} indexes live{most}"] if states else said


def _verdict(found: Status) -> Text:
    good = found.in_step
    verdict = "in step" if good else "needs a look"
    return Text(f"bridge {found.source}: {verdict}", style="bold green" if good else "bold red")


def _grid(found: Status, mark: Signs) -> Grid:
    grid = Grid.grid(padding=(0, 2), expand=False)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, lines in _parts(found):
        for number, line in enumerate(lines):
            grid.add_row("" if number else name, Text(mark.of(line)))
    return grid


def _findings(findings: Iterable[Finding], mark: Signs) -> list[Text]:
    lines = []
    for finding in findings:
        problem = finding.level == "problem"
        sign = Text(f"{mark.problem if problem else mark.note} ", style="red" if problem else "dim")
        lines.append(sign.append(mark.of(finding.what), "default"))
        if finding.next:
            lines.append(Text(f"  {mark.remedy} {mark.of(finding.next)}", style="dim"))
    return lines


def _parts(found: Status) -> list[tuple[str, list[str]]]:
    since = _ages(found)
    parts = [
        ("bridge", [_process(found, since)]),
        ("standby", [_waiting(one, since) for one in found.process.standby]),
        ("away", [f"{what}{since(began)}" for what, began in found.away_since.items()]),
        ("slot", _slot(found, since)),
        ("checkpoint", [_checkpoint(found)]),
        ("stream", _stream(found)),
        ("lag", [_lag(found)]),
        ("speed", _speed(found.rates)),
        ("publish", [f"{found.publishing}: {found.publishing_why}"]),
        ("sync", [f"{found.settings.sync}: {found.durability}"]),
        ("tables", _tables(found, since)),
        ("rebuild", [f"from the start: {found.rebuild}"]),
        ("indexes", [line for index in found.indexes for line in _index(index, since)]),
    ]
    return [(name, lines) for name, lines in parts if lines]


def _ages(found: Status) -> Callable[[str], str]:
    """For how long something has been so, to be put behind it; nothing where that is not known."""
    now = datetime.fromisoformat(found.at)

    def since(text: str) -> str:
        if not text:
            return ""
        seconds = max((now - datetime.fromisoformat(text)).total_seconds(), 0.0)
        return f", for {span(seconds)}" if seconds >= 60 else f", for {seconds:.0f} s"

    return since


def _process(found: Status, since: Callable[[str], str]) -> str:
    process = found.process
    who = f", {process.who}" if process.who else ""
    state = STATES[process.state]
    if process.silent is not None:
        return f"not heard of for {span(process.silent.seconds)}, {process.silent.who}"
    if process.state == "unknown":
        state = _unknown(found, NATS if NATS in found.away else POSTGRES)
    elif process.state == "running" and POSTGRES in found.away:
        state = f"running; whether it reads the slot is {_unknown(found, POSTGRES)}"
    return f"{state}{who}{f', epoch {process.epoch}' if process.epoch else ''}{since(process.since)}"


def _unknown(found: Status, what: str) -> str:
    return f"unknown: {what} {'refuses' if what in found.remedies else 'is away'}"


def _waiting(one: Standby, since: Callable[[str], str]) -> str:
    return f"{one.who}{since(one.since)}{': could not take over' if one.why else ''}"


def _slot(found: Status, since: Callable[[str], str]) -> list[str]:
    slot = found.slot
    if slot is None:
        return [_unknown(found, POSTGRES)]
    if not slot.exists:
        return [f"{slot.name}: not there"]
    activity = ("active" if slot.active else "not active") + since(slot.since)
    kept = f"confirmed {slot.confirmed_flush} of {slot.flushed}, PostgreSQL keeps {size(slot.retained)} of WAL for it"
    lines = [f"{slot.name}: {activity}, WAL {slot.wal_status or 'status unknown'}", f"{kept}, {_limit(slot)}"]
    if slot.failover:
        lines.append("a failover slot" + (", made by slot synchronization" if slot.synced else ""))
    if slot.idle_timeout:
        lines.append(f"given up once nobody has read it for {span(slot.idle_timeout)}")
    return lines


def _limit(slot: Slot) -> str:
    if slot.limit is None:
        return "without a limit"
    if slot.safe is None:
        return f"at most {size(slot.limit)}"
    when = f", in {span(slot.lost_in)} at the present rate" if slot.lost_in is not None else ""
    return f"at most {size(slot.limit)}: lost after {size(max(slot.safe, 0))} more{when}"


def _checkpoint(found: Status) -> str:
    kept = found.checkpoint
    if kept is None:
        return _unknown(found, NATS) if found.stream is None else "none"
    phase = " (initial snapshot)" if kept.phase == "snapshot" else ""
    return f"{kept.lsn} at sequence {kept.stream_seq:,}, {span(kept.age)} ago{phase}"


def _stream(found: Status) -> list[str]:
    stream = found.stream
    if stream is None:
        return [_unknown(found, NATS)]
    if not stream.exists:
        return [f"{stream.name}: not there", *_at(stream)]
    limits = [f"max_bytes {size(stream.max_bytes)}"] if stream.max_bytes else []
    limits += [f"max_msgs {stream.max_msgs:,}"] if stream.max_msgs else []
    limits += [f"max_age {span(stream.max_age)}"] if stream.max_age else []
    kept = f", {', '.join(limits)}, discard {stream.discard}" if limits else ", no limits"
    lines = [f"{stream.name}: {stream.messages:,} messages, {size(stream.bytes)}{kept}", *_at(stream)]
    if stream.messages:
        lines.append(f"reaches back to sequence {stream.first_seq:,} of {_minute(stream.first_at)}")
        lines.append(f"ends at sequence {stream.last_seq:,} of {_minute(stream.last_at)}")
    elif stream.last_seq:
        lines.append(f"empty; {stream.last_seq:,} messages were removed")
    if stream.replicas > 1:
        behind = f", behind: {', '.join(stream.behind)}" if stream.behind else ", all current"
        lines.append(f"{stream.replicas} replicas, leader {stream.leader or 'none'}{behind}")
    return lines


def _at(stream: Stream) -> list[str]:
    return [f"at {stream.where}"] if stream.where else []


def _lag(found: Status) -> str:
    lag = found.lag
    if lag is None:
        return "unknown"
    if not lag.bytes:
        return "none"
    return f"{size(lag.bytes)} of WAL" + (f", {span(lag.seconds)}" if lag.seconds is not None else "")


def _speed(rates: Rates | None) -> list[str]:
    if rates is None:
        return ["one look does not tell: bridge status --watch"]
    if rates.events_10 is None:
        return ["not known yet"]
    minute = f" ({rates.events_60:,.0f}/s over a minute)" if rates.events_60 is not None else ""
    lines = [f"{rates.events_10:,.0f} events/s{minute}"]
    if rates.wal_10 is not None:
        lines.append(f"PostgreSQL writes {size(rates.wal_10)}/s of WAL")
    return lines


def _tables(found: Status, since: Callable[[str], str]) -> list[str]:
    counts: dict[str, int] = {}
    for table in found.tables:
        counts[table.state] = counts.get(table.state, 0) + 1
    done = counts.pop("done", 0)
    lines = [f"{done} of {len(found.tables)} complete"] if found.tables else []
    for table in found.tables:
        if table.state != "done":
            why = f", {table.error}" if table.error else ""
            lines.append(f"{table.name}: {table.state}{_rows(table, since)}{why}")
        if table.again is not None:
            lines.append(f"{table.name}: being read again, {reading(table.again)}{since(table.again.started_at)}")
    return lines


def _rows(table: Table, since: Callable[[str], str]) -> str:
    if table.state not in ("running", "waiting"):
        return ""
    of = f" of about {table.estimate:,}" if table.estimate else ""
    return f", {table.rows:,} rows{of}{_pace(table.rate, table.eta)}{since(table.since)}"


def _pace(rate: float | None, eta: float | None) -> str:
    return (f", {rate:,.0f}/s" if rate else "") + (f", {span(eta)} left" if eta is not None else "")


def reading(again: Again) -> str:
    """How far a table is that is read while the stream flows."""
    of = f" of about {again.estimate:,}" if again.estimate else ""
    running = again.state == "running"
    pace = _pace(again.rate, again.eta) if running else ""
    return f"{again.state}, {again.rows:,} rows{of}{pace}"


def _index(index: Index, since: Callable[[str], str]) -> list[str]:
    reader = "no reader"
    if index.reader:
        reader = f"fed by {index.reader}{since(index.reader_since)}"
    elif index.silent is not None:
        reader = f"its reader, {index.silent.who}, not heard of for {span(index.silent.seconds)}"
    dead = f", {index.dead:,} dead letters" if index.dead else ""
    lines = [f"{index.name}: {_standing(index)}, {reader}{dead}"]
    lines += [f"  standing by: {_waiting(one, since)}" for one in index.standby]
    lines += [line for one in index.generations for line in _generation(one, index, since)]
    if index.engine is not None and index.engine.away:
        lines.append(f"  its engine is away{since(index.engine.since)}")
    if index.astray is not None:
        lines.append(f"  {index.astray.why}")
    return lines + [f"  {name}: of the past, nothing feeds it" for name in index.past]


def _standing(index: Index) -> str:
    """How an index stands to those who search it: `live` alone is one whose live generation they see."""
    if any(one.elsewhere for one in index.generations if one.state == "live"):
        return "of another stream"
    if index.astray is None:
        return index.state
    return "gone" if index.astray.gone else "astray"


def _generation(one: Generation, index: Index, since: Callable[[str], str]) -> list[str]:
    if one.state == "live" and index.astray is not None and index.astray.gone:
        return [f"  {one.physical}: gone, its reader was at sequence {one.seq:,}"]
    behind = "consumer is gone" if one.behind is None else f"{one.behind:,} events behind"
    if one.behind and one.behind_seconds is not None:
        behind += f", {span(one.behind_seconds)}"
    if one.done is None:
        return [f"  {one.physical}: {one.state}, at sequence {one.seq:,}, {behind}{_pace(one.rate, None)}"]
    who = f"by {index.builder}" if index.builder else "by nobody now"
    done = f"{one.done:.0%} of the log, {behind}{_pace(one.rate, one.eta)}"
    return [f"  {one.physical}: {one.state} {who}{since(one.since)}", f"    {done}"]


def _minute(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
