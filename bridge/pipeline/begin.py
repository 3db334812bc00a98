"""How a session begins: the stream, the epoch, and a slot with every table's rows where there was none before."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from bridge import log
from bridge.config import Source
from bridge.errors import Contradiction, EventLost
from bridge.failpoints import reach
from bridge.pipeline import recover
from bridge.pipeline.checkpoint import now
from bridge.pipeline.complete import Completeness
from bridge.pipeline.initial import Initial
from bridge.pipeline.recover import Found, Fresh, Resume
from bridge.pipeline.session import Memory, Session
from bridge.source import lsn, slot
from bridge.source.catalog import Relation
from bridge.source.leaving import astray
from bridge.stream import definition, subjects
from bridge.stream.drift import drift
from bridge.stream.publisher import Publisher
from bridge.stream.server import StreamState
from bridge.stream.state import Checkpoint, Conflict, Pair, State, Writer
from bridge.stream.tail import Tail, read_tail
from bridge.waiting import until


async def stream(session: Session, memory: Memory) -> StreamState:
    """The stream as it is, and its configuration checked; without `created` where there is none.

    Raises:
        OtherStream: it is set up for something else, or in a way that keeps no log.
    """
    config = session.config.stream
    if await session.broker.stream(config.name) is None:
        return StreamState(config.name, "", 0, 0, 0, {})
    found = await made(session)
    wanted = subjects.source_subjects(config.prefix, session.config.source.name)
    for one in drift(config, wanted, found.config):
        if one not in memory.drifted:
            memory.drifted.add(one)
            log.get().warning(
                "stream configuration differs",
                stream=config.name,
                field=one.field,
                found=one.found,
                wanted=one.wanted,
                next=one.command,
            )
    return found


async def end(session: Session, memory: Memory) -> tuple[StreamState, Tail]:
    """The stream and its last message at one moment; what a killed predecessor had sent may still be coming in."""
    while True:
        found = await stream(session, memory)
        tail = await read_tail(session.broker, found.name) if found.created else Tail(0, "", 0)
        if tail.seq == found.last_seq:
            return found, tail


async def made(session: Session) -> StreamState:
    """The stream, made if it is not there: only once it is decided that nothing is missing."""
    wanted = subjects.source_subjects(session.config.stream.prefix, session.config.source.name)
    return await definition.ensure_stream(session.broker, session.config.stream, wanted)


def decided(session: Session, memory: Memory, found: Found) -> Fresh | Resume:
    """How to start; a gap is healed by a new slot and a complete snapshot where the configuration says so."""
    try:
        return recover.decide(found)
    except Contradiction as error:
        start = recover.healed(found, error, session.config.source.on_gap)
        log.get().warning(
            "healing a gap", kind=type(error).__name__, why=error.what, by="a new slot and a complete snapshot"
        )
    memory.renew = True
    return start


async def remember(state: State, source: str, error: EventLost) -> None:
    """Keep what was found in the checkpoint: whoever starts next would go on behind it, and nobody would hear of it."""
    key = subjects.checkpoint_key(source)

    async def stored() -> bool:
        found = await state.get(key, Checkpoint)
        if found is not None:
            try:
                await state.put(key, msgspec.structs.replace(found[0], lost=error.what), found[1])
            except Conflict:
                return False  # what an ended session had sent came in late
        return True

    await until(stored, seconds=math.inf)


def warn_about(tables: list[Relation], every: list[Relation], unlogged: list[str], source: Source) -> None:
    for name in astray(source, tables, [relation.root for relation in every]):
        log.get().warning(
            "no such table",
            section=f"[source.table.{name!r}]",
            meaning="no published table is called so: what it chooses counts for none",
            next="correct the name, as written in the catalogue; one that holds a dot or capitals is quoted as in SQL",
        )
    for name in unlogged:
        log.get().warning(
            "table not logged",
            table=name,
            meaning="it is UNLOGGED: neither its rows nor its changes are published",
            next=f"ALTER TABLE {name} SET LOGGED, or leave it out of [source] tables",
        )
    for relation in tables:
        if not relation.key and relation.identity != "f":
            log.get().warning(
                "table without key",
                table=relation.name,
                meaning="its updates and deletes are not in PostgreSQL's log",
                next=f"ALTER TABLE {relation.quoted} REPLICA IDENTITY FULL, or give it a primary key; bridge check"
                " knows what else",
            )


async def epoch(session: Session, memory: Memory, tail: Tail, stream: StreamState) -> None:
    """Take an epoch higher than every one before; the process keeps its own while nothing was taken back."""
    key = subjects.epochs_key(session.config.source.name)
    while True:
        kept = await session.state.get(key, list[Writer])
        writers = kept[0] if kept else []
        # Its own as well: what a broker forgot may include that it was taken.
        highest = max([tail.epoch, memory.epoch, *(w.epoch for w in writers)])
        noted = memory.epoch in [w.epoch for w in writers]
        if noted and memory.epoch == highest and tail.seq >= memory.acked and not memory.renew:
            return
        epoch = highest + 1
        used = [w for w in writers if w.first_seq <= tail.seq]
        old = [w for w in used if w.first_seq <= stream.first_seq][:-1]
        try:
            await session.state.put(
                key, [*(w for w in used if w not in old), Writer(epoch, tail.seq + 1)], kept[1] if kept else 0
            )
        except Conflict:
            continue
        memory.epoch, memory.renew = epoch, False
        return


def _checkpoint(session: Session, found: Found, epoch: int, **changes: Any) -> Checkpoint:
    fields: dict[str, Any] = {
        "phase": "stream",
        "lsn": "0/0",
        "position": "",
        "stream": session.config.stream.name,
        "stream_seq": 0,
        "stream_created": found.stream.created,
        "system_id": found.identity.system_id,
        "timeline": found.identity.timeline,
        "database": session.about.database,
        "slot": session.config.source.slot,
        "consistent_point": "",
        "snapshot_seq": 0,
        "epoch": epoch,
        "at": now(),
    }
    return Checkpoint(**(fields | changes))


async def fresh(
    session: Session,
    memory: Memory,
    found: Found,
    start: Fresh,
    publisher: Publisher,
    revision: int,
    complete: Completeness,
) -> tuple[Resume, tuple[Checkpoint, int]]:
    """A new slot and, where the configuration wants them at once, every table's rows."""
    config = session.config
    whole = config.snapshot.mode == "initial"
    mark = _checkpoint(session, found, publisher.epoch, phase="snapshot", stream_seq=publisher.acked.seq)
    revision = await session.state.put(session.key, mark, revision)
    reach("snapshot.marked")
    if start.why:
        log.get().warning("starting over", why=start.why, slot=config.source.slot, snapshot=whole)
    if start.drop_slot:
        await slot.drop(session.sql, config.source.slot)
        reach("slot.dropped")
    pgconn = session.replication.pgconn
    failover = bool(config.source.failover)
    created = await slot.create(pgconn, session.sql, config.source.slot, failover=failover)
    point = lsn.show(created.consistent_point)
    log.get().info("slot created", slot=config.source.slot, consistent_point=point, snapshot=whole, failover=failover)
    await session.shapes.exported(created)
    reach("slot.created")
    if whole:
        timeline = recover.timeline_of(created.consistent_point, found.identity, found.history)
        with memory.bars() as show:
            initial = Initial(
                config, session.plans, session.announcing, publisher, session.claims, session.state, created, timeline,
                show,
            )  # fmt: skip
            await initial.prepare(session.sql, await session.catalog.published())
            mark = msgspec.structs.replace(mark, consistent_point=point)
            revision = await session.state.put(session.key, mark, revision)
            reach("snapshot.prepared")
            await initial.read()
    await complete.survey(session.broker, fresh=True, snapshot=whole, gap=bool(start.why))
    done = await _from_slot(session, found, publisher, point, revision, whole=whole)
    reach("snapshot.done")
    return Resume(publisher.acked.position), done


async def taken_up(session: Session, found: Found, publisher: Publisher, revision: int) -> tuple[Checkpoint, int]:
    """The checkpoint to stream on from after an initial snapshot that was interrupted."""
    assert found.checkpoint is not None
    return await _from_slot(session, found, publisher, found.checkpoint.consistent_point, revision, whole=True)


async def _from_slot(
    session: Session, found: Found, publisher: Publisher, point: str, revision: int, *, whole: bool
) -> tuple[Checkpoint, int]:
    """Store that all which the slot gives follows the stream's tail, which is a snapshot's end where there is one."""
    tail = publisher.acked
    done = _checkpoint(
        session,
        found,
        publisher.epoch,
        lsn=point,
        position=tail.position,
        stream_seq=tail.seq,
        consistent_point=point,
        snapshot_seq=tail.seq if whole else 0,
        confirmed=Pair(point, tail.seq) if session.config.stream.hold_back else None,
    )
    return done, await session.state.put(session.key, done, revision)


async def adopt(session: Session, found: Found, publisher: Publisher) -> tuple[Checkpoint, int]:
    """A checkpoint for a stream whose state bucket is gone; recovery has found no gap."""
    log.get().warning("checkpoint lost", bucket=session.config.state.bucket, next="made again from the stream's tail")
    point = lsn.show(found.slot.confirmed_flush if found.slot else 0)
    tail = publisher.acked
    fields = {"lsn": point, "stream_seq": tail.seq, "position": found.tail.position}
    new = _checkpoint(session, found, publisher.epoch, confirmed=Pair(point, tail.seq), **fields)
    return new, await session.state.put(session.key, new, 0)


async def resumed(session: Session, found: Found, kept: tuple[Checkpoint, int]) -> tuple[Checkpoint, int]:
    """The checkpoint to go on from; written at once where the stream was cut back to before it."""
    checkpoint = recover.continued(found, kept[0])
    if checkpoint.stream_seq == kept[0].stream_seq:
        return checkpoint, kept[1]
    log.get().warning(
        "stream shortened",
        stream=found.stream.name,
        ends=found.stream.last_seq,
        had=kept[0].stream_seq,
        next="PostgreSQL still has what follows; it is published again",
    )
    return checkpoint, await session.state.put(session.key, checkpoint, kept[1])
