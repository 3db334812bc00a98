"""What a scenario's faults happen to: servers, a database under load, a bridge between two proxies."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
import msgspec

from bridge.config import Config, Secret
from bridge.embedded import Keeper, NatsServer, Postgres, until
from bridge.embedded.nats import jetstream
from bridge.embedded.process import throwaway_folder
from bridge.stream.tail import Tail
from bridge.structured import group
from tests.crash.load import TEMPLATE, load, prepare
from tests.crash.process import Bridge
from tests.crash.writers import Writers
from tests.proxy import Proxy
from tests.running import broker_of, execute, source, toml


class Servers(NamedTuple):
    """Used by one scenario after another: PostgreSQL, a nats-server that syncs each write, and one that does not."""

    pg: Postgres
    nats: NatsServer
    lazy: NatsServer


# Of the lazy server; what it has acked for less is taken back by a power failure.
SYNC_INTERVAL = "1s"


@asynccontextmanager
async def servers() -> AsyncIterator[Servers]:
    """All three, with the template database; what a scenario kills it starts again."""
    # A killed process loses nothing that it wrote: fsync matters only to a machine that loses power.
    settings = {"deadlock_timeout": "100ms", "max_wal_size": "256MB"}
    async with (
        Postgres.throwaway(fsync=False, settings=settings) as pg,
        NatsServer.throwaway() as nats,
        lazy() as sleepy,
    ):
        await prepare(pg)
        yield Servers(pg, nats, sleepy)


def lazy(settings: Mapping[str, str] | None = None) -> NatsServer:
    """A nats-server that syncs once a second; with more lines for its configuration."""
    home = throwaway_folder()
    store = home / "store"
    more = settings or {}
    return NatsServer(home, Keeper(home), store, settings={"jetstream": jetstream(store, SYNC_INTERVAL), **more})


class Forgotten(NamedTuple):
    """The stream's end that a broker had acked and forgot, and how many snapshots had been begun until then.

    kept: the sequence up to which nothing was forgotten; reading: whether the bridge was reading a table, while the
    stream flowed, when the rest came.
    """

    tail: Tail
    snapshots: int
    kept: int
    reading: bool


class World:
    """The scenario's own names on the servers, and who may touch what.

    Attributes:
        config: leads to the servers directly; the bridge's own goes through the proxies.
        done: how often each kind of fault has happened.
        forgotten: what the broker had acked, and forgot.
    """

    def __init__(self, servers: Servers, database: Proxy, broker: Proxy, config: Config, bridge: Bridge) -> None:
        self.pg = servers.pg
        self.nats = servers.lazy if config.stream.hold_back else servers.nats
        self.database = database
        self.broker = broker
        self.config = config
        self.bridge = bridge
        self.done: Counter[str] = Counter()
        self.forgotten: list[Forgotten] = []

    @property
    def proxies(self) -> tuple[Proxy, Proxy]:
        return self.database, self.broker

    async def whole(self) -> None:
        """End every fault that still lasts, and assert that the bridge has not ended by itself."""
        for proxy in self.proxies:
            proxy.accept()
            proxy.release()
            proxy.delay, proxy.rate = 0.0, 0
        assert self.bridge.running, f"the bridge ended with code {self.bridge.code} by itself"

    async def while_running(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait for something that the bridge must do; fail at once if it ends by itself."""
        async with group() as tasks:

            async def ends() -> None:
                await until(lambda: not self.bridge.running, math.inf, "the bridge has ended")
                raise AssertionError(f"the bridge ended with code {self.bridge.code} by itself")

            tasks.start_soon(ends)
            await wait()
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def world(
    servers: Servers, seed: int, *, synchronous_commit: str, publish: str, sync: str
) -> AsyncIterator[World]:
    """A database of its own on the servers, with an independent slot; all of it is removed if the block ends well."""
    admin = servers.pg.dsn()
    nats = servers.nats if sync == "always" else servers.lazy
    config = source("", nats.url, sync=sync, messages=["app.*"], stream={"publish": publish})
    name = config.source.name
    dsn = servers.pg.dsn(name)
    config = _with(config, dsn, nats.url)
    await execute(
        admin,
        f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}",
        f"ALTER DATABASE {name} SET synchronous_commit = {synchronous_commit}",
    )
    await execute(dsn, f"SELECT pg_create_logical_replication_slot('oracle_{name}', 'wal2json')")
    folder = Path(tempfile.mkdtemp(prefix=f"bridge-crash-{seed}-"))
    async with anyio.create_task_group() as tasks:
        database, broker = Proxy(servers.pg.port, tasks), Proxy(nats.port, tasks)
        proxied = _with(
            config,
            dsn.replace(f":{servers.pg.port}/", f":{database.port}/"),
            f"nats://127.0.0.1:{broker.port}",
        )
        bridge = Bridge(folder, toml(proxied))
        try:
            yield World(servers, database, broker, config, bridge)
        except Exception as error:
            error.add_note(bridge.text)
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await bridge.close()
            tasks.cancel_scope.cancel()
    await _remove(servers.pg, config)


def _with(config: Config, dsn: str, url: str) -> Config:
    return msgspec.structs.replace(
        config,
        source=msgspec.structs.replace(config.source, dsn=Secret(dsn)),
        stream=msgspec.structs.replace(config.stream, servers=[url]),
    )


def loaded(world: World, seed: int) -> AbstractAsyncContextManager[Writers]:
    """Writers for as long as the block lasts."""
    return load(str(world.config.source.dsn), seed).writing()


async def _remove(pg: Postgres, config: Config) -> None:
    name = config.source.name
    slots = f"pg_replication_slots WHERE database = '{name}'"

    async def free() -> bool:
        active = f"SELECT count(pg_terminate_backend(active_pid)) FROM {slots} AND active_pid IS NOT NULL"
        return await execute(pg.dsn(), active) == [(0,)]

    await until(free, 20, f"no slot of {name} is in use")
    drop = f"DROP DATABASE {name} WITH (FORCE)"
    await execute(pg.dsn(), f"SELECT pg_drop_replication_slot(slot_name) FROM {slots}", drop)
    async with broker_of(config) as broker:
        for stream in (config.stream.name, f"KV_{config.state.bucket}"):
            await broker.api(f"STREAM.DELETE.{stream}")
