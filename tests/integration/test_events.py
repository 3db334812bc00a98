"""What docs/events.md shows is what a bridge publishes, and events.schema.json takes that and nothing else.

`BRIDGE_UPDATE_DOCS=1 pytest tests/integration/test_events.py` writes the page's examples anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, get_args

import msgspec
import pytest

from bridge import event
from bridge.config import Config, Secret, Source, State, Stream
from bridge.embedded import NatsServer, Postgres
from bridge.event import Event
from bridge.stream import subjects
from bridge.stream.reader import read
from tests.databases import database
from tests.documented import WRITES, Members, Page, Settled, joined, members, shown
from tests.integration.test_messages import emit, replicated
from tests.running import bridge, broker_of, execute, messages, settled, source, streaming
from tests.schema import SCHEMA, valid
from tests.writing import written_back

pytestmark = pytest.mark.anyio

LARGE = 300_000
NOISE = "SELECT string_agg(md5(n::text), '') FROM generate_series(1, 200) n"  # does not compress: it is TOASTed
ORDER = f"""INSERT INTO accounts VALUES (9, 'Alan', 20.00); {emit("app.orders", '{"account":9,"amount":20.00}')}"""
TABLES = """
CREATE DOMAIN lang AS varchar(2);
CREATE TABLE accounts (id int PRIMARY KEY, owner text, balance numeric);
CREATE TABLE documents (id int PRIMARY KEY, title text, body text);
CREATE TABLE stock (item text, place text, count int);
ALTER TABLE stock REPLICA IDENTITY FULL;
CREATE TABLE readings (id int, day date, value float8, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE readings_2026 PARTITION OF readings FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
ALTER TABLE readings_2026 REPLICA IDENTITY FULL;
CREATE SCHEMA "Back office";
CREATE TABLE "Back office"."a.b*" (id int PRIMARY KEY);
INSERT INTO accounts VALUES (1, 'Ada', 12.50);
INSERT INTO documents VALUES (1, 'Notes', 'short')
"""
# What each statement gives: the names under which the page shows it, one an event; "" for those that it does not show.
SCRIPT = [
    (["insert"], "INSERT INTO accounts VALUES (2, 'Grace', 0.10)"),
    (["update"], "UPDATE accounts SET balance = 1234567890123456789.00 WHERE id = 1"),
    (["update of the key"], "UPDATE accounts SET id = 3 WHERE id = 2"),
    (["delete"], "DELETE FROM accounts WHERE id = 3"),
    ([""], f"UPDATE documents SET body = ({NOISE}) WHERE id = 1"),
    (["update without a TOASTed column"], "UPDATE documents SET title = 'Minutes' WHERE id = 1"),
    (["reference"], f"INSERT INTO documents VALUES (2, 'A long one', repeat('x', {LARGE}))"),
    ([""], "INSERT INTO stock VALUES ('bolt', 'A7', 40)"),
    (["update with FULL"], "UPDATE stock SET count = 39 WHERE item = 'bolt'"),
    (["delete with FULL"], "DELETE FROM stock WHERE item = 'bolt'"),
    (["partition"], "INSERT INTO readings VALUES (7, '2026-01-31', 21.5)"),
    (["truncate of a partition"], "TRUNCATE readings_2026"),
    (["truncate"], "TRUNCATE accounts"),
    (["order", "transactional message"], f"BEGIN; {ORDER}; COMMIT"),
    (["message"], emit("app.cache", "all", transactional=False)),
    (["origin"], "INSERT INTO accounts VALUES (10, 'Edsger', 0.00)"),
    ([""], """INSERT INTO "Back office"."a.b*" VALUES (1)"""),
    (["schema", ""], "ALTER TABLE accounts ADD lang lang; INSERT INTO accounts VALUES (11, 'Barbara', 1.00, 'en')"),
]  # fmt: skip
OPS = {one["$ref"].rpartition("/")[2] for one in SCHEMA["oneOf"]}
NOT_IN_THE_LOG = {"NaN", "Infinity", "-Infinity"}  # before wal2json 2.6
OPTIONAL = {"before", "unchanged", "partition", "begin_seq", "origin"}


class Told(NamedTuple):
    """One event: its message as it is stored, the whole of it where that is a reference."""

    subject: str
    headers: dict[str, str]
    payload: bytes
    whole: bytes

    @property
    def event(self) -> Event:
        return event.decode(self.whole)


@pytest.fixture(scope="module")
async def dsn(pg: Postgres) -> AsyncIterator[str]:
    async with database(pg) as found:
        yield found


@asynccontextmanager
async def configured(dsn: str, **changes: Any) -> AsyncIterator[Config]:
    """A configuration with the names of the documentation, on a NATS server where they are free."""
    async with NatsServer.throwaway(settings={"max_payload": "256KB"}) as nats:
        stream = Stream(servers=[nats.url], name="cdc_main", sync="always", **changes.pop("stream", {}))
        config = msgspec.structs.replace(
            source(dsn, nats.url, workers=1),
            source=Source(name="main", dsn=Secret(dsn), slot=f"bridge_{stream.mode}", **changes),
            stream=stream,
            state=State(bucket="bridge"),
        )
        yield config


async def told(config: Config) -> list[Told]:
    """Every event of the log but those of the tests' own table."""
    whole = {message.seq: message.data for message, _ in await messages(config)}
    found = []
    async with broker_of(config) as broker:
        wanted = [subjects.source_subjects(config.stream.prefix, config.source.name)]
        async for batch in read(broker, config.stream.name, subjects=wanted):
            for message in batch:
                if event.decode(message.data).table != "mark":
                    stored = await broker.message(config.stream.name, seq=message.seq)
                    assert stored is not None
                    found.append(Told(stored.subject, stored.headers, stored.data, whole[message.seq]))
    return found


@pytest.fixture(scope="module")
async def branch(pg: Postgres) -> AsyncIterator[str]:
    """An origin, which is the server's and not the database's; its name is asked for when its transaction comes."""
    await execute(pg.dsn(), "SELECT pg_replication_origin_create('branch_office')")
    yield "branch_office"
    await execute(pg.dsn(), "SELECT pg_replication_origin_drop('branch_office')")


@pytest.fixture(scope="module")
async def log(dsn: str, branch: str) -> list[Told]:
    """The events of the script."""
    await execute(dsn, *TABLES.strip().split(";\n"))
    async with configured(dsn, tables=["public.*", "Back office.*"], messages=["app.*"]) as config:
        async with bridge(config):
            await settled(config)
            for names, statement in SCRIPT:
                await (replicated(dsn, branch, statement) if names == ["origin"] else execute(dsn, statement))
        return await told(config)


@pytest.fixture(scope="module")
async def compacted(dsn: str, log: list[Told]) -> list[Told]:
    """The events of a compacted log of the same database, which is made later."""
    assert log
    await execute(
        dsn,
        "CREATE TABLE seats (hall text, number int, taken bool, PRIMARY KEY (hall, number))",
        "INSERT INTO seats VALUES ('A.1', 17, false)",
        "INSERT INTO readings VALUES (8, '2026-02-01', 20.1)",
    )
    tables = ["public.readings", "public.seats", "public.mark"]
    async with configured(dsn, tables=tables, stream={"mode": "compact"}) as config:
        async with bridge(config):
            await settled(config)
            await execute(
                dsn,
                "UPDATE seats SET number = 18 WHERE number = 17",
                "TRUNCATE readings_2026",
                "INSERT INTO readings VALUES (9, '2026-02-02', 19.5)",
            )
            await settled(config)
        return await told(config)


def same(page: Page, name: str, example: str) -> None:
    """Asserts that the page shows this, or writes it there."""
    if WRITES:
        page.put(name, example)
    assert page.example(name) == example, f"BRIDGE_UPDATE_DOCS=1 writes the example {name!r} anew"


def examples(log: list[Told]) -> dict[str, Told]:
    """The events that the page shows, by name."""
    first = {(one.event.op, one.event.phase or ""): one for one in reversed(log) if one.event.table == "accounts"}
    found = {"snapshot begin": first["snapshot", "begin"], "read": first["read", ""]}
    found["snapshot end"] = first["snapshot", "end"]
    streamed = [one for one in log if one.event.op not in ("read", "snapshot")]
    names = [name for names, _ in SCRIPT for name in names]
    return found | {name: one for name, one in zip(names, streamed, strict=True) if name}


def headers(one: Told, now: Settled) -> str:
    """A message's subject and headers, without those that are NATS's own."""
    mine = {name: value for name, value in one.headers.items() if not name.startswith("Nats-")}
    mine[event.HEADER_POSITION] = now.position(mine[event.HEADER_POSITION])
    return "\n".join([one.subject, *(f"{name}: {value}" for name, value in mine.items())])


def columns(rows: list[tuple[str, str]]) -> str:
    width = max(len(first) for first, _ in rows) + 3
    return "\n".join(f"{first:{width}}{second}" for first, second in rows)


async def test_every_event_that_the_page_shows_is_a_real_one(log: list[Told], compacted: list[Told]) -> None:
    page, now = Page(), Settled(one.whole for one in log)
    shows = {name: shown(now.event(one.payload, one.whole)) for name, one in examples(log).items()}
    order, message = (examples(log)[name] for name in ("order", "transactional message"))
    shows["headers"] = headers(order, now) + "\n\n" + headers(message, now)
    position = now.position(message.headers[event.HEADER_POSITION])
    parts = [f"{name:{len(part)}}" for name, part in zip(event.Position._fields, position.split("-"), strict=True)]
    shows["position"] = f"{position}\n{' '.join(parts).rstrip()}"
    shows["subjects"] = columns(
        sorted({(one.subject, one.event.prefix or f"{one.event.schema}.{one.event.table}") for one in log})
    )
    later = Settled(one.whole for one in compacted)
    shows["compacted subjects"] = columns(sorted((one.subject, one.event.op) for one in compacted))
    seats = [one for one in compacted if one.event.table == "seats"]
    shows["compacted end"] = next(shown(later.event(one.payload)) for one in seats if one.event.phase == "end")
    shows["compacted key"] = "\n".join(shown(later.event(one.payload)) for one in seats[-2:])
    for name, example in shows.items():
        same(page, name, example)
    assert page.examples - {"types"} == shows.keys()
    ops = {one.event.op for one in log}
    assert ops == set(get_args(event.Op))
    assert {one.headers[event.HEADER_VERSION] for one in (*log, *compacted)} == {event.FORMAT}


async def test_the_schema_takes_real_events_and_no_others(log: list[Told], compacted: list[Told]) -> None:
    whole = [one.whole for one in (*log, *compacted)]
    taken: set[str] = set()
    for payload in {one.payload for one in (*log, *compacted)} | set(whole):
        assert valid(payload), payload[:500]
        found = members(payload)
        taken |= found.keys()
        assert not valid(joined(found | {"more": b"1"}))
        for name, value in found.items():
            rest = joined({other: old for other, old in found.items() if other != name})
            needed = name not in OPTIONAL or (name == "before" and found["key"] == b"null")
            assert valid(rest) != needed, f"{payload[:500].decode()} without {name}"
            for wrong in {b"[1]", b'"?"', b"7", b"{}", b"true"} - {like(value)}:
                changed = joined(found | {name: wrong})
                assert not valid(changed), changed[:500]
        op = event.decode(payload).op
        for other in OPS - {op}:
            renamed = joined(found | {"op": event.quote(other)})
            assert valid(renamed) == alike(found, op, other), renamed[:500]
    assert taken == {name for op in OPS for name in SCHEMA["$defs"][op]["properties"]} == set(Event.__struct_fields__)


def alike(found: Members, op: str, other: str) -> bool:
    """Whether nothing but its op tells an event from one of another op."""
    of_rows = {"insert", "update", "delete"} if "ref" in found else {"insert", "update"}
    return {op, other} <= of_rows and found["key"] != b"null" and not {"before", "unchanged"} & found.keys()


def like(value: bytes) -> bytes:
    """The one of some values that is of a value's kind."""
    kinds = {b"[": b"[1]", b'"': b'"?"', b"{": b"{}", b"t": b"true", b"f": b"true", b"n": b""}
    return kinds.get(value[:1], b"7")


async def test_the_table_of_values_is_what_snapshot_and_stream_give(pg_db: str, nats: NatsServer) -> None:
    page, config = Page(), source(pg_db, nats.url)
    rows = page.rows("values")
    values = [row[2].strip("`") for row in rows]
    columns = ", ".join(f"{value} AS c{place}" for place, value in enumerate(values))
    await execute(pg_db, *page.example("types").split(";\n"), f"CREATE TABLE shown AS SELECT 1 AS id, {columns}")
    await execute(pg_db, "ALTER TABLE shown ADD PRIMARY KEY (id)", "CREATE TABLE copy (LIKE shown INCLUDING ALL)")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO copy SELECT * FROM shown")
        await settled(config)
    after = {
        one.op: members(bytes(one.after))
        for _, one in await messages(config)
        if bytes(one.after) and one.table != "mark"
    }
    printed = [after["read"][f"c{place}"].decode() for place in range(len(values))]
    if WRITES:
        page.fill("values", [[*row[:3], f"`{value}`"] for row, value in zip(rows, printed, strict=True)])
    assert [row[3] for row in page.rows("values")] == [f"`{value}`" for value in printed]
    for place, value in enumerate(printed):
        streamed = after["insert"][f"c{place}"].decode()
        assert streamed == value or (value.strip('"') in NOT_IN_THE_LOG and streamed == "null"), values[place]
    await written_back(config, "shown", after["read"])
