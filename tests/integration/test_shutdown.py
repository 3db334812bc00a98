"""PostgreSQL can always stop, and is waited for while it is busy, but not when a connection to it is lost."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import psycopg
import pytest
from structlog.testing import capture_logs

from bridge.config import Config
from bridge.embedded import NatsServer, Postgres, until
from bridge.errors import Unavailable
from bridge.pipeline import watch
from bridge.source import connection, patience
from bridge.source.sentinel import Sentinel
from tests.oracle import agrees
from tests.proxy import Proxy
from tests.running import bridge, broker_of, events, execute, settled, source, streaming

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"
SLOT = "SELECT pg_create_logical_replication_slot('{}', 'wal2json')"
FILL = "INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series({}, {}) g"


async def stops_soon(server: Postgres) -> None:
    started = time.monotonic()
    await server.stop(20)
    assert time.monotonic() - started < 8


async def walsender(config: Config) -> int | None:
    """The pid of the walsender that the bridge reads from."""
    rows = await execute(
        str(config.source.dsn),
        f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'",
    )
    return rows[0][0] if rows else None


def through(dsn: str, server: Postgres, proxy: Proxy) -> str:
    return dsn.replace(f":{server.port}/", f":{proxy.port}/")


@asynccontextmanager
async def locked(dsn: str, table: str) -> AsyncIterator[int]:
    """Nobody may even read `table` while the block lasts; the pid of who holds the lock."""
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield holder.info.backend_pid
        await holder.rollback()


Said = list[MutableMapping[str, Any]]


@pytest.fixture
def said() -> Iterator[Said]:
    """What is logged."""
    with capture_logs() as found:
        yield found


def lines(said: Said, name: str) -> Said:
    """The log lines of this name so far."""
    return [line for line in said if line["event"] == name]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubts come within seconds, not within a minute."""
    for module, name, seconds in (
        (patience, "ASK_AFTER", 1.0),
        (patience, "ASK_EVERY", 0.5),
        (patience, "UNKNOWN_FOR", 8.0),
        (watch, "ASK_EVERY", 0.5),
        (watch, "SILENCE", 2.0),
    ):
        monkeypatch.setattr(module, name, seconds)


async def test_postgresql_stops_at_once_while_a_backlog_is_read_and_while_the_broker_takes_nothing(
    own_pg: Postgres, own_nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy, dsn = proxied(own_nats.port), own_pg.dsn()
    config = source(dsn, f"nats://127.0.0.1:{proxy.port}")
    await execute(dsn, TABLE)
    async with bridge(config):
        await settled(config)
        before = await _last(config)
    await execute(dsn, FILL.format(1, 300_000))
    async with bridge(config):
        await until(lambda: _past(config, before), 30, "the backlog is being read")
        await stops_soon(own_pg)
        await own_pg.start()
        await streaming(config)
        proxy.hold()
        await stops_soon(own_pg)
        await own_pg.start()
        proxy.release()
        await settled(config, 120)
        assert await _last(config) == before + 300_000 + 1


async def _last(config: Config) -> int:
    async with broker_of(config) as broker:
        found = await broker.stream(config.stream.name)
        return found.last_seq if found else 0


async def _past(config: Config, seq: int) -> bool:
    return await _last(config) > seq


async def test_postgresql_stops_at_once_while_the_stream_is_full(
    own_pg: Postgres, own_nats: NatsServer, said: Said
) -> None:
    dsn = own_pg.dsn()
    config = source(dsn, own_nats.url)
    await execute(dsn, TABLE)
    async with bridge(config), broker_of(config) as broker:
        await settled(config)
        made = (await broker.api(f"STREAM.INFO.{config.stream.name}"))["config"]
        await broker.api(f"STREAM.UPDATE.{config.stream.name}", {**made, "discard": "new", "max_bytes": 100_000})
        await execute(dsn, FILL.format(1, 60_000))
        await until(lambda: lines(said, "publish refused"), 20, "the stream is full")
        await stops_soon(own_pg)
        await own_pg.start()
        await broker.api(f"STREAM.UPDATE.{config.stream.name}", made)
        await settled(config, 60)
    await agrees(config)


async def test_postgresql_stops_at_once_in_the_middle_of_a_snapshot(
    own_pg: Postgres, own_nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy, dsn = proxied(own_nats.port), own_pg.dsn()
    config = source(dsn, f"nats://127.0.0.1:{proxy.port}")
    # 60 MB: more than fits between PostgreSQL and the bridge, so that the COPY lasts as long as the broker is slow.
    wide = "INSERT INTO t SELECT g, repeat('x', 1900) FROM generate_series(1, 30000) g"
    await execute(dsn, TABLE, wide)
    writer = await psycopg.AsyncConnection.connect(dsn)
    await writer.execute("INSERT INTO t VALUES (0, 'open')")
    async with bridge(config):
        # Making the slot waits for the open transaction.
        await until(lambda: walsender(config), 20, "the slot is being made")
        await stops_soon(own_pg)
        await writer.close()
        proxy.delay = 0.05  # the rows take their time
        await own_pg.start()
        await until(lambda: _copying(dsn), 20, "the snapshot is read")
        proxy.hold()
        await stops_soon(own_pg)
        await own_pg.start()
        proxy.delay = 0.0
        proxy.release()
        await settled(config, 60)
    await agrees(config)


async def _copying(dsn: str) -> bool:
    return bool(await execute(dsn, "SELECT 1 FROM pg_stat_progress_copy"))


async def test_postgresql_stops_soon_even_where_nothing_tells_that_it_wants_to(
    own_pg: Postgres, own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def deaf(_: str) -> AsyncIterator[Sentinel]:
        yield Sentinel()

    monkeypatch.setattr("bridge.pipeline.session.posted", deaf)
    # Nor does an idle advance help: what was confirmed last stays behind what was received.
    monkeypatch.setattr("bridge.pipeline.checkpoint.IDLE_EVERY", 1000.0)
    dsn = own_pg.dsn()
    config = source(dsn, own_nats.url, tables=["public.t", "public.mar*"])
    await execute(dsn, TABLE, "CREATE TABLE other (a int, b text)")
    async with bridge(config):
        await settled(config)
        await execute(dsn, "INSERT INTO t VALUES (1, 'x')")
        position = await _position(dsn)

        async def told() -> bool:
            return await _confirmed(config) >= position

        await until(told, 20, "a position is confirmed")  # and more WAL comes that is none of ours
        await execute(dsn, "INSERT INTO other SELECT g, repeat('x', 300) FROM generate_series(1, 5000) g")
        behind = await _position(dsn)

        async def received() -> bool:
            rows = await execute(dsn, "SELECT (write_lsn - '0/0')::int8 FROM pg_stat_replication")
            return bool(rows and rows[0][0] >= behind)

        await until(received, 20, "PostgreSQL knows what was received")
        await stops_soon(own_pg)
        await own_pg.start()
        await settled(config)


async def test_postgresql_stops_at_once_while_positions_are_confirmed(
    own_pg: Postgres, own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.pipeline.checkpoint.EVERY", 0.005)
    dsn = own_pg.dsn()
    config = source(dsn, own_nats.url)
    await execute(dsn, TABLE)
    async with bridge(config):
        await settled(config)
        for round_ in range(3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_write, dsn, round_ * 100_000)
                await until(lambda: _past(config, round_ * 100), 20, "changes come in")  # noqa: B023
                await anyio.sleep(0.3)
                await stops_soon(own_pg)
            await own_pg.start()
            await settled(config)
    await agrees(config)


async def _write(dsn: str, start: int) -> None:
    """One row a transaction until the server is gone."""
    try:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as writer:
            for number in range(start, start + 100_000):
                await writer.execute("INSERT INTO t VALUES (%s, 'x')", [number])
    except psycopg.Error:
        return


async def test_a_bridge_that_cannot_publish_leaves_postgresql_and_comes_back(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STUCK_AFTER", 3.0)
    monkeypatch.setattr(watch.Stuck, "pause", 1.0)
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, SLOT.format(oracle))
    async with bridge(config), broker_of(config) as broker:
        await settled(config)
        made = (await broker.api(f"STREAM.INFO.{config.stream.name}"))["config"]
        # The broker answers everything else, only the stream takes nothing.
        await broker.api(f"STREAM.UPDATE.{config.stream.name}", {**made, "discard": "new", "max_bytes": 100_000})
        await execute(pg_db, FILL.format(1, 30_000))

        async def left() -> bool:
            return await walsender(config) is None

        await until(left, 20, "the replication connection is closed")
        await broker.api(f"STREAM.UPDATE.{config.stream.name}", made)
        await settled(config)
    await agrees(config, oracle)


async def test_while_the_stream_takes_everything_the_connection_stays(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STUCK_AFTER", 1.0)
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
        pid = await walsender(config)
        async with await psycopg.AsyncConnection.connect(pg_db) as writer:
            await writer.execute("INSERT INTO t VALUES (1, 'a transaction that is open for long')")
            await anyio.sleep(2.5)
            await writer.commit()
        await settled(config)
        assert await walsender(config) == pid
    await agrees(config)


async def test_an_open_transaction_of_ours_is_not_confirmed(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.t", "public.mar*"])
    await execute(pg_db, TABLE, "CREATE TABLE other (a int, b text)")
    oracle = f"o_{config.source.name}"
    await execute(pg_db, SLOT.format(oracle))
    async with bridge(config):
        await settled(config)
        async with await psycopg.AsyncConnection.connect(pg_db) as writer:
            await writer.execute("INSERT INTO t VALUES (1, 'open')")
            for _ in range(3):
                await execute(pg_db, "INSERT INTO other SELECT g, repeat('y', 300) FROM generate_series(1, 3000) g")
            position = await _position(pg_db)

            async def reached() -> bool:
                return await _confirmed(config) >= position

            # What is committed by others is confirmed; what is open will come, for its commit lies behind.
            await until(reached, 20, "the slot has advanced")
            await writer.commit()
        await settled(config)
        await execute(pg_db, "INSERT INTO other VALUES (1, 'z')")
    async with bridge(config):
        await settled(config)
    await agrees(config, oracle)


async def test_while_a_change_waits_for_room_nothing_at_or_after_it_is_confirmed(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.setattr("bridge.pipeline.checkpoint.EVERY", 0.1)
    monkeypatch.setattr("bridge.pipeline.checkpoint.IDLE_EVERY", 0.1)
    config = source(pg_db, nats.url, tables=["public.t", "public.mar*"])
    await execute(pg_db, TABLE, "CREATE TABLE other (a int, b text)")
    async with bridge(config), broker_of(config) as broker:
        await settled(config)
        made = (await broker.api(f"STREAM.INFO.{config.stream.name}"))["config"]
        await broker.api(f"STREAM.UPDATE.{config.stream.name}", {**made, "discard": "new", "max_bytes": 10_000})
        await execute(pg_db, "INSERT INTO t VALUES (1, repeat('x', 20000))")
        committed = await _position(pg_db)
        await until(lambda: lines(said, "publish refused"), 20, "the stream is full")
        for _ in range(4):
            await execute(pg_db, "INSERT INTO other SELECT g, repeat('y', 300) FROM generate_series(1, 1000) g")
            await anyio.sleep(0.5)
        assert await _confirmed(config) < committed
        await broker.api(f"STREAM.UPDATE.{config.stream.name}", made)
        end = await _position(pg_db)

        async def reached() -> bool:
            return await _confirmed(config) >= end

        await until(reached, 30, "the slot has advanced")
    await agrees(config)


async def _position(dsn: str) -> int:
    return int((await execute(dsn, "SELECT (pg_current_wal_lsn() - '0/0')::int8"))[0][0])


async def _confirmed(config: Config) -> int:
    rows = await execute(
        str(config.source.dsn),
        "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots"
        f" WHERE slot_name = '{config.source.slot}'",
    )
    return int(rows[0][0])


async def test_the_roles_and_the_servers_timeouts_do_not_reach_our_connections(own_pg: Postgres) -> None:
    dsn = own_pg.dsn()
    version = (await execute(dsn, "SHOW server_version_num"))[0][0]
    timeouts = ["wal_sender_timeout", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    timeouts += ["idle_session_timeout"] if int(version) >= 140000 else []
    timeouts += ["transaction_timeout"] if int(version) >= 170000 else []
    for name in timeouts:
        await execute(dsn, f"ALTER ROLE postgres SET {name} = '1s'", f"ALTER SYSTEM SET {name} = '1s'")
    await execute(dsn, "SELECT pg_reload_conf()")
    for replication in (False, True):
        async with connection.connect(dsn, replication=replication) as made:
            await anyio.sleep(2)
            shown = {name: (await connection.query(made.pgconn, f"SHOW {name}"))[0][name] for name in timeouts}
        assert shown.pop("wal_sender_timeout") == ("10min" if replication else "1s")
        assert set(shown.values()) == {"0"}


async def test_a_short_wal_sender_timeout_cuts_nobody_off(
    own_pg: Postgres, own_nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy, dsn = proxied(own_nats.port), own_pg.dsn()
    config = source(dsn, f"nats://127.0.0.1:{proxy.port}")
    await execute(dsn, TABLE, "ALTER SYSTEM SET wal_sender_timeout = '1s'", "SELECT pg_reload_conf()")
    async with bridge(config):
        await settled(config)
        pid = await walsender(config)
        await anyio.sleep(3)
        proxy.hold()  # nothing is read from the walsender any more once the window is full
        await execute(dsn, FILL.format(1, 60_000))
        await anyio.sleep(3)
        proxy.release()
        await settled(config, 60)
        assert await walsender(config) == pid
    await agrees(config)


@pytest.mark.usefixtures("hasty")
async def test_a_catalogue_that_is_locked_is_waited_for_and_said(pg_db: str, nats: NatsServer, said: Said) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, SLOT.format(oracle))
    async with bridge(config):
        await settled(config)
        pid = await walsender(config)
        async with locked(pg_db, "pg_inherits") as holder:
            await execute(pg_db, "CREATE TABLE late (id int PRIMARY KEY)", "INSERT INTO late VALUES (1)")
            await until(lambda: lines(said, "PostgreSQL takes long"), 20, "it is said")
            assert lines(said, "PostgreSQL takes long")[0]["blocked_by_pids"] == [holder]
            first = await _replied(config)
            await until(lambda: _replied_after(config, first), 20, "the walsender still gets feedback")
        await settled(config)
        assert await walsender(config) == pid
    assert lines(said, "PostgreSQL answers")
    await agrees(config, oracle)


async def _replied(config: Config) -> Any:
    rows = await execute(
        str(config.source.dsn),
        "SELECT r.reply_time FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid"
        f" WHERE s.slot_name = '{config.source.slot}'",
    )
    return rows[0][0]


async def _replied_after(config: Config, first: Any) -> bool:
    return bool(await _replied(config) > first)


@pytest.mark.usefixtures("hasty")
async def test_a_lock_that_lets_nobody_in_is_survived(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, SLOT.format(oracle))
    async with bridge(config):
        await settled(config)
        async with await psycopg.AsyncConnection.connect(pg_db) as writer:
            await writer.execute("CREATE TABLE late (id int PRIMARY KEY)")
            await writer.execute("INSERT INTO late VALUES (1)")
            async with locked(pg_db, "pg_attribute"):
                await writer.commit()
                await anyio.sleep(12)
        await settled(config)
    await agrees(config, oracle)


@pytest.mark.usefixtures("hasty")
async def test_a_walsender_that_is_held_up_while_it_decodes_is_not_cut_off(
    pg_db: str, nats: NatsServer, said: Said
) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(
        pg_db,
        TABLE,
        "CREATE TYPE mood AS ENUM ('sad', 'glad')",
        "CREATE TABLE moods (id int PRIMARY KEY, mood mood)",
        SLOT.format(oracle),
    )
    async with bridge(config):
        await settled(config)
        pid = await walsender(config)
        async with await psycopg.AsyncConnection.connect(pg_db) as writer:
            await writer.execute("INSERT INTO moods VALUES (1, 'glad')")
            # The walsender looks the value's label up there, and nobody else has to.
            async with locked(pg_db, "pg_enum") as holder:
                await writer.commit()

                def blockers() -> list[Any]:
                    # On a slow machine it may take long before it waits for anybody.
                    told = [line.get("blocked_by_pids") for line in lines(said, "PostgreSQL takes long")]
                    return [pids for pids in told if pids]

                await until(blockers, 30, "it is said")
                assert blockers() == [[holder]]
                await anyio.sleep(4)
        await settled(config)
        assert await walsender(config) == pid
    await agrees(config, oracle)


async def test_a_walsender_that_decodes_what_nobody_gets_is_not_cut_off(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("ASK_EVERY", 0.05), ("SILENCE", 0.1)):
        monkeypatch.setattr(watch, name, seconds)
    looked: list[patience.Doing | None] = []
    look = patience.look

    async def spying(parameters: dict[str, Any], pid: int) -> patience.Doing | None:
        looked.append(await look(parameters, pid))
        return looked[-1]

    monkeypatch.setattr(patience, "look", spying)
    config = source(pg_db, nats.url, tables=["public.t", "public.mar*"])
    await execute(
        pg_db,
        TABLE,
        "CREATE TABLE big (a int, b text)",
        "INSERT INTO big SELECT g, repeat('x', 50) FROM generate_series(1, 400000) g",
    )
    async with bridge(config):
        await settled(config)
        pid = await walsender(config)
        # Written anew, row by row, and decoded without a word to anybody.
        await execute(pg_db, "ALTER TABLE big ALTER a TYPE text", "INSERT INTO t VALUES (1, 'after')")
        await settled(config, 60)
        assert await walsender(config) == pid
    assert any(found is not None and not found.waits_for_us for found in looked)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("which", ["replication", "sql", "all"])
async def test_a_half_open_connection_to_postgresql_is_noticed(
    pg: Postgres, pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy], which: str
) -> None:
    proxy = proxied(pg.port)
    config = source(through(pg_db, pg, proxy), nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, SLOT.format(oracle))
    async with bridge(config):
        await settled(config)
        pid = await walsender(config)
        condition = {"all": "true", "replication": f"pid = {pid}", "sql": "backend_type = 'client backend'"}[which]
        ports = await execute(
            pg_db,
            f"SELECT client_port FROM pg_stat_activity WHERE application_name = 'bridge' AND {condition}"
            f" AND datname = current_database()",
        )
        assert ports
        _strand(proxy, {port for (port,) in ports})
        await execute(pg_db, "CREATE TABLE late (id int PRIMARY KEY)", "INSERT INTO late VALUES (1)")

        async def again() -> bool:
            return await walsender(config) not in (None, pid)

        await until(again, 40, "another walsender")
        await settled(config)
    await agrees(config, oracle)
    assert len(await events(config, "late")) == 1


def _strand(proxy: Proxy, ports: set[int]) -> None:
    """Half-opens the connections that reach the server from these ports."""
    for one in proxy._connections:
        if one._ends[1].getsockname()[1] in ports:
            one.strand(to_server=True, to_client=True)


async def test_what_the_dsn_says_of_the_connection_wins() -> None:
    ours = connection.parameters("postgresql://u@h/d")
    assert (ours["tcp_user_timeout"], ours["keepalives_idle"], ours["connect_timeout"]) == (30_000, 10, 10)
    given = connection.parameters("host=h tcp_user_timeout=5 keepalives_idle=7 application_name=mine options='-c a=b'")
    assert (given["tcp_user_timeout"], given["keepalives_idle"], given["application_name"]) == ("5", "7", "mine")
    assert given["options"].startswith("-c a=b -c timezone=UTC")


async def test_a_backend_that_waits_for_us_has_lost_us_and_is_ended(pg_db: str) -> None:
    async with connection.connect(pg_db) as sql, locked(pg_db, "pg_inherits") as holder:
        parameters = patience.again(sql.pgconn)
        doubt = patience.Doubt(sql.pgconn, "a statement")
        await doubt.ask()
        with pytest.raises(Unavailable, match="waits for us"):
            await doubt.ask()
        assert await patience.look(parameters, holder) is None  # somebody else's, not ours
        await until(lambda: _gone(parameters, sql.info.backend_pid), 10, "who has lost us is ended")


@pytest.mark.usefixtures("hasty")
async def test_a_half_open_connection_in_the_middle_of_a_snapshot_is_noticed(
    pg: Postgres, pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(pg.port)
    config = source(through(pg_db, pg, proxy), nats.url)
    await execute(pg_db, TABLE, FILL.format(1, 60_000))
    proxy.delay = 0.2
    async with bridge(config):
        await until(lambda: _copying(pg_db), 20, "the snapshot is read")
        ports = await execute(
            pg_db, "SELECT client_port FROM pg_stat_activity JOIN pg_stat_progress_copy USING (pid)"
        )  # fmt: skip
        _strand(proxy, {port for (port,) in ports})
        proxy.delay = 0.0
        await settled(config, 60)
    await agrees(config)


async def _gone(parameters: dict[str, Any], pid: int) -> bool:
    return await patience.look(parameters, pid) is None
