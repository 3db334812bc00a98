"""`bridge snapshot`: what a person asks for and reads, with a bridge that runs and without one; and `--trim`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from bridge.embedded import NatsServer
from bridge.errors import Gap, ServerRefused
from bridge.operate import snapshot as commands
from bridge.stream.state import SnapshotStatus
from bridge.waiting import until
from tests.oracle import agrees
from tests.reading.checker import from_last_begin, same
from tests.reading.steps import ask, status
from tests.running import Done, bridge, broker_of, command, execute, messages, settled, source

pytestmark = pytest.mark.anyio

TABLES = [
    "CREATE TABLE a (id int PRIMARY KEY, v int, body text)",
    "CREATE TABLE b (id int PRIMARY KEY)",
    "INSERT INTO a SELECT g, g, 'x' FROM generate_series(1, 500) g",
    "INSERT INTO b SELECT generate_series(1, 50)",
]
PARTED = [
    "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY LIST (id)",
    "CREATE TABLE part PARTITION OF parted DEFAULT",
]


run = partial(command, "snapshot", seconds=60)


async def test_tables_are_asked_for_shown_and_read(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *TABLES)
    early = await run(config, tmp_path, "--all")
    assert (early.code, "no bridge has run yet" in early.err) == (4, True)
    async with bridge(config):
        await settled(config)
        done = await run(config, tmp_path, "public.a", "--wait")
        assert done.code == 0
        line = next(line for line in done.out.splitlines() if "public.a" in line)
        assert line.split()[:3] == ["public.a", "done", "500"]
        shown = await run(config, tmp_path, "--status")
        assert {line.split()[0] for line in shown.out.splitlines()[1:]} >= {"public.a", "public.b"}
    asked = await run(config, tmp_path, "public.*")
    assert asked.code == 0
    assert "no bridge is running: it begins with the next" in asked.out
    assert "requested" in asked.out
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            waited.append(await run(config, tmp_path, "public.b", "--wait"))
            ended.set()

        waited, ended = list[Done](), anyio.Event()
        tasks.start_soon(wait)

        async def asked_once_more() -> bool:
            again = (await status(config, "b")).again
            return again is not None and again != before

        before = (await status(config, "b")).again
        assert await until(asked_once_more, seconds=20)
        async with bridge(config):
            await settled(config)
            with anyio.fail_after(30):
                await ended.wait()
            await settled(config)
    assert waited[0].code == 0
    assert "no bridge is running" in waited[0].err
    assert "done" in waited[0].out
    found = await agrees(config)
    begins = [e.table for m, e in found if e.phase == "begin"]
    assert begins.count("a") >= 3
    assert begins.count("b") >= 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "needs either tables or --all"),
        (["public.a", "--all"], 2, "TABLES and --all exclude each other"),
        (["public.nothing"], 2, "no published table is called public.nothing"),
        (["nothing.*"], 2, "no published table matches nothing.*"),
        (["nodot"], 2, "write schema.table"),
        (["public.part"], 2, "public.part is a partition of public.parted"),
        (["--all", "--pause", "--resume"], 2, "exclude each other"),
        (["--all", "--pause", "--where", "id = 1"], 2, "--where is for asking"),
        (["public.a", "--trim"], 2, "--trim goes with --all"),
        (["--all", "--force"], 2, "--force is for --trim"),
    ],
)
async def test_what_cannot_be_asked_for_is_said(
    pg_db: str, nats: NatsServer, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLES[0], *PARTED)
    async with bridge(config):
        await settled(config)
    done = await run(config, tmp_path, *arguments)
    assert (done.code, words in done.err) == (code, True), done.err


@pytest.mark.parametrize("action", ["pause", "resume", "cancel"])
async def test_it_is_said_where_there_is_nothing_to_do(
    pg_db: str, nats: NatsServer, tmp_path: Path, action: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *TABLES)
    async with bridge(config):
        await settled(config)
    await ask(config, "a")
    done = await run(config, tmp_path, "public.a", "public.b", f"--{action}")
    assert done.code == 0
    assert f"nothing to {action} of public.b: nobody asked for it to be read" in done.out
    assert f"nothing to {action} of public.a" not in done.out


async def test_a_condition_that_is_no_sql_fails_that_table_alone(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *TABLES)
    async with bridge(config):
        await settled(config)
        done = await run(config, tmp_path, "public.a", "--where", "nothing = 'planted'", "--wait")
        assert done.code == 1
        assert "failed" in done.out
        assert "planted" not in done.out + done.err
        await execute(pg_db, "INSERT INTO a VALUES (1000, 1, 'y')")
        assert (await run(config, tmp_path, "public.b", "--wait")).code == 0
        await settled(config)
    await agrees(config)


async def test_a_trimmed_log_begins_with_a_complete_picture(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *TABLES)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "UPDATE a SET v = v + 1 WHERE id < 100", "DELETE FROM a WHERE id > 450")
        await settled(config)
        before = (await messages(config))[-1][0].seq
        done = await run(config, tmp_path, "--all", "--trim")
        assert done.code == 0, done.err
        await execute(pg_db, "UPDATE a SET v = v + 1 WHERE id = 7")
        await settled(config)
    found = await messages(config)
    first = found[0][0].seq
    assert first > before
    assert f"{first - 1:,} messages removed, the log begins at sequence {first:,}" in done.out
    begin, rows = from_last_begin(found, "a")
    assert begin >= first
    await same(pg_db, "a", rows)
    # The bridge goes on from a log whose beginning has gone.
    async with bridge(config):
        await execute(pg_db, "INSERT INTO b VALUES (1000)")
        await settled(config)
    assert (await messages(config))[0][0].seq == first


async def test_what_a_reader_has_not_acked_is_kept_unless_it_is_forced(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *TABLES)
    stream = config.stream.name
    async with bridge(config), broker_of(config) as broker:
        await settled(config)
        behind: dict[str, Any] = {"name": "behind", "durable_name": "behind", "ack_policy": "all"}
        behind |= {"deliver_policy": "by_start_sequence", "opt_start_seq": 10}
        await broker.api(f"CONSUMER.CREATE.{stream}.behind", {"stream_name": stream, "config": behind})
        done = await run(config, tmp_path, "--all", "--trim")
        assert done.code == 0, done.err
        assert "kept, because they have not acked it yet: behind" in done.out
        assert (await messages(config))[0][0].seq == 10
        forced = await run(config, tmp_path, "--all", "--trim", "--force")
        assert forced.code == 0, forced.err
        assert "kept" not in forced.out
        assert (await messages(config))[0][0].seq > 500


async def test_nothing_is_trimmed_where_a_table_is_not_complete(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, mode="never")
    await execute(pg_db, *TABLES)
    async with bridge(config):
        await settled(config)
        with pytest.raises(Gap, match="bridge snapshot --all --trim"):
            await commands.trimmed(config, list(config.stream.servers), force=False)
    compact = msgspec.structs.replace(
        source(pg_db, nats.url), stream=msgspec.structs.replace(source(pg_db, nats.url).stream, mode="compact")
    )
    await execute(pg_db, "ALTER TABLE a REPLICA IDENTITY FULL", "ALTER TABLE mark REPLICA IDENTITY FULL")
    async with bridge(compact):
        await settled(compact)
        with pytest.raises(ServerRefused, match="nothing to trim"):
            await commands.trimmed(compact, list(compact.stream.servers), force=False)


def test_a_status_of_an_older_version_is_still_read() -> None:
    old = b'{"state":"done","mode":"initial","rows":5,"first_seq":1,"last_seq":7,"complete_from":1}'
    assert msgspec.json.decode(old, type=SnapshotStatus).again is None
