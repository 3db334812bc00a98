"""The whole way: PostgreSQL, `bridge run`, `bridge index` and an OpenSearch that run, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import psycopg

from bench import documents
from bench.ground import POSTGRES, ROOT, STOPPED_WITHIN
from bridge import config, configfile
from bridge.embedded import Keeper, NatsServer, Postgres, until
from bridge.embedded.process import tail, throwaway_folder
from bridge.index.engine import Engine, EngineError, opened

ENGINE = "opensearch"
DATABASE = "posts"
TABLE = (
    "CREATE TABLE posts (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, author text NOT NULL, "
    "subject text NOT NULL, body text NOT NULL, posted_at timestamptz NOT NULL)"
)
VALUES = "'author', 'Re: a subject', repeat('Some words of a message that people wrote. ', 14), clock_timestamp()"
WORD = "words"  # every post has it
INSERT = f"INSERT INTO posts (author, subject, body, posted_at) VALUES ({VALUES})"
CLIENTS = 4


class Child:
    """One command of the bridge that runs."""

    def __init__(self, keeper: Keeper, log: Path) -> None:
        self._keeper = keeper
        self._log = log

    @property
    def pid(self) -> int:
        return self._keeper.pid or 0

    def check(self) -> None:
        """RuntimeError, with what it said last, where it has ended."""
        if not self._keeper.running:
            raise RuntimeError(f"{self._log.stem} ended with code {self._keeper.exit_code}\n{tail(self._log)}")

    async def finished(self) -> None:
        """Wait for its end; RuntimeError where that is not a good one."""
        if await self._keeper.wait() != 0:
            self.check()


class Whole:
    """The running servers, and the folder with configuration and logs."""

    def __init__(self, pg: Postgres, folder: Path, settings: Path) -> None:
        self.pg = pg
        self._folder = folder
        self._settings = settings

    def index(self, name: str) -> config.Index:
        """The configuration of an index."""
        return configfile.load(self._settings, {}).index[name]

    @asynccontextmanager
    async def running(self, *arguments: str, owner: bool = False) -> AsyncIterator[Child]:
        """A command of the bridge; stopped in order at the end of the block. The `owner`'s keeper deletes the folder,
        whatever ends us."""
        keeper = Keeper(self._folder if owner else None)
        log = self._folder / f"bridge {' '.join(arguments)}.log"
        command = [sys.executable, "-m", "bridge", "--config", str(self._settings), *arguments]
        try:
            await keeper.spawn(command, cwd=ROOT, log=log)
            yield Child(keeper, log)
            keeper.signal(signal.SIGTERM)
            with anyio.move_on_after(STOPPED_WITHIN):
                await keeper.wait()
        finally:
            await keeper.close()

    @asynccontextmanager
    async def sql(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection to the database, each statement its own transaction."""
        async with await psycopg.AsyncConnection.connect(self.pg.dsn(DATABASE), autocommit=True) as connection:
            yield connection

    async def rows(self) -> int:
        """How many posts there are."""
        async with self.sql() as sql:
            return int((await (await sql.execute("SELECT count(*) FROM posts")).fetchone() or (0,))[0])

    @asynccontextmanager
    async def load(self, rate: int, scripts: list[str]) -> AsyncIterator[None]:
        """pgbench commits that many transactions a second, each one of the scripts, until the block ends."""
        command = [
            str(self.pg.bindir / "pgbench"), "-h", self.pg.host, "-p", str(self.pg.port), "-U", "postgres", "-n",
            "-M", "prepared", "-c", str(CLIENTS), "-j", "1", "-T", "100000", "-R", str(rate), DATABASE,
        ]  # fmt: skip
        for number, script in enumerate(scripts):
            file = self._folder / f"load{number}.sql"
            file.write_text(script)
            command += ["-f", str(file)]
        keeper, log = Keeper(None), self._folder / "pgbench.log"
        env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        try:
            await keeper.spawn(command, cwd=self._folder, log=log, env=env, stop_signal=signal.SIGINT, grace=5)
            yield
            Child(keeper, log).check()
        finally:
            await keeper.close()


@asynccontextmanager
async def whole(indexes: list[str], rows: int) -> AsyncIterator[Whole]:
    """The servers, with a table of so many posts of which the stream has a snapshot, and a bridge that streams; all
    gone at the end. Indexes are configured, not built."""
    async with AsyncExitStack() as stack:
        pg = await stack.enter_async_context(Postgres.throwaway(settings=POSTGRES))
        nats = await stack.enter_async_context(NatsServer.throwaway())
        node = await stack.enter_async_context(documents.running(ENGINE))
        folder = throwaway_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        settings = folder / "bridge.toml"
        settings.write_text(_toml(pg, nats.url, node.url, indexes))
        here = Whole(pg, folder, settings)
        async with await psycopg.AsyncConnection.connect(pg.dsn(), autocommit=True) as sql:
            await sql.execute(f"CREATE DATABASE {DATABASE}")
        async with here.sql() as sql:
            await sql.execute(TABLE)
            await sql.execute(
                f"INSERT INTO posts (author, subject, body, posted_at) SELECT {VALUES} FROM generate_series(1, %s)",
                (rows,),
            )
            await sql.execute("CHECKPOINT")
        bridge = await stack.enter_async_context(here.running("run", owner=True))
        await _streams(here, bridge)
        yield here


def _toml(pg: Postgres, nats: str, engine: str, indexes: list[str]) -> str:
    parts = [
        f'[source]\ndsn = {json.dumps(pg.dsn(DATABASE))}\n[stream]\nservers = ["{nats}"]\nsync = "always"\n',
        *(f'[index.{name}]\ntable = "public.posts"\nurl = "{engine}"\nalias = "{name}"\n' for name in indexes),
    ]
    return "".join(parts)


async def _streams(here: Whole, bridge: Child) -> None:
    """Wait until the snapshot is in the stream and the bridge reads its slot."""

    async def there() -> bool:
        bridge.check()
        async with here.sql() as sql:
            found = await sql.execute("SELECT FROM pg_stat_replication WHERE state = 'streaming'")
            return await found.fetchone() is not None

    await until(there, 600, "the bridge streams")


@asynccontextmanager
async def searching(here: Whole, name: str) -> AsyncIterator[Engine]:
    """A client of an index's engine."""
    async with opened(here.index(name)) as engine:
        yield engine


async def built(engine: Engine, name: str, reader: Child, seconds: float) -> None:
    """Wait until an index's alias is there; fails at once where its reader has ended."""

    async def there() -> bool:
        reader.check()
        with contextlib.suppress(EngineError):
            return bool(await engine.indexes(name))
        return False

    await until(there, seconds, f"the index {name} is built")
