"""What nobody sends on purpose: values that are no text, tables that change under way, odd names, a jumping clock."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from bridge.config import Config, Table
from bridge.embedded import NatsServer, until
from bridge.errors import BadRecord, BadState, ForeignWriter
from bridge.pipeline.streaming import Streaming
from bridge.source import lsn
from bridge.stream import Log, subjects
from bridge.stream import events as reading
from tests.oracle import agrees
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
)

pytestmark = pytest.mark.anyio

SLOT = "SELECT pg_create_logical_replication_slot('{}', 'wal2json')"
TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"
# A cast that checks nothing: the way by which bytes that are no text get into a column of a UTF8 database.
UNCHECKED = "CREATE CAST (bytea AS text) WITHOUT FUNCTION"
PLANTED = "'\\x706c616e746564ff'::bytea::text"  # "planted" and a byte that no UTF-8 has


@pytest.mark.parametrize("kind", ["text", "text[]"])
@pytest.mark.parametrize("way", ["stream", "snapshot"])
async def test_a_value_that_is_no_utf8_is_refused_by_name_and_goes_on_without_it(
    pg_db: str, nats: NatsServer, way: str, kind: str
) -> None:
    config = source(pg_db, nats.url)
    value = f"ARRAY[{PLANTED}]" if kind == "text[]" else PLANTED
    bad = f"INSERT INTO t VALUES (2, {value}, 'x')"
    await execute(pg_db, f"CREATE TABLE t (id int PRIMARY KEY, bad {kind}, good text)", UNCHECKED)
    if way == "snapshot":
        await execute(pg_db, bad)
    else:
        async with bridge(config):
            await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES (1, NULL, 'before')", bad)
    error = await failure(config)
    assert type(error) is BadRecord
    assert error.exit_code == 3
    assert "public.t holds in bad what is no valid text" in str(error)
    assert "planted" not in str(error)
    assert [m for m, _ in await messages(config) if b"planted" in m.data] == []
    without = msgspec.structs.replace(
        config, source=msgspec.structs.replace(config.source, table={"public.t": Table(exclude=["bad"])})
    )
    async with bridge(without):
        await settled(without)
    assert (await events(without, "t"))[-1]["after"] == {"id": 2, "good": "x"}
    for message, _ in await messages(without):
        message.data.decode()


async def test_what_is_no_utf8_in_a_table_that_is_not_published_harms_nobody(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.t", "public.mar*"])
    await execute(pg_db, TABLE, UNCHECKED, "CREATE TABLE other (id int PRIMARY KEY, body text)")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, f"INSERT INTO other VALUES (1, {PLANTED})", "INSERT INTO t VALUES (1, 'é')")
        await settled(config)
    await agrees(config)


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (b'{"action":"I","planted"', "cannot be read: DecodeError"),
        (b'{"action":"X","lsn":"0/1"}', "cannot be read: ValidationError at $.action"),
        (b'{"action":"I","lsn":"0/1","schema":"public","table":"planted\xff"}', "cannot be read"),
        (b'{"action":"I","lsn":"0/1","schema":"public","table":"t","columns":[{"name":"id","value":1}]}', "columns"),
        (b"", "cannot be read"),
    ],
)
async def test_a_record_that_is_none_stops_the_bridge_and_says_where(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, garbage: bytes, words: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
    await execute(pg_db, "INSERT INTO t VALUES (1, 'before')", "INSERT INTO t VALUES (2, 'garbled')")
    record = Streaming._record

    def garbling(self: Streaming, payload: memoryview) -> Any:
        return record(self, memoryview(garbage) if b"garbled" in bytes(payload) else payload)

    with monkeypatch.context() as garbled:
        garbled.setattr(Streaming, "_record", garbling)
        error = await failure(config)
    assert type(error) is BadRecord
    assert words in str(error)
    assert f"{len(garbage)} bytes" in str(error)
    assert "planted" not in str(error)
    async with bridge(config):
        await settled(config)
    await agrees(config)


OPERATIONS = ("insert", "update", "delete")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("change", [
    "INSERT INTO t VALUES (3, 'new')", "UPDATE t SET body = 'new' WHERE id = 1", "DELETE FROM t WHERE id = 1",
])  # fmt: skip
@pytest.mark.parametrize("times", [1, 2])
async def test_a_change_that_does_not_tell_its_row_is_read_once_more(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, change: str, times: int, full: bool
) -> None:
    """As wal2json does at times, where a table is altered while its change is decoded."""
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, "INSERT INTO t VALUES (1, 'before'), (2, 'other')")
    await execute(pg_db, *(["ALTER TABLE t REPLICA IDENTITY FULL"] if full else []))
    async with bridge(config):
        await settled(config)
    await execute(pg_db, change)
    record, left = Streaming._record, [times]
    untold = re.compile(rb',"pk":\[[^]]*\]' if full else rb',"(?:identity|pk)":\[[^]]*\]')
    refused = times > 1 and not full and "INSERT" not in change

    def leaving_out(self: Streaming, payload: memoryview) -> Any:
        data = bytes(payload)
        if b'"table":"t"' in data and left[0]:
            left[0] -= 1
            data = untold.sub(b"", data)
        return record(self, memoryview(data))

    with monkeypatch.context() as careless, capture_logs() as said:
        careless.setattr(Streaming, "_record", leaving_out)
        if refused:
            error = await failure(config)
            assert type(error) is BadRecord
            assert "does not tell its row" in str(error)
        async with bridge(config):
            await settled(config)
    assert left == [0]
    assert [line["event"] for line in said if "does not tell its row" in str(line.get("why"))] == ["waiting"]
    changes = [event for _, event in await messages(config) if event.table == "t" and event.op in OPERATIONS]
    keys = [msgspec.json.decode(event.key) for event in changes]
    # What is so both times is from a time without a key.
    assert keys == [None if times > 1 and not refused else {"id": 3 if "INSERT" in change else 1}]


AGAIN = "INSERT INTO t SELECT g, repeat('again', 800), g FROM generate_series(1, 9) g"
DDL = {
    "add": (["ALTER TABLE t ADD n int", "ALTER TABLE t ADD d text DEFAULT 'dflt'"], "n = 7, d = 'set'"),
    "drop": (["ALTER TABLE t DROP body"], "v = v + 1"),
    "rename column": (["ALTER TABLE t RENAME v TO w"], "w = w + 1"),
    "swap columns": (["ALTER TABLE t RENAME v TO x", "ALTER TABLE t ADD v text"], "x = 5, v = 'text'"),
    "type": (["ALTER TABLE t ALTER v TYPE text USING v::text || 'é'"], "v = v || '!'"),
    "type twice": (["ALTER TABLE t ALTER v TYPE numeric", "ALTER TABLE t ALTER v TYPE float8"], "v = v + 0.5"),
    # Who replays finds a row by its key: under another one it has to come again.
    "key": (["DELETE FROM t", "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (v, id)", AGAIN], "body = 'k'"),
    "key renamed": (["DELETE FROM t", "ALTER TABLE t RENAME id TO number", AGAIN], "body = 'key renamed'"),
    "key dropped": (["TRUNCATE t", "ALTER TABLE t DROP CONSTRAINT t_pkey, REPLICA IDENTITY FULL", AGAIN], "v = -v"),
    "full": (["ALTER TABLE t REPLICA IDENTITY FULL"], "body = 'full'"),
    "unlogged": (["ALTER TABLE t SET UNLOGGED", "ALTER TABLE t SET LOGGED"], "body = 'logged again'"),
}


@pytest.mark.parametrize("how", ["read at once", "read later", "one transaction"])
@pytest.mark.parametrize("what", DDL)
async def test_a_table_altered_between_its_writes_is_in_the_stream_as_it_is(
    pg_db: str, nats: NatsServer, what: str, how: str
) -> None:
    config = source(pg_db, nats.url)
    statements, change = DDL[what]
    oracle = f"o_{config.source.name}"
    # Every row is written again after each statement: only then can the stream have what DDL did to it.
    steps = [
        "INSERT INTO t SELECT g, repeat('long', 1000), g FROM generate_series(1, 20) g",
        "UPDATE t SET v = v + 1 WHERE v % 2 = 0",
        *statements,
        f"UPDATE t SET {change}",
        "DELETE FROM t WHERE ctid IN (SELECT ctid FROM t LIMIT 3)",
    ]
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text, v int NOT NULL)", SLOT.format(oracle))
    await execute(pg_db, "ALTER TABLE t ALTER body SET STORAGE EXTERNAL")
    async with bridge(config):
        await settled(config)
        if how == "read at once":
            for step in steps:
                await execute(pg_db, step)
                await settled(config)
    if how == "read later":
        await execute(pg_db, *steps)
    elif how == "one transaction":
        await execute(pg_db, ";".join(["BEGIN", *steps, "COMMIT"]))
    async with bridge(config):
        await settled(config)
        await execute(pg_db, f"UPDATE t SET {change}")
        await settled(config)
    await agrees(config, oracle)


@pytest.mark.parametrize("how", ["read at once", "read later", "one transaction"])
async def test_a_table_renamed_moved_dropped_and_made_again_goes_on_under_its_names(
    pg_db: str, nats: NatsServer, how: str
) -> None:
    config = source(pg_db, nats.url, tables=["public.*", "aside.*"])
    oracle = f"o_{config.source.name}"
    steps = [
        "INSERT INTO t VALUES (1, 'first'), (2, 'first')",
        "UPDATE t SET body = 'second'",
        "DELETE FROM t",
        "ALTER TABLE t RENAME TO u",
        "INSERT INTO u VALUES (1, 'renamed'), (2, 'renamed')",
        "CREATE TABLE t (name text PRIMARY KEY, n numeric)",  # another table under the old name
        "INSERT INTO t VALUES ('a', 1.50), ('b', 2)",
        "UPDATE t SET n = n * 2, name = name || '!'",
        "UPDATE u SET body = 'still there' WHERE id = 2",
        "DELETE FROM u",
        "CREATE SCHEMA aside",
        "ALTER TABLE u SET SCHEMA aside",
        "INSERT INTO aside.u VALUES (3, 'moved')",
        "UPDATE aside.u SET body = 'back' WHERE id = 3",
        "INSERT INTO aside.u VALUES (4, 'published')",
        "TRUNCATE t",
        "DROP TABLE t",
        "CREATE TABLE t (id int, body text)",
        "INSERT INTO t VALUES (7, 'keyless')",
    ]
    await execute(pg_db, TABLE, SLOT.format(oracle))
    async with bridge(config):
        await settled(config)
        if how == "read at once":
            for step in steps:
                await execute(pg_db, step)
                await settled(config)
    if how == "read later":
        await execute(pg_db, *steps)
    elif how == "one transaction":
        await execute(pg_db, ";".join(["BEGIN", *steps, "COMMIT"]))
    async with bridge(config):
        await settled(config)
    found = await agrees(config, oracle)
    assert {m.subject.split(".", 2)[2] for m, _ in found} == {"public.t", "public.u", "aside.u", "public.mark"}


async def test_a_record_with_columns_that_no_catalogue_has_is_published_as_it_is(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, "CREATE TYPE mood AS ENUM ('sad', 'glad')", SLOT.format(oracle))
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db,
        "ALTER TABLE t ADD brief mood, ADD more int[]",
        "INSERT INTO t VALUES (1, 'a', 'glad', '{1,2}')",
        "ALTER TABLE t DROP brief, DROP more",
        "DROP TYPE mood",
        "INSERT INTO t VALUES (2, 'b')",
    )
    async with bridge(config):
        await settled(config)
    await agrees(config, oracle)
    told, first, back, second = await events(config, "t")
    assert first["after"] == {"id": 1, "body": "a", "brief": "glad", "more": [1, 2]}
    assert second["after"] == {"id": 2, "body": "b"}
    # Of a type that is gone PostgreSQL has no name any more.
    assert {column["name"]: column["type"] for column in told["columns"]} == {
        "id": "integer", "body": "text", "brief": "???", "more": "integer[]",
    }  # fmt: skip
    assert back["old_columns"] == told["columns"]


ODD = ["we.ird *>$ tbl", "é" * 31 + "x", "日" * 21, 'quo"te\\', "%s {} ${x}", "a\tb\nc", ">", "*", "$JS", "=2E"]


async def test_tables_and_schemas_of_any_name_have_subjects_and_keys_of_their_own(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["*.*", "!oracle.*"])
    oracle = f"o_{config.source.name}"
    names = [(f'"{s}"', f'"{t}"') for s, t in ((a.replace('"', '""'), b.replace('"', '""')) for a, b in _pairs())]
    await execute(
        pg_db,
        *(f"CREATE SCHEMA IF NOT EXISTS {schema}" for schema, _ in names),
        *(f'CREATE TABLE {s}.{t} ("k.e y" int PRIMARY KEY, {t} text)' for s, t in names),
        *(f"INSERT INTO {s}.{t} VALUES (1, 'read')" for s, t in names),
        SLOT.format(oracle),
    )
    async with bridge(config):
        await streaming(config)
        for s, t in names:
            await execute(
                pg_db,
                f"INSERT INTO {s}.{t} VALUES (2, 'é')",
                f'UPDATE {s}.{t} SET "k.e y" = 3 WHERE "k.e y" = 1',
                f'DELETE FROM {s}.{t} WHERE "k.e y" = 2',
            )
        await settled(config)
    found = await agrees(config, oracle)
    assert {(e.schema, e.table) for _, e in found if e.table != "mark"} == set(_pairs())
    for message, one in found:
        assert message.subject == subjects.table_subject("cdc", config.source.name, one.schema, one.table)
        assert message.subject.count(".") == 3


def _pairs() -> list[tuple[str, str]]:
    return [*zip(ODD, reversed(ODD), strict=True), *((name, name) for name in ODD[:3])]


async def test_the_headers_of_an_event_stay_small_whatever_the_row(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    table = '"' + "日" * 21 + '"'
    columns = ", ".join(f'"{"é" * 28}{n:04}" text' for n in range(1000))
    await execute(pg_db, f"CREATE TABLE {table} (id int PRIMARY KEY, {columns})")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, f"INSERT INTO {table} (id) VALUES (1)", f"UPDATE {table} SET id = 2147483647")
        await settled(config)
        async with broker_of(config) as broker:
            info = await broker.stream(config.stream.name)
            assert info is not None
            for seq in range(info.first_seq, info.last_seq + 1):
                stored = await broker.message(config.stream.name, seq=seq)
                assert stored is not None
                # NATS takes 64 KB of headers; a batch adds its own three.
                assert sum(len(name) + len(value) + 4 for name, value in stored.headers.items()) < 400
    await agrees(config)


@pytest.mark.parametrize(
    "headers",
    [
        {"Bridge-Epoch": "²", "Bridge-Position": "x"},
        {"Bridge-Epoch": "9" * 5000},
        {"Bridge-Epoch": "1", "Bridge-Position": "not a position"},
        {"Bridge-Epoch": "-1"},
    ],
)
async def test_a_foreign_message_with_headers_like_ours_is_named(
    pg_db: str, nats: NatsServer, headers: dict[str, str]
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
    async with broker_of(config) as broker:
        subject = subjects.table_subject("cdc", config.source.name, "public", "t")
        await broker.request(subject, b"{}", headers={"Bridge-Op": "insert", **headers})
    assert type(await failure(config)) is ForeignWriter


async def test_a_foreign_message_with_headers_that_are_no_text_is_named(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
    async with broker_of(config) as broker:
        before = await broker.stream(config.stream.name)
        subject = subjects.table_subject("cdc", config.source.name, "public", "t")
        head = b"NATS/1.0\r\nBridge-Epoch: \xff\xfe\r\n\xc3: \x80\r\n\r\n"
        broker.write(b"HPUB %s %d %d\r\n%s{}\r\n" % (subject.encode(), len(head), len(head) + 2, head))

        async def there() -> bool:
            now = await broker.stream(config.stream.name)
            return now is not None and before is not None and now.last_seq > before.last_seq

        await until(there, 10, "the message is in the stream")
    assert type(await failure(config)) is ForeignWriter


@pytest.mark.parametrize("headers", [{"Bridge-Epoch": "9" * 5000}, {"Bridge-Epoch": "²"}, {}])
async def test_a_reader_names_a_foreign_message_whatever_its_headers(
    pg_db: str, nats: NatsServer, headers: dict[str, str]
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, "INSERT INTO t VALUES (1, 'a')")
    async with bridge(config):
        await settled(config)
    async with broker_of(config) as broker:
        await broker.request(subjects.table_subject("cdc", config.source.name, "public", "t"), b"\xff", headers=headers)
    reader = reading(nats.url, source=config.source.name, stream=config.stream.name, follow=False)
    with anyio.fail_after(30), pytest.raises((ForeignWriter, BadRecord)):
        await _read(reader)


async def _read(reader: Log) -> None:
    async with reader as items:
        async for item in items:
            assert item.event.op


@pytest.mark.parametrize("value", [b"garbage", b"\xff", b'{"phase":5}', b"[" * 5000])
async def test_a_key_of_the_bucket_that_holds_something_else_is_named(
    pg_db: str, nats: NatsServer, value: bytes
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
    key = subjects.checkpoint_key(config.source.name)
    async with broker_of(config) as broker:
        before = await broker.message(f"KV_{config.state.bucket}", last_by_subj=f"$KV.{config.state.bucket}.{key}")
        assert before is not None
        await broker.request(f"$KV.{config.state.bucket}.{key}", value)
        error = await failure(config)
        assert type(error) is BadState
        assert f"{config.state.bucket}/{key} holds {len(value)} bytes" in error.what
        assert "nats kv history" in error.remedy
        await broker.request(f"$KV.{config.state.bucket}.{key}", before.data)
    async with bridge(config):  # as the remedy says
        await settled(config)
    await agrees(config)


@pytest.mark.parametrize("way", ["stream", "snapshot"])
async def test_a_json_value_that_is_none_is_refused_and_gets_into_no_event(
    pg_db: str, nats: NatsServer, way: str
) -> None:
    config = source(pg_db, nats.url)
    # What a cast that checks nothing makes of text.
    planted = """E'{"a":1},"op":"delete'::text::json"""
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, doc json)", "CREATE CAST (text AS json) WITHOUT FUNCTION")
    if way == "stream":
        async with bridge(config):
            await settled(config)
    await execute(pg_db, f"INSERT INTO t VALUES (1, {planted})")
    error = await failure(config)
    assert type(error) is BadRecord
    assert "public.t" in error.what
    assert [m for m, _ in await messages(config) if b'"delete' in m.data] == []


JUMPING = """
import datetime, os, time
real, real_ns, kept, file = time.time, time.time_ns, datetime.datetime, os.environ["CLOCK"]

def ahead():
    try:
        with open(file) as found:
            return float(found.read() or 0)
    except OSError:
        return 0.0

class datetime_(kept):
    @classmethod
    def now(cls, tz=None):
        return kept.now(tz) + datetime.timedelta(seconds=ahead())

time.time = lambda: real() + ahead()
time.time_ns = lambda: real_ns() + int(ahead() * 1e9)
datetime.datetime = datetime_
"""


async def test_a_clock_that_jumps_changes_nothing(
    pg_db: str, nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = tmp_path / "clock"
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CLOCK", str(clock))
    config = source(pg_db, nats.url, sync="6s")
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, SLOT.format(oracle))
    process, number = Process(tmp_path, toml(config)), 0
    process.start()
    try:
        for hours in (-7, 400 * 24):
            number += 1
            await settled(config)
            await execute(pg_db, f"INSERT INTO t VALUES ({number}, 'x')")
            position = (await execute(pg_db, "SELECT (pg_current_wal_lsn() - '0/0')::int8"))[0][0]
            await until(lambda: _kept(config, position), 20, "the bucket has the position")  # noqa: B023
            # It is held back for eleven seconds by a clock that nobody sets.
            assert not await _confirmed(config, position)
            clock.write_text(str(hours * 3600))
            jumped = time.monotonic()
            await until(lambda: _confirmed(config, position), 40, "PostgreSQL is told")  # noqa: B023
            assert time.monotonic() - jumped > 3
            await settled(config)
        await until(lambda: _written_in(config, "2027"), 20, "the bridge's clock has jumped")
        assert process.text.count("streaming ") == 1
        assert await process.end() == 0
        clock.write_text("-100000")
        process.start()
        await settled(config)
        assert await process.end() == 0
    finally:
        process.close()
    await agrees(config, oracle)


async def _written_in(config: Config, year: str) -> bool:
    found = await checkpoint(config)
    return found is not None and found.at > year


async def _kept(config: Config, position: int) -> bool:
    found = await checkpoint(config)
    return found is not None and lsn.parse(found.lsn) >= position


async def _confirmed(config: Config, position: int) -> bool:
    rows = await execute(
        str(config.source.dsn),
        f"SELECT confirmed_flush_lsn - '0/0' >= {position} FROM pg_replication_slots"
        f" WHERE slot_name = '{config.source.slot}'",
    )
    return bool(rows[0][0])
