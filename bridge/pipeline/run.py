"""The long-running bridge: it stands by for the source's lease, and under it runs one session after another.

Whatever is away is waited for; what contradicts stops the bridge. The lease has a connection of its own, so that no
backlog of events holds up its renewal, and outlasts the sessions: PostgreSQL's restart is no reason to take over.
"""

from __future__ import annotations

import contextlib
from contextlib import nullcontext

import anyio
import msgspec
import psycopg
from psycopg import _encodings

from bridge import log
from bridge.config import Config, duration
from bridge.embedded import nats
from bridge.errors import Contradiction, EventLost, Fenced, OtherDatabase, TooLarge, Unavailable
from bridge.failpoints import reach
from bridge.pipeline import begin, unfinished, watch
from bridge.pipeline.altering import Altering
from bridge.pipeline.between import Between
from bridge.pipeline.checkpoint import Checkpointer
from bridge.pipeline.complete import Completeness
from bridge.pipeline.feedback import Feedback
from bridge.pipeline.incremental import Incremental
from bridge.pipeline.recover import Found, Fresh, Resume, timeline_of
from bridge.pipeline.rewrites import Rewrites
from bridge.pipeline.session import Bars, Look, Memory, Session, opened
from bridge.pipeline.streaming import Streaming
from bridge.pipeline.unlogged import Unlogged
from bridge.source import connection, lsn, slot, wal2json
from bridge.source.connection import CommandError, CopyReader
from bridge.stream import lease, mode, server
from bridge.stream.compact import Compacting
from bridge.stream.lease import Busy, Hold
from bridge.stream.publisher import Publisher
from bridge.stream.server import StreamState
from bridge.stream.state import Checkpoint, State
from bridge.stream.tail import Tail
from bridge.structured import group
from bridge.waiting import Backoff, forever

DRAIN_SECONDS = 10.0
# Short against a lease's life: when the broker is back, its holder must be, too.
LONGEST_PAUSE = 3.0
LOOK_EVERY = 0.5
LAST_LOOK = 1.0


async def run(
    config: Config, servers: list[str], stop: anyio.Event, bars: Bars = nullcontext, look: Look | None = None
) -> None:
    """Run until `stop` is set: then drain, checkpoint, confirm and return.

    Args:
        bars: entered for the time of an initial snapshot; gives what is then told how far that is, or None.
        look: called beside the first session that has begun; whether it has told what it was to tell, or is to be
            called again by the next.

    Raises:
        Contradiction: a person must decide. ServerRefused: a server lacks what is needed.
    """
    memory = Memory(bars, look)
    async with group() as tasks:

        async def work() -> None:
            backoff = Backoff("bridge", longest=LONGEST_PAUSE)
            try:
                await forever("bridge", lambda b: _held(config, servers, stop, memory, b), backoff=backoff)
            except TooLarge as error:
                raise _remedied(error, config) from None
            tasks.cancel_scope.cancel()

        async def leave() -> None:
            # A session that streams ends by itself; one that waits for a server is simply left.
            await stop.wait()
            with anyio.move_on_after(DRAIN_SECONDS + 5):
                await memory.streaming_ended()
            tasks.cancel_scope.cancel()

        tasks.start_soon(work)
        tasks.start_soon(leave)


def _remedied(error: TooLarge, config: Config) -> TooLarge:
    if not config.stream.embedded:
        return error
    return TooLarge(
        error.what,
        f"copy {nats.shipped_config()} to {config.stream.store_dir}/{nats.CONFIG}, raise max_payload there and start "
        "again; nothing is lost meanwhile",
    )


async def _held(config: Config, servers: list[str], stop: anyio.Event, memory: Memory, backoff: Backoff) -> None:
    """Wait for the lease, and work under it; given back at the end, but kept where something is only away."""
    async with server.connect(config.stream, servers, name=f"bridge {config.source.name} lease") as broker:
        state = await State.open(broker, config.state.bucket, config.stream.replicas)
        hold = await _taken(config, state, memory)
        try:
            async with group() as tasks:
                tasks.start_soon(hold.keep)
                tasks.start_soon(broker.watch)
                await forever(
                    "bridge", lambda b: _healing(config, servers, state, hold, stop, memory, b), backoff=backoff
                )
                tasks.cancel_scope.cancel()
        except Unavailable:
            raise
        except BaseException:
            await hold.release()
            raise
        await hold.release()


async def _taken(config: Config, state: State, memory: Memory) -> Hold:
    """The lease `lease.bridge.<source>`. Who has had it and finds another in its place has been replaced."""
    key = lease.lease_key("bridge", config.source.name)
    # The embedded server is this process's own: nobody else can be at work there.
    stale = 0.0 if config.stream.embedded else lease.STALE
    hold: Hold | None = None
    try:
        async with group() as tasks:
            if not memory.held:
                tasks.start_soon(memory.standing.look, config, state)
            hold = await lease.take(
                state, key, memory.holder, patient=not memory.held, stale=stale, why=lambda: memory.standing.why
            )
            tasks.cancel_scope.cancel()
    except OtherDatabase:
        if hold is not None:
            await hold.release()
        raise
    except Busy as error:
        raise Fenced(
            f"this bridge was away for too long and has been replaced: {error.what}",
            "it has stopped; let the other one work, or start this one again to stand by for it",
        ) from None
    assert hold is not None
    memory.held = True
    return hold


async def _healing(
    config: Config, servers: list[str], state: State, hold: Hold, stop: anyio.Event, memory: Memory, backoff: Backoff
) -> None:
    """A session; a gap that opens while it streams is left to the next one's beginning, where it may be healed."""
    try:
        await _session(config, servers, hold, stop, memory, backoff)
    except Contradiction as error:
        if isinstance(error, EventLost):
            await begin.remember(state, config.source.name, error)
        if not error.heals or config.source.on_gap != "resnapshot":
            raise
        raise Unavailable(error.what, "looking at it again from the start") from None


async def _session(
    config: Config, servers: list[str], hold: Hold, stop: anyio.Event, memory: Memory, backoff: Backoff
) -> None:
    """From recovery to the moment that something breaks or `stop` is set."""
    async with opened(config, servers, hold) as (session, sentinel), group() as tasks:

        async def server_stops() -> None:
            await sentinel.gone.wait()
            raise sentinel.why

        tasks.start_soon(session.broker.watch)
        tasks.start_soon(server_stops)
        identity = await slot.identify(session.replication.pgconn)
        history = await slot.timeline_of(session.replication.pgconn, identity.timeline)
        kept = await session.state.get(session.key, Checkpoint)
        stream, tail = await begin.end(session, memory)
        rest = await unfinished.left(session, kept[0] if kept else None, tail)
        found = Found(
            config.source.slot,
            session.about.database,
            identity,
            history,
            await slot.find(session.sql, config.source.slot),
            kept[0] if kept else None,
            stream,
            tail,
            stays=rest is not None,
        )
        start = begin.decided(session, memory, found)
        reach("start.decided")
        # A configuration that cannot work is refused before anything is made.
        known = None if isinstance(start, Fresh) else session.plans.recorded.of
        tables = await session.catalog.published(known)
        # Asked for only where a section may be of a table that has no partition yet.
        every = await session.catalog.all() if config.source.table else []
        session.plans.refuse(tables)
        session.plans.refuse_empty(tables, every)
        if not stream.created:
            stream = await begin.made(session)
            found = found._replace(stream=stream)
        begin.warn_about(tables, every, await session.catalog.unlogged(), config.source)
        if memory.look is not None:
            tasks.start_soon(_looked, memory, memory.look)
        await begin.epoch(session, memory, tail, stream)
        reach("epoch.taken")
        await hold.note(epoch=memory.epoch)
        publisher = _publisher(session, stream, memory.epoch, tail)
        await publisher.open()
        tasks.start_soon(publisher.watch)
        tasks.start_soon(session.claims.run, lambda: publisher.acked.position)
        await session.announcing.begin(tail.position if isinstance(start, Fresh) else start.after)
        await session.shapes.load()
        complete = Completeness(session, publisher, memory.tables)
        if isinstance(start, Resume) and found.slot is not None:
            await slot.alter(session.replication.pgconn, found.slot, config.source.failover)
        if isinstance(start, Fresh):
            start, kept = await begin.fresh(session, memory, found, start, publisher, kept[1] if kept else 0, complete)
        elif kept is not None and kept[0].phase == "snapshot":
            await unfinished.hand_over(session, rest or [])
            await complete.survey(session.broker)
            kept = await begin.taken_up(session, found, publisher, kept[1])
        else:
            # The checkpoint comes last: it is what tells that all this was done.
            await complete.survey(session.broker, adopted=kept is None)
            kept = await (begin.resumed(session, found, kept) if kept else begin.adopt(session, found, publisher))
        session.plans.on_new = complete.met
        mine = msgspec.structs.replace(kept[0], epoch=publisher.epoch, timeline=identity.timeline)
        kept = (mine, kept[1])
        await _stream_on(session, found, start, publisher, kept, complete, stop, memory, backoff)
        tasks.cancel_scope.cancel()


async def _looked(memory: Memory, look: Look) -> None:
    if await look():
        memory.look = None


def _publisher(session: Session, state: StreamState, epoch: int, tail: Tail) -> Publisher:
    stream = session.config.stream
    atomic, replicas = bool(state.config.get("allow_atomic")), int(state.config.get("num_replicas", 1))
    publishing, _ = mode.choose(stream.publish, stream.sync, stream.mode, atomic, replicas=replicas)
    made = (
        Compacting(session.broker, stream.name, epoch, tail, tombstone_ttl=duration(stream.tombstone_ttl))
        if stream.compact
        else Publisher(session.broker, stream.name, epoch, tail, publishing)
    )
    made.replicated = replicas > 1
    return made


async def _stream_on(
    session: Session,
    found: Found,
    start: Resume,
    publisher: Publisher,
    kept: tuple[Checkpoint, int],
    complete: Completeness,
    stop: anyio.Event,
    memory: Memory,
    backoff: Backoff,
) -> None:
    """START_REPLICATION, and on until something breaks or `stop` is set."""
    config, pgconn = session.config, session.replication.pgconn
    await _start(session)
    reach("replication.started")
    reader = CopyReader(pgconn, notices=session.replication.add_notice_handler)
    feedback = Feedback(pgconn)
    between = Between(
        publisher, session.claims, lambda end: timeline_of(end, found.identity, found.history), start.after,
        session.announcing,
    )  # fmt: skip
    altering = Altering()
    session.plans.past.known(kept[0].altered)
    streaming = Streaming(
        config, reader, feedback, publisher, session.claims, session.plans, found.identity, found.history, start.after,
        between, altering, Unlogged(config.source, kept[0].missed, lsn.parse(kept[0].lsn)),
        session.announcing,
        _encodings.pg2pyenc(session.about.encoding.encode()), memory.doubted,
    )  # fmt: skip

    def confirm(reached: int) -> int:
        safe = altering.safe(between.delivered.safe(reached))
        feedback.confirm(safe)
        return safe

    checkpointer = Checkpointer(session.state, session.key, *kept, streaming.progress, confirm, config.stream.hold_back)
    incremental = Incremental(session, publisher, between, streaming)
    rewrites = Rewrites(session, publisher, between, streaming, complete, altering)
    backoff.over()
    log.get().info(
        "streaming",
        slot=config.source.slot,
        stream=config.stream.name,
        epoch=memory.epoch,
        publish=publisher.publishing,
        after=start.after or "begin",
    )
    try:
        with memory.streams():
            async with group() as tasks:
                tasks.start_soon(feedback.run)
                tasks.start_soon(checkpointer.run)
                tasks.start_soon(streaming.run, pgconn)
                tasks.start_soon(watch.hearing, reader, pgconn, feedback)
                tasks.start_soon(watch.publishing, publisher)
                tasks.start_soon(_looking, session, between)
                tasks.start_soon(incremental.run)
                tasks.start_soon(rewrites.run)
                await stop.wait()
                with anyio.move_on_after(LAST_LOOK):
                    between.delivered.seen(await session.catalog.snapshot())
                    await rewrites.settled()
                tasks.cancel_scope.cancel()
            await _drain(publisher, checkpointer, streaming)
    finally:
        memory.acked = publisher.acked.seq
        feedback.close()
        reader.close()
        with contextlib.suppress(psycopg.Error):
            pgconn.put_copy_end()
            pgconn.flush()


async def _looking(session: Session, between: Between) -> None:
    """See once a second which transactions are to be seen: PostgreSQL may forget no other."""
    while True:
        await anyio.sleep(LOOK_EVERY)
        if between.delivered.pending():
            between.delivered.seen(await session.catalog.snapshot())


async def _start(session: Session) -> None:
    # No add-tables: the plugin goes by a partition's own name, and would in silence leave out those of a published
    # table that lie in another schema.
    options = wal2json.OPTIONS
    pgconn, name = session.replication.pgconn, session.config.source.slot
    try:
        await slot.start(pgconn, name, options | {wal2json.NUMERIC_AS_STRING: "1"})
        session.plans.exact_numbers = True
        return
    except CommandError as error:
        if wal2json.NUMERIC_AS_STRING not in error.message:
            raise connection.server_error(error.sqlstate, error.message, "START_REPLICATION") from None
    try:
        await slot.start(pgconn, name, options)
    except CommandError as error:
        raise connection.server_error(error.sqlstate, error.message, "START_REPLICATION") from None


async def _drain(publisher: Publisher, checkpointer: Checkpointer, streaming: Streaming) -> None:
    """Give what is on its way a last chance to arrive; what does not is sent again at the next start."""
    with anyio.move_on_after(DRAIN_SECONDS) as scope:
        publisher.drop_unfinished()
        await publisher.drain()
        reach("drain.done")
        await checkpointer.save(final=True)
    log.get().info(
        "stopped", published=streaming.published, seq=publisher.acked.seq, drained=not scope.cancelled_caught
    )
