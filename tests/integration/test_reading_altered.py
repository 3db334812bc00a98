"""A table that is dropped, renamed or altered while it is read: an end that says why, or another beginning."""

from __future__ import annotations

import pytest

from bridge.embedded import NatsServer
from bridge.stream import asking
from tests.reading.checker import from_last_begin, same
from tests.reading.steps import EXTERNAL, ROWS, WIDE, again, ask, chunks_of, held, judged, read_again, unwatched
from tests.running import bridge, execute, messages, settled, source, state_of

pytestmark = pytest.mark.anyio

OTHER = ["CREATE TABLE other (id int PRIMARY KEY)", "INSERT INTO other SELECT generate_series(1, 100)"]
PARTED = [
    "CREATE TABLE t (id int PRIMARY KEY, v bigint NOT NULL, body text) PARTITION BY RANGE (id)",
    "CREATE TABLE p1 PARTITION OF t FOR VALUES FROM (0) TO (100)",
    "CREATE TABLE p2 PARTITION OF t FOR VALUES FROM (100) TO (200)",
    "CREATE TABLE p3 PARTITION OF t FOR VALUES FROM (200) TO (1000)",
    EXTERNAL,
    ROWS,
]
P4 = "CREATE TABLE p4 (id int PRIMARY KEY, v bigint NOT NULL, body text)"
P4_ROWS = "INSERT INTO p4 SELECT g, g, 'new' FROM generate_series(1001, 1050) g"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 50 rows."""
    chunks_of(monkeypatch, 50)
    unwatched(monkeypatch)


@pytest.mark.parametrize(
    ("change", "why", "back"),
    [
        ("DROP TABLE t", "the table was dropped", f"{WIDE}; {ROWS}"),
        ("ALTER TABLE t RENAME TO kept", "public.t is called public.kept now", "ALTER TABLE kept RENAME TO t"),
        (
            "CREATE SCHEMA aside; ALTER TABLE t SET SCHEMA aside",
            "public.t is called aside.t now",
            "ALTER TABLE aside.t SET SCHEMA public",
        ),
        ("ALTER TABLE t SET UNLOGGED", "public.t is not logged (UNLOGGED)", "ALTER TABLE t SET LOGGED"),
        ("ALTER TABLE t DROP CONSTRAINT t_pkey", "public.t has no key", "ALTER TABLE t ADD PRIMARY KEY (id)"),
    ],
)
async def test_a_table_that_is_not_there_any_more_ends_its_reading_and_no_other(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, change: str, why: str, back: str
) -> None:
    config = source(pg_db, nats.url, tables=["public.*", "!public.kept"])
    await execute(pg_db, WIDE, EXTERNAL, ROWS, *OTHER)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        await ask(config, "other")
        await execute(pg_db, change)
        on.set()
        failed = await again(config, state="failed")
        assert why in failed.why
        assert (await read_again(config, "other")).rows == 100
        if back:
            await execute(pg_db, back)
        async with state_of(config) as state:
            await asking.resume(state, config.source.name, ("public", "t"))
        assert (await read_again(config)).state == "done"
        await execute(pg_db, "INSERT INTO t VALUES (1000, 1000, 'new')")
        await settled(config)
    _, rows = from_last_begin(await messages(config), "t")
    assert await same(pg_db, "t", rows) == 301


@pytest.mark.parametrize(
    ("change", "reads"),
    [
        ("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (v)", 100 + 300),
        ("ALTER TABLE t DROP COLUMN body, ADD COLUMN body text DEFAULT 'new'", 100 + 300),
        ("VACUUM FULL t", 300),
        ("ALTER TABLE t ADD UNIQUE (v), ALTER body SET STORAGE EXTENDED", 300),
    ],
)
async def test_a_table_that_is_altered_is_read_anew_where_its_rows_are_others_by_that(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, change: str, reads: int
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        before = len(await messages(config))
        await ask(config)
        await there.wait()
        await execute(pg_db, change)
        on.set()
        assert (await read_again(config)).rows == 300
        await settled(config)
    found = await messages(config)
    assert [message.op for message, _ in found[before:]].count("read") == reads
    _, rows = from_last_begin(found, "t")
    await same(pg_db, "t", rows)


async def test_a_key_that_gets_another_order_begins_anew(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    alter = "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY ({})"
    await execute(pg_db, WIDE, EXTERNAL, ROWS, "UPDATE t SET v = 300 - v", alter.format("id, v"))
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        assert (await again(config)).key == ["id", "v"]
        await execute(pg_db, alter.format("v, id"))
        on.set()
        assert (await read_again(config)).rows == 300
        await settled(config)
    _, rows = from_last_begin(await messages(config), "t")
    await same(pg_db, "t", rows)


@pytest.mark.parametrize(
    ("nth", "change", "restarts"),
    [
        (4, "ALTER TABLE t DETACH PARTITION p1", True),
        (1, "DROP TABLE p1", True),
        (1, "DROP TABLE p2", False),
        (1, "ALTER TABLE t DETACH PARTITION p3; ALTER TABLE p3 RENAME TO aside", False),
        (1, f"{P4}; {P4_ROWS}; ALTER TABLE t ATTACH PARTITION p4 FOR VALUES FROM (1000) TO (2000)", False),
        (4, "TRUNCATE p1; INSERT INTO t VALUES (7, 1007, 'new')", False),
    ],
)
async def test_what_becomes_of_partitions_meanwhile_is_in_the_log_in_the_end(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, nth: int, change: str, restarts: bool
) -> None:
    config = source(pg_db, nats.url, tables=["public.*", "!public.p?", "!public.aside"])
    await execute(pg_db, *PARTED)
    async with bridge(config), held(monkeypatch, "published", nth) as (there, on):
        await settled(config)
        before = len(await messages(config))
        await ask(config)
        await there.wait()
        await execute(pg_db, change)
        on.set()
        await read_again(config)
        await settled(config)
    found = await messages(config)
    begins = [one for _, one in found[before:] if one.phase == "begin"]
    assert len(begins) == 1 + restarts
    _, rows = from_last_begin(found, "t")
    await same(pg_db, "t", rows)


async def test_a_table_that_is_written_anew_with_the_same_columns_is_read_on(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with bridge(config), held(monkeypatch, "read", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(pg_db, "ALTER TABLE t ALTER v TYPE bigint USING v + 0", "UPDATE t SET v = 1000 WHERE id = 60")
        on.set()
        assert (await read_again(config)).rows == 300
        await settled(config)
    await judged(config, pg_db)
