"""What is away is waited for; what is wrong is one clear error; what contradicts stops the bridge and says so."""

from __future__ import annotations

import secrets
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import psutil
import pytest
from structlog.testing import capture_logs

from bridge.config import Config, Secret
from bridge.embedded import NatsServer, Postgres, until
from bridge.errors import (
    BridgeError,
    Fenced,
    ForeignWriter,
    Gap,
    OtherDatabase,
    ServerRefused,
    SlotLost,
    SlotMissing,
    StreamGone,
    StreamHole,
)
from bridge.source.slot import Server
from bridge.stream import subjects
from bridge.stream.state import Checkpoint, SnapshotStatus, State, TableRecord
from tests.oracle import agrees
from tests.proxy import Proxy
from tests.running import (
    Process,
    bridge,
    broker_of,
    checkpoint,
    events,
    execute,
    failure,
    messages,
    settled,
    source,
    streaming,
    toml,
    writers,
)

pytestmark = pytest.mark.anyio

TABLES = ("t", "mark", "empty")
TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"


async def refused(config: Config, *words: str) -> None:
    error = await failure(config)
    assert isinstance(error, ServerRefused), repr(error)
    assert error.exit_code == 4
    for word in words:
        assert word in str(error)


async def test_a_wrong_password_is_one_clear_error(own_pg: Postgres, nats: NatsServer, tmp_path: Path) -> None:
    await execute(own_pg.dsn(), "CREATE ROLE guarded LOGIN REPLICATION PASSWORD 'right'")
    hba = own_pg.data_dir / "pg_hba.conf"
    hba.write_text("host all guarded 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
    await execute(own_pg.dsn(), "SELECT pg_reload_conf()")
    wrong = own_pg.dsn(user="guarded").replace("guarded@", "guarded:swordfish@")
    process = Process(tmp_path, toml(source(wrong, nats.url)))
    process.start()
    assert await process.wait() == 4
    assert "password authentication failed" in process.text
    assert "swordfish" not in process.text
    assert "Traceback" not in process.text
    await refused(source(own_pg.dsn(user="guarded"), nats.url), "asks for a password", "PGPASSWORD")
    right = source(wrong.replace("swordfish", "right"), nats.url)
    await execute(own_pg.dsn(), TABLE, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO guarded")
    async with bridge(right):
        await streaming(right)


async def test_what_the_server_does_not_allow_is_refused_with_the_remedy(own_pg: Postgres, nats: NatsServer) -> None:
    dsn = own_pg.dsn()
    await execute(dsn, TABLE, "CREATE ROLE weak LOGIN", "CREATE ROLE blind LOGIN REPLICATION")
    await refused(source(own_pg.dsn(user="weak"), nats.url), "ALTER ROLE weak REPLICATION")
    await refused(source(own_pg.dsn(user="blind"), nats.url), "public.t", "GRANT SELECT")
    await execute(dsn, "GRANT SELECT ON t TO blind", "ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    await refused(source(own_pg.dsn(user="blind"), nats.url), "public.t", "BYPASSRLS")
    await refused(source(dsn, nats.url, tables=["public.t", "public.absent"]), "public.absent", "[source] tables")
    await refused(source(own_pg.dsn("absent"), nats.url), 'database "absent" does not exist', "[source] dsn")
    await refused(source(own_pg.dsn(user="nobody"), nats.url), "nobody")
    setting = await execute(dsn, "SELECT count(*) FROM pg_settings WHERE name = 'output_plugin_libraries'")
    if setting == [(1,)]:
        await execute(dsn, "ALTER SYSTEM SET output_plugin_libraries = pgoutput", "SELECT pg_reload_conf()")
        await refused(source(dsn, nats.url), "ALTER SYSTEM SET output_plugin_libraries")
        await execute(dsn, "ALTER SYSTEM RESET output_plugin_libraries")
    await execute(dsn, "ALTER SYSTEM SET wal_level = replica")
    for (name,) in await execute(dsn, "SELECT slot_name FROM pg_replication_slots"):
        await execute(dsn, f"SELECT pg_drop_replication_slot('{name}')")
    await own_pg.restart()
    await refused(source(dsn, nats.url), "wal_level is replica", "ALTER SYSTEM SET wal_level = logical")


async def test_a_missing_plugin_is_named(own_pg: Postgres, nats: NatsServer, monkeypatch: Any) -> None:
    monkeypatch.setattr("bridge.source.slot.PLUGIN", "no_such_plugin")
    monkeypatch.setattr("bridge.source.slot.inspect", allowed)
    await refused(source(own_pg.dsn(), nats.url), "no_such_plugin")


async def allowed(_: object, **_options: object) -> Server:
    return Server(150000, "logical", "UTF8", "postgres", "postgres", True, False, None)


@pytest.mark.parametrize("away", ["postgresql", "nats", "both"])
async def test_servers_that_are_away_at_the_start_are_waited_for(
    pg: Postgres, pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy], tmp_path: Path, away: str
) -> None:
    database, broker = proxied(pg.port), proxied(nats.port)
    config = source(pg_db.replace(f":{pg.port}/", f":{database.port}/"), f"nats://127.0.0.1:{broker.port}")
    await execute(pg_db, TABLE, "INSERT INTO t VALUES (1, 'a')")
    down = [p for p in (database, broker) if away in ("both", "postgresql" if p is database else "nats")]
    for proxy in down:
        await proxy.refuse()
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await process.said("waiting")
        await anyio.sleep(3)  # several attempts
        assert process.text.count("[warning") == 1, process.text
        for proxy in down:
            proxy.accept()
        await settled(config)
        assert process.text.count("back") >= 1
        assert await process.end() == 0
        assert "Traceback" not in process.text
    finally:
        process.close()
    await agrees(config)


async def test_a_bridge_that_waits_can_be_stopped(
    pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy], tmp_path: Path
) -> None:
    proxy = proxied(nats.port)
    process = Process(tmp_path, toml(source(pg_db, f"nats://127.0.0.1:{proxy.port}")))
    await execute(pg_db, TABLE, "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 30000) g")
    process.start()
    try:
        await process.said("slot created")
        proxy.hold()  # within the snapshot
        assert await process.end(seconds=10) == 0
        await proxy.refuse()
        process.start()
        await process.said("waiting")
        assert await process.end(seconds=10) == 0
        assert "Traceback" not in process.text
    finally:
        process.close()


async def test_connections_that_break_in_the_middle_lose_nothing(
    pg: Postgres, pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    database, broker = proxied(pg.port), proxied(nats.port)
    config = source(pg_db.replace(f":{pg.port}/", f":{database.port}/"), f"nats://127.0.0.1:{broker.port}")
    oracle = f"o_{config.source.name}"
    await execute(
        pg_db, TABLE, "CREATE TABLE mark (id text PRIMARY KEY)",
        f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')",
    )  # fmt: skip
    async with bridge(config):
        await streaming(config)
        for round_ in range(4):
            await execute(
                pg_db, f"INSERT INTO t SELECT g, 'x' FROM generate_series({round_ * 9000}, {round_ * 9000 + 8999}) g"
            )
            await (broker, database)[round_ % 2].cut()
        await settled(config, 60)
    await agrees(config, oracle)


@pytest.fixture
async def written(pg_db: str, nats: NatsServer) -> Config:
    """A source whose bridge has run and stopped, with a change that it has not seen yet."""
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, "INSERT INTO t VALUES (1, 'a')")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES (2, 'b'), (3, 'c')")
        await settled(config)
    await execute(pg_db, "INSERT INTO t VALUES (4, 'd')")
    return config


async def contradicts(config: Config, kind: type[BridgeError], *words: str) -> None:
    before = await execute(
        str(config.source.dsn),
        f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'",
    )
    error = await failure(config)
    assert type(error) is kind, repr(error)
    assert error.exit_code == 3
    for word in words:
        assert word in str(error)
    after = await execute(
        str(config.source.dsn),
        f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'",
    )
    assert after == before


async def api(config: Config, verb: str, body: dict[str, Any] | None = None) -> Any:
    async with broker_of(config) as broker:
        return await broker.api(verb, body)


def whys(said: list[MutableMapping[str, Any]]) -> list[str]:
    """Why the bridge has waited, each reason as often as it was told."""
    return [line["why"] for line in said if line["event"] == "waiting"]


@pytest.mark.parametrize("which", ["the walsender", "every session"])
async def test_a_session_that_somebody_ends_is_told_as_that(pg_db: str, nats: NatsServer, which: str) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    mine = f"pid = (SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{config.source.slot}')"
    if which == "every session":
        mine = "datname = current_database() AND application_name = 'bridge'"
    with capture_logs() as said:
        async with bridge(config):
            await settled(config)
            await execute(pg_db, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {mine}")
            await until(lambda: [line["event"] for line in said].count("streaming") == 2, 30, "it goes on")
            await settled(config)
    ended = "PostgreSQL has ended a session of the bridge"
    assert whys(said) == [f"{ended} (terminating connection due to administrator command, SQLSTATE 57P01)"]
    assert "pg_terminate_backend" in next(line["next"] for line in said if line["event"] == "waiting")


async def test_a_server_that_stops_is_told_as_away_while_it_is(own_pg: Postgres, nats: NatsServer) -> None:
    config = source(own_pg.dsn(), nats.url)
    await execute(own_pg.dsn(), TABLE)
    with capture_logs() as said:
        async with bridge(config):
            await settled(config)
            await own_pg.stop()
            await until(lambda: any("PostgreSQL is away" in why for why in whys(said)), 30, "it is told")
            await own_pg.start()
            await settled(config)
    first = next(line for line in said if line["event"] == "waiting")
    assert "PostgreSQL has ended a session of the bridge" in first["why"]
    assert "the server stops" in first["next"]


async def test_a_dropped_slot_is_no_silent_gap(written: Config) -> None:
    await execute(str(written.source.dsn), f"SELECT pg_drop_replication_slot('{written.source.slot}')")
    await contradicts(written, SlotMissing, written.source.slot, "bridge drop")


async def test_a_slot_advanced_behind_our_back_is_no_silent_gap(written: Config) -> None:
    await execute(
        str(written.source.dsn),
        f"SELECT pg_replication_slot_advance('{written.source.slot}', pg_current_wal_lsn())",
    )
    await contradicts(written, Gap, written.source.slot, "bridge drop")


async def test_a_deleted_stream_is_not_made_again(written: Config) -> None:
    await api(written, f"STREAM.DELETE.{written.stream.name}")
    await contradicts(written, StreamGone, written.stream.name)


async def test_a_stream_made_again_is_noticed(written: Config) -> None:
    info = await api(written, f"STREAM.INFO.{written.stream.name}")
    await api(written, f"STREAM.DELETE.{written.stream.name}")
    await api(written, f"STREAM.CREATE.{written.stream.name}", info["config"])
    await contradicts(written, StreamGone, "made again")


async def test_a_purged_stream_goes_on(written: Config) -> None:
    await api(written, f"STREAM.PURGE.{written.stream.name}")
    async with bridge(written):
        await settled(written)
    assert [e["key"] for e in await events(written, "t")] == [{"id": 4}]


async def test_a_lost_state_bucket_is_made_again_from_the_tail(written: Config) -> None:
    await api(written, f"STREAM.DELETE.KV_{written.state.bucket}")
    async with bridge(written):
        await settled(written)
        found = await checkpoint(written)
        assert found is not None
    await agrees(written)


async def read_again(config: Config, table: str) -> bool:
    """Whether a table's rows were read while the stream flowed."""
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        found = await state.get(subjects.snapshot_key(config.source.name, "public", table), SnapshotStatus)
    return found is not None and (found[0].state, found[0].mode) == ("done", "incremental")


@pytest.mark.parametrize("running", [True, False])
async def test_a_lost_state_bucket_claims_of_the_tables_what_the_stream_proves(written: Config, running: bool) -> None:
    dsn, name = str(written.source.dsn), written.source.name
    await execute(dsn, "CREATE TABLE empty (id int PRIMARY KEY)")
    if running:
        async with bridge(written):
            await settled(written)
            await api(written, f"STREAM.DELETE.KV_{written.state.bucket}")

            async def again() -> bool:
                found = await checkpoint(written)
                return found is not None and found.phase == "stream"

            await until(again, 30, "the bucket is there again")
            await settled(written)
            await until(partial(read_again, written, "mark"), 30, "the table is read again")
            epochs = await writers(written)
    else:
        await api(written, f"STREAM.DELETE.KV_{written.state.bucket}")
        async with bridge(written):
            await settled(written)
            await until(partial(read_again, written, "mark"), 30, "the table is read again")
            epochs = await writers(written)
    found = await messages(written)
    assert [w.epoch for w in epochs] == [found[-1][0].epoch]
    marker = next(m.seq for m, e in found if (e.table, e.op) == ("t", "snapshot"))
    async with broker_of(written) as broker:
        state = await State.open(broker, written.state.bucket)
        status = {t: await state.get(subjects.snapshot_key(name, "public", t), SnapshotStatus) for t in TABLES}
        assert [await state.get(subjects.table_key(name, "public", t), TableRecord) for t in TABLES].count(None) == 0
    claims = {table: (entry[0].state, entry[0].complete_from) for table, entry in status.items() if entry}
    assert claims["t"] == ("done", marker)
    # Made while the bridge streamed: no marker shows it. So it is read again.
    assert claims["mark"][0] == "done"
    assert claims["mark"][1] > marker
    assert claims["empty"][0] == "done"


async def test_another_database_behind_the_same_dsn_is_noticed(written: Config) -> None:
    async with Postgres.throwaway(fsync=False) as other:
        await execute(other.dsn(), TABLE)
        moved = msgspec.structs.replace(
            written, source=msgspec.structs.replace(written.source, dsn=Secret(other.dsn()))
        )
        await contradicts(moved, OtherDatabase, "system")


async def test_a_foreign_message_at_the_tail_is_noticed_and_can_be_removed(written: Config) -> None:
    async with broker_of(written) as broker:
        await broker.request(subjects.table_subject("cdc", written.source.name, "public", "t"), b"{}")
    await contradicts(written, ForeignWriter, "nats stream rmm")
    state = (await api(written, f"STREAM.INFO.{written.stream.name}"))["state"]
    await api(written, f"STREAM.MSG.DELETE.{written.stream.name}", {"seq": state["last_seq"]})
    async with bridge(written):
        await settled(written)
    assert [e["key"]["id"] for e in await events(written, "t")] == [1, 2, 3, 4]


async def test_a_foreign_message_while_the_bridge_runs_stops_it(written: Config) -> None:
    async def intrude() -> None:
        await streaming(written)
        async with broker_of(written) as broker:
            await broker.request(subjects.table_subject("cdc", written.source.name, "public", "t"), b"{}")
        await execute(str(written.source.dsn), "INSERT INTO t VALUES (5, 'e')")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(intrude)
        error = await failure(written)
    assert isinstance(error, ForeignWriter)


async def test_a_hole_in_the_middle_is_noticed(written: Config) -> None:
    await api(written, f"STREAM.MSG.DELETE.{written.stream.name}", {"seq": 3})
    await contradicts(written, StreamHole, "1 are missing")


async def test_a_newer_epoch_fences_an_older_bridge(written: Config) -> None:
    async def overtake() -> None:
        await streaming(written)
        async with broker_of(written) as broker:
            headers = {"Bridge-Op": "insert", "Bridge-Position": "f" * 8, "Bridge-Epoch": "99", "Bridge-V": "1"}
            subject = subjects.table_subject("cdc", written.source.name, "public", "t")
            await broker.request(subject, b"{}", headers=headers)
        await execute(str(written.source.dsn), "INSERT INTO t VALUES (5, 'e')")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(overtake)
        error = await failure(written)
    assert isinstance(error, Fenced)
    assert error.exit_code == 3


async def test_a_predecessors_late_checkpoint_is_written_over(written: Config) -> None:
    async with broker_of(written) as broker, bridge(written):
        await settled(written)
        state = await State.open(broker, written.state.bucket)
        key = subjects.checkpoint_key(written.source.name)
        kept = await state.get(key, Checkpoint)
        assert kept is not None
        await state.put(key, msgspec.structs.replace(kept[0], epoch=1, at="late"))
        await execute(str(written.source.dsn), "INSERT INTO t VALUES (5, 'e')")
        await settled(written)

        async def ours() -> bool:
            now = await state.get(key, Checkpoint)
            return now is not None and now[0].stream_seq > kept[0].stream_seq and now[0].at != "late"

        await until(ours, 20, "the checkpoint goes on")
    await agrees(written)


async def test_a_newer_bridges_checkpoint_fences_an_older_one(written: Config) -> None:
    async def overtake() -> None:
        await streaming(written)
        async with broker_of(written) as broker:
            state = await State.open(broker, written.state.bucket)
            key = subjects.checkpoint_key(written.source.name)
            kept = await state.get(key, Checkpoint)
            assert kept is not None
            await state.put(key, msgspec.structs.replace(kept[0], epoch=99))
        await execute(str(written.source.dsn), "INSERT INTO t VALUES (5, 'e')")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(overtake)
        error = await failure(written)
    assert isinstance(error, Fenced)


async def test_an_unfinished_snapshot_starts_over(written: Config) -> None:
    async with broker_of(written) as broker:
        state = await State.open(broker, written.state.bucket)
        key = subjects.checkpoint_key(written.source.name)
        kept = await state.get(key, Checkpoint)
        assert kept is not None
        await state.put(key, msgspec.structs.replace(kept[0], phase="snapshot"), kept[1])
    async with bridge(written):
        await settled(written)
    found = await agrees(written)
    assert [e.op for _, e in found if e.table == "t"].count("snapshot") == 4


async def test_planted_values_appear_in_no_output(own_pg: Postgres, nats: NatsServer, tmp_path: Path) -> None:
    secret = f"planted{secrets.token_hex(4)}"
    config = source(own_pg.dsn().replace("postgres@", f"postgres:{secret}@"), nats.url)
    process = Process(tmp_path, toml(config))
    await execute(
        own_pg.dsn(),
        "CREATE TABLE t (id text PRIMARY KEY, body text)",
        f"INSERT INTO t VALUES ('{secret}', '{secret}')",
    )
    process.start("--log-format", "json", "-v")
    try:
        await process.said("streaming")
        await execute(own_pg.dsn(), f"UPDATE t SET body = 'more {secret}'", f"UPDATE t SET id = '{secret}2'")
        await execute(own_pg.dsn(), "CREATE TABLE keyless (body text)", f"INSERT INTO keyless VALUES ('{secret}')")
        await settled(config)
        await execute(own_pg.dsn(), f"UPDATE keyless SET body = '{secret}2'")
        assert await process.wait() == 3
        assert "no replica identity" in process.text
        await execute(own_pg.dsn(), "DROP TABLE keyless")
        assert secret not in process.text
        assert "Traceback" not in process.text
    finally:
        process.close()


async def test_a_slot_whose_wal_is_gone_is_no_silent_gap(nats: NatsServer) -> None:
    async with Postgres.throwaway(fsync=False, settings={"max_slot_wal_keep_size": "1MB"}) as server:
        config = source(server.dsn(), nats.url)
        await execute(server.dsn(), TABLE)
        async with bridge(config):
            await settled(config)
        for _ in range(3):
            await execute(server.dsn(), "INSERT INTO t SELECT 1, 'x' WHERE false", "SELECT pg_switch_wal()")
            await execute(server.dsn(), "CREATE TABLE IF NOT EXISTS filler (a int)", "INSERT INTO filler VALUES (1)")
        await execute(server.dsn(), "CHECKPOINT")
        await contradicts(config, SlotLost, "max_slot_wal_keep_size")


async def test_a_wrong_login_at_the_broker_is_one_clear_error(pg_db: str) -> None:
    login = '{ users: [ { user: "writer", password: "right" } ] }'
    async with NatsServer.throwaway(settings={"authorization": login}) as guarded:
        wrong = source(pg_db, guarded.url, stream={"user": "writer", "password": Secret("swordfish")})
        error = await failure(wrong)
        assert isinstance(error, ServerRefused)
        assert "swordfish" not in str(error)
        right = source(pg_db, guarded.url, stream={"user": "writer", "password": Secret("right")})
        async with bridge(right):
            await settled(right)


async def test_a_full_stream_is_waited_for(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await settled(config)
        made = (await api(config, f"STREAM.INFO.{config.stream.name}"))["config"]
        await api(config, f"STREAM.UPDATE.{config.stream.name}", {**made, "discard": "new", "max_bytes": 100_000})
        await execute(pg_db, "INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series(1, 3000) g")
        await process.said("publish refused")
        await api(config, f"STREAM.UPDATE.{config.stream.name}", made)
        await settled(config)
        assert process.text.count("publish refused") == 1
        assert await process.end() == 0
    finally:
        process.close()
    await agrees(config, oracle)


async def test_what_a_killed_bridge_had_sent_comes_in_late_and_only_once(
    pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy], tmp_path: Path
) -> None:
    proxy = proxied(nats.port)
    config = source(pg_db, nats.url)
    slow = msgspec.structs.replace(
        config, stream=msgspec.structs.replace(config.stream, servers=[f"nats://127.0.0.1:{proxy.port}"])
    )
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    killed = Process(tmp_path, toml(slow))
    killed.start()
    try:
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (0, 'so that the table is known')")
        await settled(config)
        proxy.hold()
        await execute(pg_db, "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2500) g")
        # Unread by the proxy: at least a first batch of what the bridge has sent.
        await until(lambda: _sent(killed, proxy), 10, "the bridge has sent")
    finally:
        killed.close()
    async with bridge(config):
        await streaming(config)
        proxy.release()
        await settled(config)
    await agrees(config, oracle)


def _sent(process: Process, proxy: Proxy) -> bool:
    """Whether bytes of the bridge wait in the proxy's socket."""
    assert process.process is not None
    sockets = psutil.Process(process.process.pid).net_connections("tcp")
    mine = [s for s in sockets if s.status == psutil.CONN_ESTABLISHED and s.raddr.port == proxy.port]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = {f"{proxy.port:04X}-{s.laddr.port:04X}" for s in mine}
    waiting = [
        int(line[4].split(":")[1], 16) for line in lines if f"{line[1].split(':')[1]}-{line[2].split(':')[1]}" in ends
    ]
    return any(size > 10_000 for size in waiting)
