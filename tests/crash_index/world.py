"""What a scenario's faults happen to: servers, a database under load, a bridge, index readers and rebuilds.

The bridge talks to its servers directly (tests/crash is for what may happen to it); each reader, and all rebuilds, have
connections of their own through proxies, so that one may be cut off while the other takes over.
"""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec
from anyio.abc import TaskGroup

from bridge.config import Config, Index, Secret
from bridge.embedded import NatsServer, Postgres, SearchEngine, until
from bridge.embedded.process import children
from bridge.errors import BridgeError
from bridge.index.engine import Engine, opened
from bridge.index.generation import Generation, IndexRecord
from bridge.stream.server import Broker
from bridge.stream.state import State
from bridge.stream.subjects import index_key
from bridge.structured import group
from tests.crash.process import Bridge
from tests.crash.writers import Writers
from tests.crash_index.load import FULL, OTHERS, PARTS, TEMPLATE, load, prepare
from tests.proxy import Proxy
from tests.running import broker_of, execute, messages, source, toml
from tests.servers import Elasticsearch, OpenSearch

ENGINES: dict[str, type[OpenSearch] | type[Elasticsearch]] = {"opensearch": OpenSearch, "elasticsearch": Elasticsearch}
# In memory: many more seeds in the same time, but what dies has nothing left to come back with.
QUICK = "osmem"
SINGLE = {"number_of_shards": 1, "number_of_replicas": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "exclude": {"exclude": ["seen", "n"]},
    "rename": {"rename": {"body": "text", "note": "text", "title": "headline"}},
    "both": {"exclude": ["raw", "seen"], "rename": {"body": "title", "title": "body", "note": "n2"}},
    "transform": {},
}
TRANSFORMS = {"posts": "tests.crash_index.transforms:post", "words": "tests.crash_index.transforms:word"}
NODE = OpenSearch | Elasticsearch | SearchEngine


class Servers:
    """Used by one scenario after another; a search engine of a kind is started when the first one needs it."""

    def __init__(self, pg: Postgres, nats: NatsServer, stack: AsyncExitStack) -> None:
        self.pg = pg
        self.nats = nats
        self._stack = stack
        self._nodes: dict[str, NODE] = {}

    async def node(self, kind: str) -> NODE:
        """A running search engine."""
        if kind not in self._nodes:
            self._nodes[kind] = await self._stack.enter_async_context(
                SearchEngine.throwaway() if kind == QUICK else ENGINES[kind].throwaway()
            )
            # A killed one reads its log again first, on a machine that has much else to do.
            self._nodes[kind].start_deadline = 240.0
        return self._nodes[kind]

    def use(self, kind: str, node: NODE) -> None:
        """Use a node that is there already."""
        self._nodes[kind] = node


@asynccontextmanager
async def servers() -> AsyncIterator[Servers]:
    """All of them, with the template database; what a scenario kills it starts again."""
    async with (
        Postgres.throwaway(fsync=False, settings={"deadlock_timeout": "100ms"}) as pg,
        NatsServer.throwaway() as nats,
        AsyncExitStack() as stack,
    ):
        await prepare(pg)
        yield Servers(pg, nats, stack)


class Choice(NamedTuple):
    """What is indexed and how: table → shape."""

    engine: str
    mode: str
    shapes: dict[str, str]
    readers: int
    full: bool
    poison: bool


class Reader:
    """A `bridge index` (or `reindex`) with proxies of its own to the broker and to the search engine.

    Args:
        module: what is run in the place of `bridge`.
    """

    def __init__(self, broker: Proxy, search: Proxy, config: str, folder: str, module: str = "bridge") -> None:
        self.broker = broker
        self.search = search
        self.config = config
        self._folder = folder
        self._module = module
        self.process = self.command("index")
        self.said = ""

    def command(self, *arguments: str) -> Bridge:
        """A process with this configuration, not started yet."""
        return Bridge(Path(tempfile.mkdtemp(prefix=self._folder)), self.config, *arguments, module=self._module)

    @property
    def proxies(self) -> tuple[Proxy, Proxy]:
        return self.broker, self.search


class World:
    """The scenario's own names on the servers, and who may touch what.

    Attributes:
        config: leads to the servers directly.
        readers: one or two of the same indexes; the second stands by.
        rebuilder: whose configuration and proxies the rebuilds have.
        done: how often each kind of fault has happened.
        zombies: rebuilds that somebody else has overtaken or may have: they may end with code 3.
    """

    def __init__(
        self, servers: Servers, node: NODE, config: Config, choice: Choice, bridge: Bridge, readers: list[Reader]
    ) -> None:
        self.pg = servers.pg
        self.nats = servers.nats
        self.node = node
        self.config = config
        self.choice = choice
        self.bridge = bridge
        self.rebuilder = readers.pop()
        self.readers = readers
        self.done: Counter[str] = Counter()
        self.said: list[str] = []
        self.rebuilding = anyio.Lock()

    @property
    def dsn(self) -> str:
        return str(self.config.source.dsn)

    @property
    def texts(self) -> str:
        """All that every process has said."""
        named = [("bridge", self.bridge.text)]
        named += [(f"reader {n}", reader.process.text) for n, reader in enumerate(self.readers)]
        return "\n".join(f"=== {name}\n{text}" for name, text in [*named, *(("reindex", s) for s in self.said)])

    def node_pids(self) -> list[int]:
        """The engine's processes."""
        return [self.node.pid, *children(self.node.pid)]

    async def whole(self) -> None:
        """End every fault that still lasts, and assert that nothing has ended by itself."""
        for reader in (*self.readers, self.rebuilder):
            for proxy in reader.proxies:
                proxy.accept()
                proxy.release()
                proxy.delay, proxy.rate = 0.0, 0
        for pid in self.node_pids():
            os.kill(pid, signal.SIGCONT)
        assert self.bridge.running, f"the bridge ended with code {self.bridge.code} by itself"
        for number, reader in enumerate(self.readers):
            assert reader.process.running, f"reader {number} ended with code {reader.process.code} by itself"
            assert "index stopped" not in reader.process.text, f"reader {number} has given up an index"

    async def while_running(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for something that bridge and readers must do; fail at once if one of them ends by itself."""
        async with group() as tasks:

            async def ends() -> None:
                async def checked() -> bool:
                    await self.whole()
                    return False

                await until(checked, math.inf, "something has ended")

            tasks.start_soon(ends)
            await wait()
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[Broker, State]]:
        """The broker and the state bucket, past the proxies."""
        async with broker_of(self.config) as broker:
            yield broker, await State.open(broker, self.config.state.bucket)

    async def records(self, state: State) -> dict[str, IndexRecord]:
        """What is recorded of each index."""
        found = {}
        for name in self.config.index:
            one = await state.get(index_key(self.config.source.name, name), IndexRecord)
            found[name] = one[0] if one is not None else IndexRecord()
        return found

    async def followed(self, state: State) -> list[Generation]:
        """The generations that readers feed."""
        records = (await self.records(state)).values()
        return [g for record in records for g in record.having("live", "kept")]

    async def built(self, *names: str) -> None:
        """Wait until these indexes are live, or all."""

        async def live() -> bool:
            try:
                async with self.connected() as (_, state):
                    records = await self.records(state)
            except BridgeError:
                return False  # a fault has taken the broker away
            return all(records[name].state == "live" for name in names or records)

        await until(live, 240, "the indexes are built")

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """A client past the proxies."""
        async with opened(next(iter(self.config.index.values()))) as engine:
            yield engine

    async def in_step(self) -> bool:
        """Whether every generation that is followed has what the stream has now."""
        async with self.connected() as (broker, state):
            stream = await broker.stream(self.config.stream.name)
            assert stream is not None
            records = (await self.records(state)).values()
            return all(r.state == "live" for r in records) and all(
                g.seq >= stream.last_seq for r in records for g in r.having("live", "kept")
            )


@asynccontextmanager
async def world(servers: Servers, seed: int, choice: Choice) -> AsyncIterator[World]:
    """A database of its own with bridge and readers, none of them started; all is removed if the block ends well."""
    node = await servers.node(choice.engine)
    config = source("", servers.nats.url, stream={"mode": choice.mode})
    name = config.source.name
    dsn = servers.pg.dsn(name)
    indexes = {f"{name}-{table}": index_of(f"{name}-{table}", table, shape) for table, shape in choice.shapes.items()}
    config = leading(msgspec.structs.replace(config, index=indexes), dsn, servers.nats.url, node.url)
    await execute(servers.pg.dsn(), f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    for table, parts in PARTS.items():
        if table not in choice.shapes:
            await execute(dsn, f"DROP TABLE {table}")
        elif choice.full:
            await execute(dsn, *(FULL.format(part) for part in parts))
    prefix = f"bridge-crash-index-{seed}-"
    async with anyio.create_task_group() as tasks:
        readers = [reader_of(tasks, servers, node, config, prefix) for _ in range(choice.readers + 1)]
        bridge = Bridge(Path(tempfile.mkdtemp(prefix=prefix)), toml(config))
        here = World(servers, node, config, choice, bridge, readers)
        try:
            yield here
        except Exception as error:
            error.add_note(f"{here.texts}\nthe log: {await _kept(here, prefix)}")
            raise
        finally:
            with anyio.CancelScope(shield=True):
                for process in (bridge, here.rebuilder.process, *(reader.process for reader in here.readers)):
                    await process.close()
            tasks.cancel_scope.cancel()
    await removed(here)


def reader_of(
    tasks: TaskGroup, servers: Servers, node: NODE, config: Config, folder: str, module: str = "bridge"
) -> Reader:
    broker, search = Proxy(servers.nats.port, tasks), Proxy(node.port, tasks)
    proxied = leading(
        config, str(config.source.dsn), f"nats://127.0.0.1:{broker.port}", f"http://127.0.0.1:{search.port}"
    )
    return Reader(broker, search, toml(proxied) + _indexes(proxied), folder, module)


def index_of(name: str, table: str, shape: str) -> Index:
    changes: dict[str, Any] = {"transform": TRANSFORMS[table]} if shape == "transform" else dict(SHAPES[shape])
    changes["exclude"] = [column for column in changes.get("exclude", []) if column in OTHERS[table]]
    changes["rename"] = {old: new for old, new in changes.get("rename", {}).items() if old in OTHERS[table]}
    return Index(table=f"public.{table}", alias=name, settings=SINGLE, **changes)


def _indexes(config: Config) -> str:
    lines = []
    for name, index in config.index.items():
        rename = ", ".join(f"{old} = {json.dumps(new)}" for old, new in index.rename.items())
        settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in index.settings.items())
        lines.append(
            f"[index.{name}]\ntable = {json.dumps(index.table)}\nurl = {json.dumps(index.url)}\n"
            f"exclude = {json.dumps(index.exclude)}\nrename = {{ {rename} }}\nsettings = {{ {settings} }}\n"
            f"transform = {json.dumps(index.transform)}\n"
        )
    return "".join(lines)


def leading(config: Config, dsn: str, nats: str, search: str) -> Config:
    return msgspec.structs.replace(
        config,
        source=msgspec.structs.replace(config.source, dsn=Secret(dsn)),
        stream=msgspec.structs.replace(config.stream, servers=[nats]),
        index={name: msgspec.structs.replace(index, url=[search]) for name, index in config.index.items()},
    )


def loaded(here: World, seed: int) -> AbstractAsyncContextManager[Writers]:
    """Writers for as long as the block lasts."""
    return load(here.dsn, seed, list(here.choice.shapes), poison=here.choice.poison).writing()


async def _kept(here: World, prefix: str) -> str:
    """A file with the log of a scenario that failed, without which nobody finds out why."""
    lines: list[bytes] = []
    with anyio.move_on_after(30, shield=True):
        try:
            lines = [b"%d %d %s\n" % (m.seq, m.epoch, m.data) for m, _ in await messages(here.config)]
        except BridgeError as error:
            lines = [str(error).encode()]
    file, path = tempfile.mkstemp(prefix=prefix, suffix=".log")
    with os.fdopen(file, "wb") as kept:
        kept.writelines(lines)
    return path


async def removed(here: World) -> None:
    name = here.config.source.name
    slots = f"pg_replication_slots WHERE database = '{name}'"

    async def free() -> bool:
        active = f"SELECT count(pg_terminate_backend(active_pid)) FROM {slots} AND active_pid IS NOT NULL"
        return await execute(here.dsn, active) == [(0,)]

    await until(free, 20, f"no slot of {name} is in use")
    await execute(
        here.pg.dsn(), f"SELECT pg_drop_replication_slot(slot_name) FROM {slots}", f"DROP DATABASE {name} WITH (FORCE)"
    )
    stream = here.config.stream.name
    async with broker_of(here.config) as broker:
        for one in (stream, f"{stream}_dlq", f"KV_{here.config.state.bucket}"):
            if await broker.stream(one) is not None:
                await broker.api(f"STREAM.DELETE.{one}")
    async with here.engine() as engine:
        for physical in await engine.indexes(f"{name}*"):
            await engine.delete(physical)
