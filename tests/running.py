"""Bridges for the tests: inside this process, and as processes of their own that can be killed.

source(...)        a configuration with names of its own, so that tests share servers but nothing else
bridge(...)        runs it in this process while the block lasts
Process(...)       runs `python -m bridge`
settled(...)       waits until the stream has everything that is committed now
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec
import psycopg

from bridge import event
from bridge.config import Config, Index, Operate, Secret, Snapshot, Source, Stream
from bridge.config import State as StateConfig
from bridge.embedded import until
from bridge.errors import BridgeError
from bridge.event import Event
from bridge.failpoints import VARIABLE
from bridge.index.engine import opened
from bridge.pipeline.run import run
from bridge.stream import asking, claims, reader, server, subjects
from bridge.stream.reader import Message
from bridge.stream.server import Broker
from bridge.stream.state import Checkpoint, SnapshotStatus, State, Writer
from bridge.waiting import patiently
from tests.schema import conforms

MARK = "CREATE TABLE IF NOT EXISTS public.mark (id text PRIMARY KEY)"


def source(dsn: str, url: str, **changes: Any) -> Config:
    """A configuration whose source, slot, stream and bucket nobody else has."""
    name = f"t{secrets.token_hex(4)}"
    return Config(
        source=Source(
            name=name,
            dsn=Secret(dsn),
            slot=f"bridge_{name}",
            tables=changes.pop("tables", ["public.*"]),
            on_missing_identity=changes.pop("on_missing_identity", "stop"),
            table=changes.pop("table", {}),
            messages=changes.pop("messages", []),
            only_local=changes.pop("only_local", False),
            mask_key=Secret(changes.pop("mask_key", "")),
        ),
        stream=Stream(
            servers=[url], name=f"cdc_{name}", sync=changes.pop("sync", "always"), **changes.pop("stream", {})
        ),
        state=StateConfig(bucket=f"state_{name}"),
        operate=changes.pop("operate", Operate(http="")),
        snapshot=Snapshot(**changes),
    )


class Running:
    """A bridge in this process: `failed` is what it ended with."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stop = anyio.Event()
        self.ended = anyio.Event()
        self.failed: BridgeError | None = None

    async def run(self) -> None:
        try:
            await run(self.config, list(self.config.stream.servers), self.stop)
        except BridgeError as error:
            self.failed = error
        finally:
            self.ended.set()


@asynccontextmanager
async def bridge(config: Config) -> AsyncIterator[Running]:
    """Runs until the end of the block, and is stopped there as SIGTERM would do it; its error ends the block."""
    running = Running(config)
    async with anyio.create_task_group() as tasks:

        async def work() -> None:
            await running.run()
            if running.failed is not None:
                tasks.cancel_scope.cancel()

        tasks.start_soon(work)
        yield running
        running.stop.set()
        with anyio.fail_after(30):
            await running.ended.wait()
    if running.failed is not None:
        raise running.failed


async def failure(config: Config, seconds: float = 30) -> BridgeError:
    """The error that a bridge with this configuration ends with."""
    with anyio.fail_after(seconds):
        try:
            await run(config, list(config.stream.servers), anyio.Event())
        except BridgeError as error:
            return error
    raise AssertionError("the bridge ended without an error")


class Process:
    """`python -m bridge` with its configuration in `folder`, all of its output in `folder/output`."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        self.file = folder / "bridge.toml"
        self.file.write_text(config)
        self.output = folder / "output"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, failpoint: str = "") -> None:
        """Starts it; the output is appended. `failpoint`: name:action[:nth]."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BRIDGE_"))}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bridge", "--config", str(self.file), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=kept | ({VARIABLE: failpoint} if failpoint else {}),
            )

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    async def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Sends a signal and waits for the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return await self.wait(seconds)

    async def wait(self, seconds: float = 30) -> int:
        """The exit code."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, seconds, f"the bridge has ended:\n{self.text[-2000:]}")
        assert process.returncode is not None
        return process.returncode

    async def said(self, word: str, seconds: float = 30, times: int = 1) -> None:
        """Waits until the output has `word` at least `times` times; fails at once where the process ends before."""
        process = self.process
        assert process is not None

        def there() -> bool:
            found = self.text.count(word) >= times
            assert found or process.poll() is None, f"ended with {process.returncode}:\n{self.text[-2000:]}"
            return found

        await until(there, seconds, f"the bridge says {word!r}:\n{self.text[-2000:]}")

    def close(self) -> None:
        """Kills what is left of it; what it said is shown where the test fails."""
        if self.process is not None:
            print(f"exit code so far: {self.process.poll()}\n{self.text[-3000:]}")  # noqa: T201
            self.process.kill()
            self.process.wait()


class Done(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


async def command(name: str, config: Config, folder: Path, *arguments: str, seconds: float = 90) -> Done:
    """One of the commands as a person runs it; its configuration is written into `folder`."""
    file = folder / "bridge.toml"
    file.write_text(toml(config))
    called = [sys.executable, "-m", "bridge", "--config", str(file), name, *arguments]
    with anyio.fail_after(seconds):
        done = await anyio.run_process(called, stdin=subprocess.DEVNULL, check=False)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def toml(config: Config) -> str:
    """The configuration as a file."""
    tables = "".join(
        f"[source.table.{json.dumps(name)}]\ncolumns = {json.dumps(t.columns)}\nexclude = {json.dumps(t.exclude)}\n"
        f"operations = {json.dumps(t.operations)}\non_missing_identity = {json.dumps(t.on_missing_identity)}\n"
        f"mask = {{ {', '.join(f'{json.dumps(c)} = {json.dumps(how)}' for c, how in t.mask.items())} }}\n"
        for name, t in config.source.table.items()
    )
    stream = config.stream
    embedded = f"store_dir = {json.dumps(stream.store_dir)}\n" if stream.embedded else ""
    return (
        f"[source]\nname = {json.dumps(config.source.name)}\ndsn = {json.dumps(str(config.source.dsn))}\n"
        f"slot = {json.dumps(config.source.slot)}\ntables = {json.dumps(config.source.tables)}\n"
        f"on_missing_identity = {json.dumps(config.source.on_missing_identity)}\n"
        f"on_gap = {json.dumps(config.source.on_gap)}\nmessages = {json.dumps(config.source.messages)}\n"
        f"only_local = {json.dumps(config.source.only_local)}\nmask_key = {json.dumps(str(config.source.mask_key))}\n"
        f"{tables}"
        f"[stream]\nname = {json.dumps(stream.name)}\nservers = {json.dumps(stream.servers)}\n{embedded}"
        f"sync = {json.dumps(stream.sync)}\nreplicas = {stream.replicas}\ndiscard = {json.dumps(stream.discard)}\n"
        f"publish = {json.dumps(stream.publish)}\n"
        f"max_bytes = {json.dumps(stream.max_bytes)}\nmax_age = {json.dumps(stream.max_age)}\n"
        f"mode = {json.dumps(stream.mode)}\ntombstone_ttl = {json.dumps(stream.tombstone_ttl)}\n"
        f"[state]\nbucket = {json.dumps(config.state.bucket)}\n"
        f"[snapshot]\nmode = {json.dumps(config.snapshot.mode)}\n"
        f"on_rewrite = {json.dumps(config.snapshot.on_rewrite)}\n"
        f"[operate]\nhttp = {json.dumps(config.operate.http)}\nindex_http = {json.dumps(config.operate.index_http)}\n"
        f"token = {json.dumps(str(config.operate.token))}\n"
    )


@asynccontextmanager
async def broker_of(config: Config) -> AsyncIterator[Broker]:
    """A connection to the configuration's NATS server."""
    async with server.connect(config.stream, list(config.stream.servers), name="test") as broker:
        yield broker


Asked = Callable[..., Awaitable[list[tuple[Any, ...]]]]


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[Asked]:
    """`execute` on one connection: for what asks again and again, which costs a fiftieth of a connection each time."""
    async with await psycopg.AsyncConnection.connect(
        dsn, autocommit=True, client_encoding="utf8", prepare_threshold=None
    ) as connection:

        async def ask(*statements: str) -> list[tuple[Any, ...]]:
            found: list[tuple[Any, ...]] = []
            for statement in statements:
                cursor = await connection.execute(statement.encode())
                found = await cursor.fetchall() if cursor.description else []
            return found

        yield ask


async def execute(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    """Runs each statement in a transaction of its own; the last one's rows."""
    async with session(dsn) as ask:
        return await ask(*statements)


async def settled(config: Config, seconds: float = 30) -> None:
    """Waits until the stream has all that is committed now: a row of public.mark goes through last."""
    mark, stream, seen = secrets.token_hex(6), config.stream, 0
    subject = subjects.table_filter(stream.prefix, config.source.name, "public", "mark", compact=stream.compact)
    async with session(str(config.source.dsn)) as ask:
        await _streaming(config, ask, seconds)
        async with broker_of(config) as broker:
            if (before := await broker.stream(stream.name)) is not None:
                seen = before.last_seq
            await ask(MARK, f"INSERT INTO public.mark VALUES ('{mark}')")

            async def there() -> bool:
                nonlocal seen
                now = await broker.stream(stream.name)
                if now is None:
                    return False
                # The last of the table need not be the mark: the table may be read once more.
                seen = min(seen, now.last_seq)
                while (found := await broker.message(stream.name, next_by_subj=subject, seq=seen + 1)) is not None:
                    if mark.encode() in found.data:
                        return True
                    seen = found.seq
                return False

            await until(there, seconds, "the stream has what was committed")


async def complete(config: Config, seconds: float = 60) -> dict[str, SnapshotStatus]:
    """Waits until no table is to be read any more and all are complete; what the state bucket says of each, by name."""
    found: dict[str, SnapshotStatus] = {}

    async def done() -> bool:
        found.update(await statuses(config))
        return all(one.state == "done" and one.again is None for one in found.values())

    try:
        await until(done, seconds, "every table is complete")
    except TimeoutError as error:
        error.add_note(str(found))
        raise
    return found


@asynccontextmanager
async def state_of(config: Config) -> AsyncIterator[State]:
    """The state bucket that a bridge of this configuration uses."""
    async with broker_of(config) as broker:
        yield await State.open(broker, config.state.bucket)


async def statuses(config: Config) -> dict[str, SnapshotStatus]:
    """What the state bucket says of each table's snapshot, by the table's name without its schema."""
    async with state_of(config) as state:
        return {table: one for (_, table), one in (await asking.tables(state, config.source.name)).items()}


async def streaming(config: Config, seconds: float = 30) -> None:
    """Waits until the initial snapshot is in the stream and the slot is being read."""
    async with session(str(config.source.dsn)) as ask:
        await _streaming(config, ask, seconds)


async def _streaming(config: Config, ask: Asked, seconds: float) -> None:
    async def active() -> bool:
        rows = await ask(
            f"SELECT active FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'",
        )
        return rows == [(True,)] and (found := await checkpoint(config)) is not None and found.phase == "stream"

    await until(active, seconds, "the bridge streams")


async def checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint in the state bucket."""
    async with broker_of(config) as broker:
        if await broker.stream(f"KV_{config.state.bucket}") is None:
            return None
        state = await State.open(broker, config.state.bucket)
        found = await state.get(subjects.checkpoint_key(config.source.name), Checkpoint)
        return found[0] if found else None


async def writers(config: Config) -> list[Writer]:
    """The bridges that have written to the stream, as the state bucket knows them."""
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        found = await state.get(subjects.epochs_key(config.source.name), list[Writer])
    return found[0] if found else []


async def messages(config: Config) -> list[tuple[Message, Event]]:
    """Everything in the stream, in order, each as the schema of events has it; read again from the beginning where
    servers of a cluster do not answer, as the reader's contract leaves it to the caller."""

    async def once() -> list[tuple[Message, Event]]:
        async with broker_of(config) as broker:
            wanted = [subjects.source_subjects(config.stream.prefix, config.source.name)]
            found: list[tuple[Message, Event]] = []
            async for batch in reader.read(broker, config.stream.name, subjects=wanted):
                for message in batch:
                    conforms(message.data)
                async for part in claims.whole(broker, config.stream.name, batch):
                    found += [(message, event.decode(message.data)) for message in part]
            return found

    return await patiently(once, seconds=60, hopeless=lambda _: False)


async def events(config: Config, table: str, schema: str = "public") -> list[dict[str, Any]]:
    """The events of one table as plain dictionaries, the snapshot's markers left out."""
    return [
        msgspec.json.decode(message.data)
        for message, found in await messages(config)
        if (found.schema, found.table) == (schema, table) and found.op != "snapshot"
    ]


async def emptied(url: str, name: str) -> None:
    """Delete the generations of an index from an engine that tests share: they are another stream's."""
    async with opened(Index(url=[url])) as engine:
        for physical in await engine.indexes(f"{name}-0*"):
            await engine.delete(physical)
