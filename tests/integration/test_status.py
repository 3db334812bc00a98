"""`bridge status` against real servers: running, stopped, with a server away, with a stream that was trimmed."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from bridge.config import Config, Index
from bridge.embedded import NatsServer, Postgres, SearchEngine, until
from bridge.index.generation import IndexRecord
from bridge.index.indexer import run_index
from bridge.index.past import build_until
from bridge.operate.show.status import page
from bridge.operate.status.collect import collect
from bridge.operate.status.parts import Status
from bridge.stream.lease import Lease, _host, lease_key
from bridge.stream.state import State
from bridge.stream.subjects import index_key
from bridge.waiting import until as waited
from tests.integration.feeding import Log, fed
from tests.proxy import Proxy
from tests.running import bridge, broker_of, execute, settled, source, toml

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"


async def status(config: Config) -> Status:
    """What `bridge status` finds."""
    return await collect(config, list(config.stream.servers))


def problems(found: Status) -> str:
    """All problems in one text."""
    return "\n".join(finding.what for finding in found.findings if finding.level == "problem")


async def run(config: Config, folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command itself."""
    file = folder / "bridge.toml"
    file.write_text(toml(config))
    command = [sys.executable, "-m", "bridge", "--config", str(file), "status", *arguments]
    done = await anyio.run_process(command, stdin=subprocess.DEVNULL, check=False)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode()


async def in_step(config: Config) -> Status:
    """Waits for a status without problems."""
    found: list[Status] = []

    async def good() -> bool:
        found[:] = [await status(config)]
        return found[0].in_step

    try:
        await until(good, 30, "everything is in step")
    except TimeoutError:
        pytest.fail(problems(found[0]))
    return found[0]


async def api(config: Config, verb: str, body: dict[str, Any] | None = None) -> Any:
    async with broker_of(config) as broker:
        return await broker.api(verb, body)


async def written(dsn: str, url: str, **changes: Any) -> Config:
    """A source whose bridge has run and stopped."""
    config = source(dsn, url, **changes)
    await execute(dsn, TABLE, "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) g")
    async with bridge(config):
        await settled(config)
        await execute(dsn, "INSERT INTO t VALUES (0, 'y')")
        await settled(config)
    return config


async def test_a_running_bridge_is_in_step_and_every_part_is_shown(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) g")
    async with bridge(config):
        await settled(config)
        found = await in_step(config)
        code, text = await run(config, tmp_path, "--json")
        page_code, page = await run(config, tmp_path)
    assert found.process.state == "streaming"
    assert found.slot is not None
    assert found.slot.active
    assert found.stream is not None
    assert found.stream.messages == found.stream.last_seq
    assert found.checkpoint is not None
    assert found.checkpoint.phase == "stream"
    assert found.publishing == "batch"
    assert "always" in found.publishing_why
    assert [(t.name, t.state) for t in found.tables] == [("public.mark", "done"), ("public.t", "done")]
    assert found.rebuild.startswith("possible for every table")
    assert (code, page_code) == (0, 0)
    shown = json.loads(text)
    assert shown["in_step"]
    assert shown["stream"]["first_seq"] == 1
    assert shown["stream"]["where"] == nats.url
    for word in ("in step", "reading the slot", config.source.slot, "reaches back to sequence 1 of", "batch", "always"):
        assert word in page
    assert f"at {nats.url}\n" in page


async def test_a_bridge_that_is_stopped_is_said_and_the_rest_shown(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = await written(pg_db, nats.url)
    await execute(pg_db, "INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series(1001, 31000) g")
    code, page = await run(config, tmp_path)
    found = await status(config)
    assert code == 1
    assert "no bridge is running" in page
    assert "not active" in page
    assert found.process.state == "stopped"
    assert found.lag is not None
    assert found.slot is not None
    assert found.lag.bytes > 16 << 20
    assert found.slot.retained >= found.lag.bytes
    assert "start it: `bridge run`" in page


async def test_nothing_has_run_yet(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    code, page = await run(config, tmp_path)
    assert code == 1
    assert f"{config.source.slot}: not there" in page
    assert f"{config.stream.name}: not there" in page
    assert f"\n            at {nats.url}\n" in page
    async with broker_of(config) as broker:
        assert await broker.stream(f"KV_{config.state.bucket}") is None, "status makes nothing"


async def test_nats_that_is_away_is_said_and_the_slot_shown(pg_db: str, own_nats: NatsServer, tmp_path: Path) -> None:
    config = await written(pg_db, own_nats.url)
    await own_nats.kill()
    code, page = await run(config, tmp_path)
    assert code == 1
    assert "NATS cannot be asked" in page
    assert f"{config.source.slot}: not active" in page
    assert re.search(r"^bridge +unknown: NATS is away$", page, re.MULTILINE), page
    assert "no bridge is running" not in page
    assert "`bridge run`" not in page
    assert (await status(config)).process.state == "unknown"


async def test_postgresql_that_is_away_is_said_and_the_stream_shown(
    own_pg: Postgres, nats: NatsServer, tmp_path: Path
) -> None:
    config = await written(own_pg.dsn(), nats.url)
    await own_pg.stop()
    code, page = await run(config, tmp_path)
    assert code == 1
    assert "PostgreSQL cannot be asked" in page
    assert "unknown: PostgreSQL is away" in page
    assert f"{config.stream.name}: " in page
    assert "at sequence" in page


async def test_a_refused_login_is_shown_with_the_rest(pg_db: str, nats: NatsServer) -> None:
    config = await written(pg_db, nats.url)
    wrong = msgspec.structs.replace(
        config, source=msgspec.structs.replace(config.source, dsn=pg_db.replace("postgres@", "nobody@"))
    )
    async with bridge(config):
        await settled(config)
        found = await status(wrong)
    assert "nobody" in problems(found)
    assert found.stream is not None
    page(found, shown := io.StringIO())
    assert "slot        unknown: PostgreSQL refuses\n" in shown.getvalue()
    assert "running; whether it reads the slot is unknown: PostgreSQL refuses, process " in shown.getvalue()


async def test_a_trimmed_stream_says_how_far_back_it_reaches_and_that_no_rebuild_is_possible(
    pg_db: str, nats: NatsServer
) -> None:
    config = await written(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
        await api(config, f"STREAM.PURGE.{config.stream.name}", {"seq": 50})
        found = await in_step(config)
        assert found.stream is not None
        assert found.stream.first_seq == 50
        mine = {table.name: table for table in found.tables}
        assert mine["public.t"].rebuild_from == 0
        assert mine["public.mark"].rebuild_from > 50
        assert "possible for 1 of 2 tables, not for public.t: " in found.rebuild
        assert "begins at sequence 50" in found.rebuild
        assert any(f.level == "note" and "public.t" in f.what for f in found.findings)


async def test_rows_that_were_never_read_make_a_rebuild_impossible(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, mode="never")
    await execute(pg_db, TABLE, "INSERT INTO t VALUES (1, 'x')")
    async with bridge(config):
        await settled(config)
        found = await in_step(config)
    assert "not for public.t" in found.rebuild
    assert "not in the log" in found.rebuild


async def test_what_contradicts_is_found(pg_db: str, nats: NatsServer) -> None:
    config = await written(pg_db, nats.url)
    name, slot = config.stream.name, config.source.slot
    await api(config, f"STREAM.MSG.DELETE.{name}", {"seq": 3})
    assert "1 messages are missing in the middle" in problems(await status(config))
    await execute(
        pg_db, "INSERT INTO t VALUES (999, 'z')", f"SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())"
    )
    assert "the slot was confirmed up to" in problems(await status(config))
    await execute(pg_db, f"SELECT pg_drop_replication_slot('{slot}')")
    assert f"PostgreSQL has no slot {slot}" in problems(await status(config))
    made = (await api(config, f"STREAM.INFO.{name}"))["config"]
    await api(config, f"STREAM.DELETE.{name}")
    assert f"there is no stream {name}" in problems(await status(config))
    await api(config, f"STREAM.CREATE.{name}", made)
    assert "was made again" in problems(await status(config))


async def fed_by_its_reader(config: Config, name: str) -> bool:
    """Whether the generation that was built is fed for the second time."""
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        found = await state.get(index_key(config.source.name, name), IndexRecord)
    return found is not None and [one.opened for one in found[0].generations] == [2]


async def test_an_index_is_shown_with_its_reader_and_how_far_it_is(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    config = source(pg_db, nats.url)
    index = Index(table="public.t", url=[osmem.url], alias=config.source.name)
    config = msgspec.structs.replace(config, index={config.source.name: index})
    name = config.source.name
    await execute(pg_db, TABLE, "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) g")
    async with bridge(config):
        await settled(config)
        assert f"index {name} has not been built yet" in problems(await status(config))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_index, config, [name], list(config.stream.servers))
            # The rebuild that made it and the reader that goes on have a consumer each.
            await until(partial(fed_by_its_reader, config, name), 30, "the reader has a consumer of its own")
            found = await in_step(config)
            tasks.cancel_scope.cancel()
        [shown] = found.indexes
        [live] = shown.generations
        assert (shown.generation, live.state, live.behind) == (1, "live", 0)
        assert "process" in shown.reader
        await execute(pg_db, "UPDATE t SET body = 'y'")
        await settled(config)
        found = await status(config)
        assert f"no reader feeds index {name}" in problems(found)
        assert found.indexes[0].generations[0].behind == 100
        made = await build_until(config, name, list(config.stream.servers), 150)
        found = await status(config)
        assert found.indexes[0].past == [made.alias]
        shown_as = io.StringIO()
        page(found, shown_as)
        assert f"{made.alias}: of the past, nothing feeds it" in shown_as.getvalue()


async def test_a_reader_that_an_outage_of_nats_has_silenced_is_not_called_missing(
    nats: NatsServer, osmem: SearchEngine, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(nats.port)
    async with fed(nats.url, osmem.url) as log, anyio.create_task_group() as tasks:
        await log.snapshot(state="done", complete_from=1)
        await log.posts(1, 10)
        tasks.start_soon(run_index, log.config, [log.name], [f"nats://127.0.0.1:{proxy.port}"])
        await log.done()
        assert "reader" not in problems(await seen(log))
        await proxy.refuse()
        said = f"the reader of index {log.name} (process {os.getpid()} on {socket.gethostname()}) has not been heard of"
        found: list[Status] = []

        async def silent() -> bool:
            found[:] = [await seen(log)]
            return "reader" in problems(found[0])

        assert await waited(silent, seconds=40, every=0.5)
        assert (found[0].indexes[0].reader, said in problems(found[0])) == ("", True)
        shown_as = io.StringIO()
        page(found[0], shown_as)
        assert f"its reader, process {os.getpid()} on {socket.gethostname()}, not heard of" in shown_as.getvalue()
        assert "no reader" not in shown_as.getvalue()
        proxy.accept()

        async def back() -> bool:
            found[:] = [await seen(log)]
            assert "no reader feeds" not in problems(found[0])
            return bool(found[0].indexes[0].reader)

        assert await waited(back, seconds=30, every=0.2)
        assert (found[0].indexes[0].silent, "reader" in problems(found[0])) == (None, False)
        tasks.cancel_scope.cancel()


async def test_a_bridge_that_an_outage_of_nats_has_silenced_is_not_called_missing(
    pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(nats.port)
    config = source(pg_db, f"nats://127.0.0.1:{proxy.port}")
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    me = f"process {os.getpid()} on {socket.gethostname()}"
    async with bridge(config):
        await settled(config)
        await proxy.refuse()
        found: list[Status] = []

        async def silent() -> bool:
            found[:] = [await collect(config, [nats.url])]
            return found[0].process.state == "stopped"

        assert await waited(silent, seconds=40, every=0.5)
        assert f"the bridge ({me}) has not been heard of for" in problems(found[0])
        shown_as = io.StringIO()
        page(found[0], shown_as)
        assert "not heard of for" in shown_as.getvalue()
        proxy.accept()

        async def back() -> bool:
            found[:] = [await collect(config, [nats.url])]
            assert "no bridge is running" not in problems(found[0])
            return found[0].process.state == "streaming"

        assert await waited(back, seconds=30, every=0.2)
        assert found[0].process.silent is None


async def test_of_a_reader_that_has_ended_it_is_said_that_there_is_none(nats: NatsServer, osmem: SearchEngine) -> None:
    async with fed(nats.url, osmem.url) as log:
        await log.snapshot(state="done", complete_from=1)
        await log.posts(1, 10)
        async with log.reading():
            await log.done()
        key = lease_key("index", log.config.source.name, log.name)
        assert f"no reader feeds index {log.name}" in problems(await seen(log))
        # As one that was killed on this host leaves it: the pid is another's by now.
        gone = Lease("x", _host(), os.getpid(), "2026-01-31T12:00:00+00:00", started=1)
        await log.state.put(key, gone)
        assert f"no reader feeds index {log.name}" in problems(await seen(log))
        # On another host nobody can tell.
        await log.state.put(key, msgspec.structs.replace(gone, host="elsewhere/b/n"))
        assert "(process" in problems(await seen(log))
        assert "on elsewhere) has not been heard of" in problems(await seen(log))


async def seen(log: Log) -> Status:
    """What a status finds of a log that has no database behind it."""
    return await collect(log.config, log.servers)
