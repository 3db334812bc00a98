"""What follows from a status: is everything in step, can an index be rebuilt. Pure.

`judge` draws the conclusions: a `problem` is something that an operator must see to, a `note` what he should know. A
status without problems is "in step".
"""

from __future__ import annotations

from shlex import quote as typed
from typing import Any

import msgspec

from bridge.errors import BridgeError, Gap, Unavailable
from bridge.operate.status.parts import NATS, POSTGRES, Finding, Index, Slot, Status, Stream, Table
from bridge.source import lsn
from bridge.stream import mode
from bridge.stream.reach import complete_from
from bridge.stream.state import Again, SnapshotStatus

LAG_SECONDS = 30.0
LAG_BYTES = 16 << 20
BEHIND = 10_000
BACK = "after an outage of NATS it is back within seconds; if it is not, see its log, or start one"
NEARLY_FULL = 0.95
# A batch of the publisher's must find room as a whole.
BATCH_BYTES, BATCH_MESSAGES = 2 << 20, 1000
LEASE_SECONDS = 15.0
SOON = 3600.0


def table(name: str, kept: SnapshotStatus, stream: Stream | None) -> Table:
    """A table as the state bucket and the stream have it."""
    start, why = 0, ""
    if stream is not None and stream.exists:
        try:
            start = complete_from(kept, 0 if stream.compacted else stream.first_seq, stream.name, name)
        except (Gap, Unavailable) as error:
            why = error.what
    reads = kept.state == "running"
    rate, eta = (kept.rate, kept.eta) if reads else (0.0, None)
    since = kept.started_at if reads else ""
    return Table(name, kept.state, kept.rows, kept.estimate, start, why, kept.again, kept.error, rate, eta, since)


def judge(found: Status) -> Status:
    """The status with its conclusions."""
    publishing, why, problems = _publishing(found)
    if _is_lost(found.slot):
        problems = [*_slot(found), *problems]
    problems += [
        Finding("problem", f"{server} cannot be asked: {what}", found.remedies.get(server, ""))
        for server, what in found.away.items()
    ]
    problems += [*_process(found), *([] if _is_lost(found.slot) else _slot(found)), *_stream(found)]
    problems += [*_together(found), *_tables(found), *_missed(found), *_indexes(found)]
    return msgspec.structs.replace(
        found,
        publishing=publishing,
        publishing_why=why,
        durability=durability(found.settings.sync, found.settings.hold_back),
        rebuild=_rebuild(found),
        findings=sorted(problems, key=lambda finding: finding.level == "note"),
    )


def _publishing(found: Status) -> tuple[str, str, list[Finding]]:
    settings, stream = found.settings, found.stream
    there = stream is not None and stream.exists
    atomic, replicas = (stream.atomic, stream.replicas) if stream is not None and there else (True, 1)
    try:
        return *mode.choose(settings.publish, settings.sync, settings.mode, atomic, replicas=replicas), []
    except BridgeError as error:
        return "none", error.what, [Finding("problem", error.what, error.remedy)]


def durability(sync: str, held: float) -> str:
    """What an ack stands for.

    Args:
        sync: `[stream] sync`.
        held: for how many seconds an ack can be taken back.
    """
    if sync == "always":
        return "the server syncs before it acks: PostgreSQL may forget a change as soon as the checkpoint has it"
    if sync == "replicated":
        return (
            "an ack stands for a majority of the replicas, which need not have synced: a power failure of all of them "
            "at once can take acked changes back"
        )
    return (
        f"an ack can be taken back by a power failure for {held:g} s: PostgreSQL keeps the WAL that much longer, so "
        "that nothing is lost"
    )


def _rebuild(found: Status) -> str:
    if found.stream is None:
        return "unknown: NATS is away"
    if not found.stream.exists:
        return "not possible: there is no stream"
    short = [table for table in found.tables if not table.rebuild_from]
    if not found.tables:
        return "not possible: no table has been read yet"
    if not short:
        return f"possible for every table ({len(found.tables)})"
    one = f"{short[0].name}: {short[0].why}"
    if len(short) == len(found.tables):
        return f"not possible: {one}"
    return f"possible for {len(found.tables) - len(short)} of {len(found.tables)} tables, not for {one}"


def _process(found: Status) -> list[Finding]:
    return [*_works(found), *_standbys(found)]


def _standbys(found: Status) -> list[Finding]:
    """Those who would not be there when they are needed."""
    return [
        Finding("problem", f"the standby ({one.who}) could not take over: {one.why}", "its log says what mends it")
        for one in found.process.standby
        if one.why
    ]


def _works(found: Status) -> list[Finding]:
    if found.process.state == "stopped" and _is_lost(found.slot):
        # It would refuse: what is to be done is said of the slot.
        return [Finding("problem", "no bridge is running")]
    if found.process.state == "stopped":
        kept = ""
        if found.slot is not None and found.slot.exists:
            kept = f"; PostgreSQL keeps the WAL that it still needs ({size(found.slot.retained)} now)"
        silent = found.process.silent
        if silent is None:
            return [Finding("problem", f"no bridge is running{kept}", "start it: `bridge run`")]
        what = f"the bridge ({silent.who}) has not been heard of for {span(silent.seconds)}{kept}"
        return [Finding("problem", what, f"{BACK}: `bridge run`")]
    reading = any(one.state in ("waiting", "running") for one in found.tables)
    if found.process.state == "running" and not {POSTGRES, NATS} & found.away.keys() and not reading:
        return [Finding("problem", f"the bridge ({found.process.who}) runs, but does not read the slot", "see its log")]
    return []


def _is_lost(slot: Slot | None) -> bool:
    return slot is not None and slot.exists and bool(slot.wal_status == "lost" or slot.reason)


def _slot(found: Status) -> list[Finding]:
    slot = found.slot
    if slot is None:
        return []
    if not slot.exists:
        what = f"PostgreSQL has no slot {slot.name}"
        return [Finding("problem", what, "`bridge run` makes it, or says why it must not")]
    if _is_lost(slot):
        reason = f" ({slot.reason})" if slot.reason else ""
        what = f"PostgreSQL removed WAL that the slot {slot.name} still needed{reason}"
        return [Finding("problem", what, "start anew with `bridge drop --stream --state` and `bridge run`")]
    if slot.wal_status == "unreserved":
        what = f"PostgreSQL is about to remove WAL that the slot {slot.name} needs ({size(slot.retained)})"
        return [Finding("problem", what, "get the bridge going, or raise max_slot_wal_keep_size at once")]
    return _endangered(slot, found.process.state == "streaming")


def _endangered(slot: Slot, streaming: bool) -> list[Finding]:
    """What takes the slot away in a while where nobody reads it."""
    if streaming:
        return []
    out = []
    if slot.lost_in is not None and slot.lost_in < SOON:
        what = f"PostgreSQL will remove WAL that the slot {slot.name} needs in about {span(slot.lost_in)}"
        out.append(Finding("problem", what, "get the bridge going, or raise max_slot_wal_keep_size"))
    if slot.idle_timeout and not slot.active:
        what = f"PostgreSQL gives the slot {slot.name} up once nobody has read it for {span(slot.idle_timeout)}"
        out.append(Finding("problem", what, "get the bridge going, or set idle_replication_slot_timeout = 0"))
    return out


def _stream(found: Status) -> list[Finding]:
    stream = found.stream
    if stream is None:
        return []
    if not stream.exists:
        return [
            Finding("problem", f"there is no stream {stream.name}", "`bridge run` makes it, or says why it must not")
        ]
    out = []
    if not stream.leader and stream.replicas > 1:
        out.append(Finding("problem", f"the stream {stream.name} has no leader", "bring its servers up"))
    if stream.behind:
        what = f"replicas of {stream.name} are offline or behind: {', '.join(stream.behind)}"
        out.append(Finding("problem", what, "see to these servers; another failure would stop the stream"))
    filled = []
    if _is_full(stream.bytes, stream.max_bytes, BATCH_BYTES):
        filled.append(f"{size(stream.bytes)} of max_bytes {size(stream.max_bytes)}")
    if _is_full(stream.messages, stream.max_msgs, BATCH_MESSAGES):
        filled.append(f"{stream.messages:,} of max_msgs {stream.max_msgs:,}")
    if filled and stream.discard == "new":
        what = f"the stream is full, or nearly: {', '.join(filled)}, and discard is new"
        next_ = f"give it room with `nats stream edit {stream.name}`; the bridge goes on by itself"
        out.append(Finding("problem", what, next_))
    if _is_full(stream.used, stream.allowed, BATCH_BYTES):
        what = f"the NATS account is full, or nearly: {size(stream.used)} of {size(stream.allowed)}"
        out.append(Finding("problem", what, "raise the account's limit, or max_file_store, or remove other streams"))
    return out


def _is_full(used: int, limit: int, batch: int) -> bool:
    """Whether a limit (0: none) is reached, or so near that a whole batch may not fit."""
    return bool(limit) and (used > limit * NEARLY_FULL or limit - used < batch)


def _together(found: Status) -> list[Finding]:
    """What slot, checkpoint and stream say of one another."""
    kept, stream, slot, out = found.checkpoint, found.stream, found.slot, list[Finding]()
    restart = "`bridge run` says what contradicts and what mends it"
    if kept is not None and stream is not None and stream.exists:
        if kept.stream_created != stream.created:
            out.append(
                Finding("problem", f"the stream {stream.name} was made again since the last checkpoint", restart)
            )
        elif kept.stream_seq > stream.last_seq:
            what = f"the checkpoint is at sequence {kept.stream_seq}, the stream ends at {stream.last_seq}"
            out.append(Finding("problem", what, restart))
        if found.settings.mode == "log" and (holes := _holes(stream)):
            what = f"{holes:,} messages are missing in the middle of the stream {stream.name}"
            out.append(Finding("problem", what, restart))
    confirmed = slot.confirmed_flush if slot is not None and slot.exists else ""
    if kept is not None and kept.phase == "stream" and confirmed and lsn.parse(confirmed) > lsn.parse(kept.lsn):
        what = f"the slot was confirmed up to {confirmed}, the checkpoint is at {kept.lsn}"
        out.append(Finding("problem", what, f"somebody else advanced the slot: {restart}"))
    lag = found.lag
    if lag is not None and lag.bytes > LAG_BYTES and (lag.seconds is None or lag.seconds > LAG_SECONDS):
        behind = f" and {lag.seconds:.0f} s" if lag.seconds is not None else ""
        out.append(Finding("problem", f"the stream is {size(lag.bytes)}{behind} behind PostgreSQL"))
    return out


def _holes(stream: Stream) -> int:
    return stream.last_seq - stream.first_seq + 1 - stream.messages if stream.messages else 0


def _tables(found: Status) -> list[Finding]:
    out = []
    for one in found.tables:
        if one.again is not None and one.again.state in ("failed", "waiting", "paused"):
            out.append(_reading(one, one.again))
        if one.state == "failed":
            out.append(Finding("problem", f"the snapshot of {one.name} has failed", "see the bridge's log"))
        elif one.state in ("waiting", "running"):
            out.append(Finding("problem", f"the snapshot of {one.name} is {one.state}", "wait for it to be done"))
        elif one.why:
            out.append(Finding("note", f"an index of {one.name} cannot be rebuilt: {one.why}"))
        elif one.state == "incomplete":
            out.append(_changed(one))
    return out


def _reading(one: Table, again: Again) -> Finding:
    """A reading that rests. One of some rows is the matter of whoever asked for it: the table is as it was."""
    why = f": {again.why}" if again.why else ""
    what, name = (
        f"the reading of {'a part of ' if again.where else ''}{one.name} is {again.state}{why}",
        typed(one.name),
    )
    if again.state == "waiting":
        return Finding("note" if again.where else "problem", what, "it goes on by itself")
    remedy = f"`bridge snapshot {name} --resume`, or --cancel to leave the table as the log has it"
    if again.state == "failed" and again.where:
        remedy = f"`bridge snapshot {name} --cancel` ends it; or ask anew with another --where"
    return Finding("note" if again.where or again.state == "paused" else "problem", what, remedy)


def _missed(found: Status) -> list[Finding]:
    """Changes that PostgreSQL has not logged, of tables that were not read again since."""
    since = {one.name: one.rebuild_from for one in found.tables}
    kept = found.checkpoint.missed if found.checkpoint is not None else {}
    remedy = (
        "bridge snapshot {0} reads it again, where it has a key; for changes to come, if it has no identity yet: "
        "ALTER TABLE {0} ADD PRIMARY KEY (…), or REPLICA IDENTITY FULL"
    )
    return [
        Finding(
            "note",
            f"PostgreSQL has not logged {missed.changes:,} updates and deletes of {name}: it had no replica identity",
            remedy.format(name),
        )
        for name, missed in kept.items()
        if since.get(name, 0) < missed.seq
    ]


def _changed(one: Table) -> Finding:
    """A table whose rows DDL has changed: the stream holds it as it was."""
    what = f"{one.name} is not in the stream as it is: {one.error}"
    if one.again is None or one.again.where:
        return Finding("problem", what, f"bridge snapshot {typed(one.name)}")
    return Finding("note", what, "it is being read again" if one.again.under_way else "")


def _indexes(found: Status) -> list[Finding]:
    out = []
    for one in found.indexes:
        again = f"bridge reindex {one.name}"
        elsewhere = [g.physical for g in one.generations if g.state == "live" and g.elsewhere]
        if elsewhere:
            # A reader would end with the same.
            what = f"{elsewhere[0]} was built from another stream than today's, and is as it was then"
            out.append(Finding("problem", what, f"build it anew: {again}"))
        else:
            out += _fed(one)
        if one.astray is not None:
            out.append(Finding("problem", one.astray.why, one.astray.remedy))
        if one.changed:
            keys = ", ".join(one.changed)
            out.append(Finding("note", f"the configuration of index {one.name} has changed ({keys})", again))
        if one.dead:
            out.append(Finding("note", f"index {one.name} has {one.dead:,} dead letters", f"bridge dlq {one.name}"))
    return out


def _fed(one: Index) -> list[Finding]:
    """Whether an index is kept up to date."""
    out, reader = [], f"bridge index {one.name}"
    unsure = "`bridge check` says whether its tables are published"
    if not one.generation and one.builder:
        out.append(Finding("problem", f"index {one.name} is being built for the first time", f"wait for it; {unsure}"))
    elif not one.generation:
        out.append(Finding("problem", f"index {one.name} has not been built yet", f"{reader}; {unsure}"))
    elif one.silent is not None and not one.reader:
        out.append(Finding("problem", unfed(one), f"{BACK}: {reader}"))
    elif not one.reader:
        out.append(Finding("problem", unfed(one), f"start it: {reader}"))
    for generation in one.generations:
        if generation.state == "live" and generation.behind is None:
            out.append(Finding("problem", f"the consumer of {generation.physical} is gone", reader))
        elif generation.state == "live" and (generation.behind or 0) > BEHIND:
            out.append(Finding("problem", f"{generation.physical} is {generation.behind:,} events behind"))
    return out


def unfed(one: Index) -> str:
    """Why an index that has no known reader is not known to be fed."""
    if one.silent is None:
        return f"no reader feeds index {one.name}"
    return f"the reader of index {one.name} ({one.silent.who}) has not been heard of for {span(one.silent.seconds)}"


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1,024."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TB"


def span(seconds: float) -> str:
    """A duration for people: its two largest units."""
    units: list[Any] = [("d", 86400), ("h", 3600), ("min", 60)]
    for index, (unit, length) in enumerate(units):
        if seconds >= length:
            smaller, part = units[index + 1] if index + 1 < len(units) else ("s", 1)
            rest = int(seconds % length // part)
            return f"{int(seconds // length)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.1f} s"
