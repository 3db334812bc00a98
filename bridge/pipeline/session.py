"""What one session of the bridge works with: its connections, and what the process keeps from session to session."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from uuid import uuid4

import anyio
import psycopg

from bridge.config import Config
from bridge.pipeline.announce import Announcing
from bridge.pipeline.initial import Shown
from bridge.pipeline.plans import Plans
from bridge.pipeline.shapes import Shapes
from bridge.pipeline.standing import Standing
from bridge.source import connection, slot
from bridge.source.catalog import Catalog
from bridge.source.sentinel import Sentinel, posted
from bridge.source.slot import Server
from bridge.stream import server, subjects
from bridge.stream.claims import Claims
from bridge.stream.drift import Drift
from bridge.stream.keyed import located
from bridge.stream.lease import Hold
from bridge.stream.server import Broker
from bridge.stream.state import State

Bars = Callable[[], AbstractContextManager[Shown | None]]
Look = Callable[[], Awaitable[bool]]


class Memory:
    """What one process keeps from session to session: its name as a holder of the lease, its epoch (`renew`: the next
    session needs a newer one), the oids of the tables that it has seen, what it has said of the stream's configuration,
    how it shows an initial snapshot (`bars`), what is still to look at the servers beside a session (`look`), what it
    knows of its taking over while it stands by, the positions of changes that are read once more for what they lacked,
    and the tables that really had no key for a time (`doubted`), and whether it streams just now."""

    def __init__(self, bars: Bars = nullcontext, look: Look | None = None) -> None:
        self.bars = bars
        self.look = look
        self.holder = uuid4().hex
        self.held = False
        self.standing = Standing()
        self.epoch = 0
        self.tables: set[int] = set()
        self.renew = False
        self.acked = 0
        self.drifted: set[Drift] = set()
        self.doubted: set[str] = set()
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


class Session:
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
        self.shapes = Shapes(sql, config.source.name, self.catalog.filter, state)
        self.plans = Plans(config, self.catalog, state, self.shapes)
        self.announcing = Announcing(self.plans, self.shapes, config.source.name)
        stream = config.stream
        self.claims = Claims(broker, stream.name, stream.replicas, located if stream.compact else None)
        self.key = subjects.checkpoint_key(config.source.name)


@contextlib.asynccontextmanager
async def opened(config: Config, servers: list[str], hold: Hold) -> AsyncIterator[tuple[Session, Sentinel]]:
    """All connections of a session; the broker first, so that PostgreSQL is not bothered while it is away."""
    async with (
        server.connect(config.stream, servers, name=f"bridge {config.source.name}") as broker,
        posted(config.source.dsn) as sentinel,
        connection.connect(config.source.dsn) as sql,
    ):
        about = await slot.inspect(sql, failover=bool(config.source.failover))
        await _alone(sql, config.source.slot, hold)
        async with connection.connect(config.source.dsn, replication=True) as replication:
            state = await State.open(broker, config.state.bucket, config.stream.replicas)
            yield Session(config, broker, state, sql, replication, about), sentinel


async def _alone(sql: psycopg.AsyncConnection[Any], name: str, hold: Hold) -> None:
    """Be the only one at the slot: what a predecessor that is paused or out of reach still holds is taken from it."""
    await slot.lock(sql, name, hold.lease.backend_pid)
    await hold.note(backend_pid=sql.info.backend_pid)
    await slot.free(sql, name)
