"""What a soak happens to: one bridge between two proxies, two index readers with proxies of their own, all servers.

The faults of both crash suites know their own kind of world. Here each gets a view of the same parts: `log` is the
world of tests/crash, `index` that of tests/crash_index, and the bridge in both is one.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import msgspec

from bridge.embedded import Postgres
from tests.crash import world as log_world
from tests.crash.process import Bridge
from tests.crash_index import world as index_world
from tests.crash_index.world import Choice, index_of, leading, reader_of, removed
from tests.proxy import Proxy
from tests.running import execute, source, toml
from tests.soak import counted
from tests.soak.load import INDEXED, SCHEMA, TEMPLATE, prepare

READERS = 2
SHAPES = {"posts": "both", "words": "plain", "days": "rename"}


class World:
    """Both views, and what concerns both.

    Attributes:
        done: how often each kind of fault has happened.
    """

    def __init__(self, log: log_world.World, index: index_world.World) -> None:
        self.log = log
        self.index = index
        self.config = index.config
        self.pg = log.pg
        self.bridge = log.bridge

    @property
    def done(self) -> Counter[str]:
        return self.log.done + self.index.done

    @property
    def processes(self) -> dict[str, Bridge]:
        """The bridge and the readers, by what they are called in the report."""
        readers = {f"reader {number}": one.process for number, one in enumerate(self.index.readers, 1)}
        return {"bridge": self.bridge, **readers}

    async def whole(self) -> None:
        """End every fault that still lasts, and assert that nothing has ended by itself."""
        await self.log.whole()
        await self.index.whole()

    async def while_running(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for something that bridge and readers must do; fail at once if one of them ends by itself."""
        await self.index.while_running(wait)


@asynccontextmanager
async def servers() -> AsyncIterator[index_world.Servers]:
    """PostgreSQL with the template database, and a nats-server that forgets its last second when power fails."""
    settings = {"deadlock_timeout": "100ms", "max_wal_size": "256MB", "max_slot_wal_keep_size": "4GB"}
    async with (
        Postgres.throwaway(fsync=False, settings=settings) as pg,
        log_world.lazy({"max_payload": "1MB"}) as nats,
        AsyncExitStack() as stack,
    ):
        await prepare(pg)
        yield index_world.Servers(pg, nats, stack)


@asynccontextmanager
async def world(mine: index_world.Servers, engine: str, mode: str = "chain") -> AsyncIterator[World]:
    """A database of its own with bridge and readers, none of them started; all is removed if the block ends well."""
    node = await mine.node(engine)
    config = source(
        "", mine.nats.url, sync=log_world.SYNC_INTERVAL, tables=["public.*", f"{SCHEMA}.*"], messages=["app.*"],
        stream={"publish": mode},
    )  # fmt: skip
    name = config.source.name
    indexes = {f"{name}-{table}": index_of(f"{name}-{table}", table, SHAPES[table]) for table in INDEXED}
    dsn = mine.pg.dsn(name)
    config = leading(msgspec.structs.replace(config, index=indexes), dsn, mine.nats.url, node.url)
    await execute(mine.pg.dsn(), f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    prefix = "bridge-soak-"
    async with anyio.create_task_group() as tasks:
        readers = [reader_of(tasks, mine, node, config, prefix, counted.__name__) for _ in range(READERS + 1)]
        database, broker = Proxy(mine.pg.port, tasks), Proxy(mine.nats.port, tasks)
        proxied = leading(
            config,
            dsn.replace(f":{mine.pg.port}/", f":{database.port}/"),
            f"nats://127.0.0.1:{broker.port}",
            node.url,
        )
        bridge = Bridge(Path(tempfile.mkdtemp(prefix=prefix)), toml(proxied), module=counted.__name__)
        both = log_world.Servers(mine.pg, mine.nats, mine.nats)
        choice = Choice(engine, "log", SHAPES, READERS, full=False, poison=False)
        here = World(
            log_world.World(both, database, broker, config, bridge),
            index_world.World(mine, node, config, choice, bridge, readers),
        )
        try:
            yield here
        except Exception as error:
            error.add_note(here.index.texts)
            raise
        finally:
            with anyio.CancelScope(shield=True):
                for process in (*here.processes.values(), here.index.rebuilder.process):
                    await process.close()
            tasks.cancel_scope.cancel()
    await removed(here.index)
