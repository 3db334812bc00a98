"""The long-running bridge: one session after another, each from recovery to the moment that something breaks.

A session holds one connection to NATS, one replication connection, one for the catalogue and one idle one that notices
a server which wants to stop. Whatever is away is waited for; what contradicts stops the bridge.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import psycopg
from psycopg import _encodings

from bridge import log
from bridge.config import Config
from bridge.embedded import nats
from bridge.errors import OtherStream, TooLarge, Unavailable
from bridge.failpoints import reach
from bridge.pipeline import recover
from bridge.pipeline.checkpoint import Checkpointer, now
from bridge.pipeline.complete import Completeness
from bridge.pipeline.initial import Initial
from bridge.pipeline.plans import Plans
from bridge.pipeline.recover import Found, Fresh, Resume
from bridge.pipeline.streaming import Feedback, Streaming
from bridge.source import connection, lsn, slot, wal2json
from bridge.source.catalog import Catalog
from bridge.source.connection import CommandError, CopyReader
from bridge.source.slot import Server
from bridge.stream import mode, server, subjects
from bridge.stream.claims import Claims
from bridge.stream.publisher import Publisher, Tail, read_tail
from bridge.stream.server import Broker, StreamState
from bridge.stream.state import Checkpoint, Conflict, State, Writer
from bridge.structured import group
from bridge.waiting import Backoff, forever

DRAIN_SECONDS = 10.0


async def run(config: Config, servers: list[str], stop: anyio.Event) -> None:
    """Run until `stop` is set: then drain, checkpoint, confirm and return.

    Raises:
        Contradiction: a person must decide. ServerRefused: a server lacks what is needed.
    """
    memory = _Memory()
    async with group() as tasks:

        async def work() -> None:
            try:
                await forever("bridge", lambda backoff: _session(config, servers, stop, memory, backoff))
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


class _Memory:
    """What one process keeps from session to session: its epoch, the oids of the tables that it has seen, and whether
    it streams just now."""

    def __init__(self) -> None:
        self.epoch = 0
        self.tables: set[int] = set()
        self.acked = 0
        self._ended: anyio.Event | None = None

    @contextlib.contextmanager
    def streams(self) -> Any:
        self._ended = anyio.Event()
        try:
            yield
        finally:
            self._ended.set()
            self._ended = None

    async def streaming_ended(self) -> None:
        if self._ended is not None:
            await self._ended.wait()


class _Session:
    """The open connections of one session, and what they say."""

    def __init__(
        self,
        config: Config,
        broker: Broker,
        state: State,
        sql: psycopg.AsyncConnection[Any],
        replication: psycopg.AsyncConnection[Any],
        about: Server,
    ) -> None:
        self.config = config
        self.broker = broker
        self.state = state
        self.sql = sql
        self.replication = replication
        self.about = about
        self.catalog = Catalog(sql, config.source)
        self.plans = Plans(config, self.catalog, state)
        self.claims = Claims(broker, config.stream.name, config.stream.replicas)
        self.key = subjects.checkpoint_key(config.source.name)


@contextlib.asynccontextmanager
async def _open(config: Config, servers: list[str]) -> AsyncIterator[tuple[_Session, Any]]:
    """All connections of a session; the broker first, so that PostgreSQL is not bothered while it is away."""
    async with (
        server.connect(config.stream, servers, name=f"bridge {config.source.name}") as broker,
        connection.sentinel(config.source.dsn) as stopping,
        connection.connect(config.source.dsn) as sql,
    ):
        about = await slot.inspect(sql)
        await _alone(sql, config.source.slot)
        async with connection.connect(config.source.dsn, replication=True) as replication:
            state = await State.open(broker, config.state.bucket, config.stream.replicas)
            yield _Session(config, broker, state, sql, replication, about), stopping


async def _alone(sql: psycopg.AsyncConnection[Any], name: str) -> None:
    """Hold the slot's advisory lock for as long as the session lasts: a second bridge waits here."""
    cursor = await sql.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", (f"bridge:{name}",))
    row = await cursor.fetchone()
    if row is None or not row[0]:
        raise Unavailable(f"another bridge works with the slot {name}", "waiting to take over when it stops")


async def _session(config: Config, servers: list[str], stop: anyio.Event, memory: _Memory, backoff: Backoff) -> None:
    async with _open(config, servers) as (session, stopping), group() as tasks:

        async def server_stops() -> None:
            await stopping.wait()
            raise Unavailable("PostgreSQL is stopping", "waiting for it to come back")

        tasks.start_soon(session.broker.watch)
        tasks.start_soon(server_stops)
        identity = await slot.identify(session.replication.pgconn)
        history = await slot.timeline_of(session.replication.pgconn, identity.timeline)
        kept = await session.state.get(session.key, Checkpoint)
        stream, tail = await _end(session, kept[0] if kept else None)
        found = Found(
            config.source.slot,
            session.about.database,
            identity,
            history,
            await slot.find(session.sql, config.source.slot),
            kept[0] if kept else None,
            stream,
            tail,
        )
        start = recover.decide(found)
        reach("start.decided")
        tables = await session.catalog.published()
        _warn_about(tables)
        await _epoch(session, memory, tail, stream)
        reach("epoch.taken")
        publishing, _ = mode.choose(
            config.stream.publish, config.stream.sync, config.stream.mode, bool(stream.config.get("allow_atomic"))
        )
        publisher = Publisher(session.broker, config.stream.name, memory.epoch, tail, publishing)
        await publisher.open()
        tasks.start_soon(publisher.watch)
        tasks.start_soon(session.claims.run, lambda: publisher.acked.position)
        complete = Completeness(config, session.catalog, session.plans, session.state, publisher, memory.tables)
        if isinstance(start, Fresh):
            start, kept = await _fresh(session, found, start, publisher, kept[1] if kept else 0, complete)
        else:
            # The checkpoint comes last: it is what tells that all this was done.
            await complete.survey(session.broker, adopted=kept is None)
            kept = kept or await _adopt(session, found, publisher)
        session.plans.on_new = complete.met
        mine = msgspec.structs.replace(kept[0], epoch=publisher.epoch, timeline=identity.timeline)
        kept = (mine, kept[1])
        await _stream_on(session, found, start, publisher, kept, stop, memory, backoff)
        tasks.cancel_scope.cancel()


async def _stream(session: _Session, checkpoint: Checkpoint | None) -> StreamState:
    """The stream; made only where no checkpoint says that it has been there before."""
    name = session.config.stream.name
    if checkpoint is not None and await session.broker.stream(name) is None:
        raise OtherStream(
            f"the stream {name} is gone; the checkpoint {session.key} goes on from sequence {checkpoint.stream_seq}",
            f"restore it from a backup (`nats stream restore`); {recover.START_ANEW}",
        )
    wanted = subjects.source_subjects(session.config.stream.prefix, session.config.source.name)
    return await server.ensure_stream(session.broker, session.config.stream, wanted)


async def _end(session: _Session, checkpoint: Checkpoint | None) -> tuple[StreamState, Tail]:
    """The stream and its last message at one moment; what a killed predecessor had sent may still be coming in."""
    while True:
        stream = await _stream(session, checkpoint)
        tail = await read_tail(session.broker, stream.name)
        if tail.seq == stream.last_seq:
            return stream, tail


def _warn_about(tables: list[Any]) -> None:
    for relation in tables:
        if not relation.key and relation.identity != "f":
            log.get().warning(
                "table without key",
                table=relation.name,
                meaning="its updates and deletes are not in PostgreSQL's log",
                next=f"ALTER TABLE {relation.name} REPLICA IDENTITY FULL, or give it a primary key",
            )


async def _epoch(session: _Session, memory: _Memory, tail: Tail, stream: StreamState) -> None:
    """Take an epoch higher than every one before; the process keeps its own while nothing was taken back."""
    key = subjects.epochs_key(session.config.source.name)
    while True:
        kept = await session.state.get(key, list[Writer])
        writers = kept[0] if kept else []
        # Its own as well: what a broker forgot may include that it was taken.
        highest = max([tail.epoch, memory.epoch, *(w.epoch for w in writers)])
        noted = memory.epoch in [w.epoch for w in writers]
        if noted and memory.epoch == highest and tail.seq >= memory.acked:
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
        memory.epoch = epoch
        return


def _checkpoint(session: _Session, found: Found, epoch: int, **changes: Any) -> Checkpoint:
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


async def _fresh(
    session: _Session, found: Found, start: Fresh, publisher: Publisher, revision: int, complete: Completeness
) -> tuple[Resume, tuple[Checkpoint, int]]:
    """A new slot and, unless the configuration says never, every table's rows."""
    config = session.config
    whole = config.snapshot.mode == "initial"
    mark = _checkpoint(session, found, publisher.epoch, phase="snapshot", stream_seq=publisher.acked.seq)
    revision = await session.state.put(session.key, mark, revision)
    reach("snapshot.marked")
    if start.drop_slot:
        await slot.drop(session.sql, config.source.slot)
        reach("slot.dropped")
    pgconn = session.replication.pgconn
    created = await slot.create(pgconn, session.sql, config.source.slot)
    point = lsn.show(created.consistent_point)
    log.get().info("slot created", slot=config.source.slot, consistent_point=point, snapshot=whole)
    reach("slot.created")
    if whole:
        timeline = recover.timeline_of(created.consistent_point, found.identity, found.history)
        initial = Initial(config, session.catalog, session.plans, publisher, session.claims, session.state, timeline)
        await initial.run(created, await session.catalog.published())
    await complete.survey(session.broker, fresh=True, snapshot=whole)
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
    )
    revision = await session.state.put(session.key, done, revision)
    reach("snapshot.done")
    return Resume(tail.position), (done, revision)


async def _adopt(session: _Session, found: Found, publisher: Publisher) -> tuple[Checkpoint, int]:
    """A checkpoint for a stream whose state bucket is gone; recovery has found no gap."""
    log.get().warning("checkpoint lost", bucket=session.config.state.bucket, next="made again from the stream's tail")
    made = _checkpoint(session, found, publisher.epoch, stream_seq=publisher.acked.seq, position=found.tail.position)
    return made, await session.state.put(session.key, made, 0)


async def _stream_on(
    session: _Session,
    found: Found,
    start: Resume,
    publisher: Publisher,
    kept: tuple[Checkpoint, int],
    stop: anyio.Event,
    memory: _Memory,
    backoff: Backoff,
) -> None:
    """START_REPLICATION, and on until something breaks or `stop` is set."""
    config, pgconn = session.config, session.replication.pgconn
    await _start(session)
    reach("replication.started")
    reader = CopyReader(pgconn, notices=session.replication.add_notice_handler)
    feedback = Feedback(pgconn)
    streaming = Streaming(
        config, reader, feedback, publisher, session.claims, session.plans, found.identity, found.history, start.after,
        _encodings.pg2pyenc(session.about.encoding.encode()),
    )  # fmt: skip
    checkpointer = Checkpointer(
        session.state, session.key, *kept, streaming.progress, feedback.confirm, config.stream.hold_back
    )
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
                await stop.wait()
                tasks.cancel_scope.cancel()
            await _drain(publisher, checkpointer, streaming)
    finally:
        memory.acked = publisher.acked.seq
        feedback.close()
        reader.close()
        with contextlib.suppress(psycopg.Error):
            pgconn.put_copy_end()
            pgconn.flush()


async def _start(session: _Session) -> None:
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
        await publisher.drain()
        reach("drain.done")
        await checkpointer.save(final=True)
    log.get().info(
        "stopped", published=streaming.published, seq=publisher.acked.seq, drained=not scope.cancelled_caught
    )
