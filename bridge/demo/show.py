"""The order of events: servers, archive, bridge, index; writing and searching all the while; a rebuild; the comparison.

What runs is what a user would run: the bridge's commands as processes of their own (children.py). At the end, and after
Ctrl-C at any moment, no process and no folder is left.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import psycopg
from anyio.abc import TaskGroup
from rich.console import Console

from bridge import config, configfile
from bridge.demo import archive, children, searcher
from bridge.demo.archive import Archive
from bridge.demo.board import Board, Phase, Sample
from bridge.demo.children import INDEX, LAST_LINES, Child, Site
from bridge.demo.compare import Comparison, compare
from bridge.demo.hints import commands
from bridge.demo.screen import Screen, summary
from bridge.demo.watch import Watch
from bridge.demo.writer import Writer
from bridge.embedded import NatsServer, Postgres, SearchEngine, Server
from bridge.embedded import nats as embedded_nats
from bridge.embedded import postgres as embedded_postgres
from bridge.embedded import search as embedded_search
from bridge.embedded.process import tail
from bridge.errors import BridgeError, ServerRefused, UsageError
from bridge.index.engine import opened
from bridge.stream.server import connect
from bridge.stream.state import State
from bridge.structured import group
from bridge.waiting import until

SHORTEST = 5
MOST_POSTS = 8_000
POSTS_A_SECOND = 100
GATHER_SECONDS = 2.5
REBUILD_AT = 0.4
REBUILD_TAKES = 1.5
CLOSING = 5.0
PATIENCE = 60.0
MOVE_WITHIN = 10.0
MOMENTS = frozenset({"posted_at", "edited_at"})


class Servers(NamedTuple):
    """The three servers, throwaway all of them."""

    postgres: Postgres
    nats: NatsServer
    engine: SearchEngine

    @property
    def dsn(self) -> str:
        # Whatever the environment says of other servers: this one has no TLS.
        return self.postgres.dsn(sslmode="disable")


async def demo(*, seconds: int, keep: bool) -> bool:
    """Show everything; whether index and table agreed at the end.

    Args:
        seconds: how long it takes, about, from the start to the end.
        keep: stay up afterwards, print commands to try, and end with Ctrl-C.

    Raises:
        KeyboardInterrupt: it was interrupted before the comparison.
        ServerMissing: PostgreSQL, wal2json, nats-server or osmem-server is not installed.
        ServerRefused: something ended that should have gone on; the message has the end of its log.
    """
    if seconds < SHORTEST:
        raise UsageError(f"--seconds {seconds} is too short to show anything", f"give it {SHORTEST} or more")
    for find in (
        embedded_postgres.find_installation,
        embedded_nats.find_program,
        embedded_nats.shipped_config,
        embedded_search.find_program,
    ):
        find()
    console = Console(highlight=False)
    show = _Show(seconds, console)
    try:
        found = await show.run(keep=keep)
    except psycopg.Error as error:
        raise ServerRefused(f"the demo's PostgreSQL failed ({type(error).__name__})", "run the demo again") from None
    if found is None:
        raise KeyboardInterrupt
    return found.agrees


class _Show:
    """One run of the demo."""

    def __init__(self, seconds: int, console: Console) -> None:
        names = {
            "servers": "PostgreSQL, nats-server, osmem-server",
            "archive": "docstrings of the standard library as messages on lists",
            "snapshot": "`bridge run`: every row into the stream",
            "index": "`bridge index messages`: the stream into an index",
            "live": "writing and searching",
            "rebuild": "`bridge reindex messages`, with another mapping",
            "after": "writing and searching on the new index",
            "compare": "table and index, every value",
        }
        units = {"snapshot": "rows", "index": "documents", "rebuild": "documents"}
        self.board = Board(seconds, [Phase(name, text, units.get(name, "")) for name, text in names.items()])
        self._console = console
        self._screen = Screen(self.board, console)
        self._children: list[Child] = []
        self._end = anyio.Event()
        self._keeping = False
        self._interrupted = False

    async def run(self, *, keep: bool) -> Comparison | None:
        """The whole show; None if it was interrupted before its end."""
        found: Comparison | None = None
        async with contextlib.AsyncExitStack() as stack, group() as tasks:
            tasks.start_soon(self._signals, tasks)
            tasks.start_soon(self._screen.talk)
            with self._screen.shown():
                servers, texts = await self._begin(stack, tasks)
                site = Site(stack.enter_context(children.folder()), servers.dsn, servers.nats.url, servers.engine.url)
                found = await self._acts(servers, texts, site, stack, tasks)
            summary(self.board, str(found), found.agrees, self._console)
            if keep:
                self._keeping = True
                self._console.print(commands(servers.postgres, servers.nats, servers.engine, site), soft_wrap=True)
                await self._end.wait()
            for child in reversed(self._children):
                await child.stop()
            tasks.cancel_scope.cancel()
        if self._interrupted and not self._keeping:
            return None
        return found

    async def _signals(self, tasks: TaskGroup) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self._interrupted = True
                self._end.set()
                if not self._keeping:
                    tasks.cancel_scope.cancel()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[Phase]:
        phase = self.board.phase(name)
        phase.state, phase.started = "running", time.monotonic()
        try:
            yield phase
        except BaseException:
            phase.seconds, phase.state = phase.elapsed, "failed"
            raise
        phase.seconds, phase.state = phase.elapsed, "done"

    # Servers and text

    async def _begin(self, stack: contextlib.AsyncExitStack, tasks: TaskGroup) -> tuple[Servers, Archive]:
        """The servers, while a thread reads the library; then the tables."""
        gathered: list[Archive] = []
        most = min(MOST_POSTS, self.board.seconds * POSTS_A_SECOND)

        async def gather() -> None:
            gathered.append(
                await anyio.to_thread.run_sync(archive.gather, most, GATHER_SECONDS, abandon_on_cancel=True)
            )

        async with group() as both:
            both.start_soon(gather)
            servers = await self._servers(stack, tasks)
        texts = gathered[0]
        with self._phase("archive") as phase:
            # Some tenths of a second; a COPY that is cut short would end with a warning of its own.
            with anyio.CancelScope(shield=True):
                await archive.load(servers.dsn, texts)
            phase.text = f"{len(texts.posts):,} docstrings as messages on {len(texts.lists)} lists"
        self.board.sample = Sample(archive.changing(texts))
        return servers, texts

    async def _servers(self, stack: contextlib.AsyncExitStack, tasks: TaskGroup) -> Servers:
        with self._phase("servers") as phase:
            servers = Servers(
                await stack.enter_async_context(Postgres.throwaway()),
                await stack.enter_async_context(NatsServer.throwaway()),
                await stack.enter_async_context(SearchEngine.throwaway()),
            )
            for server in servers:
                tasks.start_soon(_stays, server)
            phase.text = ", ".join(
                [await _postgres_version(servers.dsn), await _nats_version(servers), _osmem_version()]
            )
        return servers

    # The acts

    async def _acts(
        self, servers: Servers, texts: Archive, site: Site, stack: contextlib.AsyncExitStack, tasks: TaskGroup
    ) -> Comparison:
        site.configure(stemmed=False)
        settings = configfile.load(site.config, {})
        board = self.board
        with self._phase("snapshot") as phase:
            bridge = await stack.enter_async_context(children.running(site, "run", owner=True))
            self._stays(bridge, tasks)
            broker = await stack.enter_async_context(connect(settings.stream, [servers.nats.url], name="bridge demo"))
            engine = await stack.enter_async_context(opened(settings.index[INDEX]))
            watch = Watch(settings, broker, await State.open(broker, settings.state.bucket), engine, board)
            rows = len(texts.posts) + len(texts.lists)
            _in_time(await watch.snapshot(phase, rows, PATIENCE), bridge, "the snapshot")
            phase.text = f"{board.rows:,} rows in the stream {settings.stream.name}"
        with self._phase("index") as phase:
            index = await stack.enter_async_context(children.running(site, "index", INDEX))
            self._stays(index, tasks)
            async with _meanwhile(watch.building, phase, len(texts.posts)):
                _in_time(await watch.built(PATIENCE), index, "the first index")
            phase.text = f"{await engine.count(INDEX):,} documents in {board.generation}"
        writer = Writer(servers.dsn, texts, board.writes)
        async with group() as crowd:
            crowd.start_soon(watch.stream)
            crowd.start_soon(searcher.loop, engine, INDEX, archive.words(texts), board)
            crowd.start_soon(searcher.probe, engine, INDEX, writer, board)
            crowd.start_soon(searcher.sample, engine, INDEX, board)
            async with group() as writing:
                writing.start_soon(writer.run)
                # A rebuild takes longer than the first build: there is more to read, and all the others work, too.
                room = board.seconds - CLOSING - REBUILD_TAKES * board.phase("index").seconds
                await self._live("live", min(REBUILD_AT * board.seconds, room), 3.0)
                await self._rebuild(site, watch)
                await self._live("after", board.seconds - CLOSING, 2.0)
                writer.stop()
            found = await self._compare(servers.dsn, watch)
            crowd.cancel_scope.cancel()
        return found

    def _stays(self, child: Child, tasks: TaskGroup) -> None:
        self._children.append(child)
        tasks.start_soon(child.stays)

    async def _live(self, name: str, end: float, least: float) -> None:
        """Let writer and searchers work until second `end` of the show, but for `least` seconds."""
        writes, searches = self.board.writes.messages, self.board.searches.copy()
        with self._phase(name) as phase:
            # Long enough to be looked at; there is no state to wait for.
            await anyio.sleep(max(end - self.board.elapsed, least * min(1.0, self.board.seconds / 20)))
            answered = self.board.searches.since(searches).answered
            phase.text = f"{self.board.writes.messages - writes:,} changes of messages, {answered:,} searches"

    async def _rebuild(self, site: Site, watch: Watch) -> None:
        """The next generation, with a mapping that stems words."""
        board, old = self.board, self.board.generation
        await searcher.look(watch.engine, INDEX, board)
        board.sample.before = board.sample.count
        before, begun = board.searches.copy(), time.monotonic()
        with self._phase("rebuild") as phase:
            site.configure(stemmed=True)
            documents = await watch.engine.count(INDEX)
            async with (
                children.running(site, "reindex", INDEX) as reindex,
                _meanwhile(watch.building, phase, documents),
            ):
                with anyio.move_on_after(PATIENCE) as scope:
                    await reindex.finished()
                _in_time(not scope.cancelled_caught, reindex, "the rebuild")
            live = await watch.live()
            board.generation = live.physical if live is not None else ""
            gone = "deleted" if not await watch.engine.exists(old) else "NOT deleted"
            switched = time.monotonic()

            async def moved_over() -> bool:
                return any(lag.committed > switched for lag in board.lags)

            # The reader has followed the alias once a later post is found.
            await until(moved_over, seconds=MOVE_WITHIN)
            board.rebuilding = begun, switched
            phase.text = f"alias now on {board.generation}, {old} {gone}"
        board.during = board.searches.since(before)
        await searcher.look(watch.engine, INDEX, board)
        board.sample.after = board.sample.count

    async def _compare(self, dsn: str, watch: Watch) -> Comparison:
        """Wait until the last change has gone all the way, then compare."""
        with self._phase("compare") as phase:
            phase.text = "the writer has stopped; waiting for the last change to arrive"
            last = await _closing_post(dsn)

            async def arrived() -> bool:
                with contextlib.suppress(BridgeError):
                    return bool((await searcher.search(watch.engine, INDEX, {"query": {"term": {"id": last}}}))["hits"])
                return False

            # In the table's order nothing comes after it; the consumer says when all before it is answered, too.
            in_time = await until(arrived, seconds=PATIENCE, every=0.05) and await watch.caught_up(PATIENCE)
            phase.text = "every row, every column"
            found = await compare(dsn, watch.engine, INDEX, MOMENTS)
            phase.text = f"{found.rows:,} rows, every column: " + ("the same" if found.agrees else "DIFFERENT")
            if not in_time:
                phase.text += f" (not caught up within {PATIENCE:.0f} s)"
        return found


@contextlib.asynccontextmanager
async def _meanwhile(action: Any, *arguments: Any) -> AsyncIterator[None]:
    """`action` runs for as long as the block does."""
    async with group() as tasks:
        tasks.start_soon(action, *arguments)
        yield
        tasks.cancel_scope.cancel()


async def _stays(server: Server) -> None:
    code = await server.wait()
    lines = tail(server.log).splitlines()[-LAST_LINES:]
    raise ServerRefused(
        f"{server.name} ended with code {code}; its last lines:\n" + "\n".join(f"    {line}" for line in lines),
        "see what they say, and run the demo again",
    )


def _in_time(good: bool, child: Child, what: str) -> None:
    if not good:
        raise ServerRefused(
            f"{what} was not done within {PATIENCE:.0f} s; the last lines of `{child.name}`:\n{tail(child.log)}",
            "see what they say; is the machine very busy?",
        )


async def _closing_post(dsn: str) -> int:
    """One last post; its id."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        cursor = await connection.execute(
            "INSERT INTO messages (id, list_id, author, subject, body, tags, source, posted_at)"
            " SELECT (SELECT max(id) + 1 FROM messages), list_id, 'demo', 'The last post', 'Nothing comes after it.',"
            " '{}', '{}', clock_timestamp() FROM messages LIMIT 1 RETURNING id"
        )
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def _postgres_version(dsn: str) -> str:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        number = connection.info.server_version
    return f"PostgreSQL {number // 10_000}.{number % 10_000}"


async def _nats_version(servers: Servers) -> str:
    async with connect(config.Stream(), [servers.nats.url]) as broker:
        return f"nats-server {'.'.join(map(str, broker.version))}"


def _osmem_version() -> str:
    try:
        return f"osmem-server {version('osmem-server')}"
    except PackageNotFoundError:
        return "osmem-server"
