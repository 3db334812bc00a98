"""A change of a table's columns or key is an event of its own, just before the first event that has the others."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.event import Column, is_between
from bridge.stream import asking
from bridge.stream.state import TableRecord
from bridge.stream.subjects import table_key
from tests.oracle import agrees
from tests.reading.steps import ask, read_again
from tests.rewriting import caught_up
from tests.running import (
    MARK,
    Process,
    bridge,
    execute,
    messages,
    settled,
    source,
    state_of,
    streaming,
    toml,
)  # fmt: skip

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, name varchar(20), n int)"
LAYOUT = {"id": "integer", "name": "character varying(20)", "n": "integer"}

Layout = dict[str, str]


async def story(config: Config, table: str = "t") -> list[str | tuple[Layout, tuple[str, ...]]]:
    """The events of a table: its ops, and of each change of columns what the columns and the key are then.

    Every event's columns are those that were announced last, and every announcement tells truly what was before.
    """
    found: list[str | tuple[Layout, tuple[str, ...]]] = []
    columns: tuple[Column, ...] = ()
    key: tuple[str, ...] = ()
    position = ""
    for message, event in await messages(config):
        if event.table != table:
            continue
        assert message.position > position
        position = message.position
        if event.op == "schema":
            assert not columns or (event.old_columns, event.old_key_columns) == (columns, key)
            assert (event.columns, event.key_columns) != (event.old_columns, event.old_key_columns)
            columns, key = event.columns, event.key_columns
            found.append(({column.name: column.type for column in columns}, key))
            continue
        found.append(event.op)
        if columns and event.op in ("insert", "update", "read"):
            names = {column.name for column in columns}
            assert set(msgspec.json.decode(event.after)) | set(event.unchanged) == names
        if columns and event.op in ("insert", "update", "read", "delete") and key:
            assert set(msgspec.json.decode(event.key)) == set(key)
    return found


def without(layout: Layout, name: str) -> Layout:
    return {column: kind for column, kind in layout.items() if column != name}


CHANGES: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "ALTER TABLE t ADD COLUMN more text": ({**LAYOUT, "more": "text"}, ("id",)),
    "ALTER TABLE t DROP COLUMN n": (without(LAYOUT, "n"), ("id",)),
    "ALTER TABLE t RENAME COLUMN n TO m": ({**without(LAYOUT, "n"), "m": "integer"}, ("id",)),
    "ALTER TABLE t ALTER n TYPE bigint": ({**LAYOUT, "n": "bigint"}, ("id",)),
    "ALTER TABLE t ALTER name TYPE varchar(40)": ({**LAYOUT, "name": "character varying(40)"}, ("id",)),
    "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (n)": (LAYOUT, ("n",)),
    "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id, n)": (LAYOUT, ("id", "n")),
    "ALTER TABLE t REPLICA IDENTITY FULL": (LAYOUT, ("id",)),
    "ALTER TABLE t RENAME TO t_old; CREATE TABLE t (id int PRIMARY KEY, other text)": (
        {"id": "integer", "other": "text"}, ("id",),
    ),
    f"DROP TABLE t; {TABLE}": (LAYOUT, ("id",)),
}  # fmt: skip


def steps(change: str, table: str) -> list[str]:
    """What is done to a table that has one row: writes before the change, the change, writes after it."""
    row = "INSERT INTO t (id, n) VALUES ({0}, {0})" if "n" in CHANGES[change][0] else "INSERT INTO t (id) VALUES ({0})"
    found = [
        "INSERT INTO t VALUES (1, 'a', 1)", "UPDATE t SET name = 'b'", change, row.format(3), row.format(4),
        "UPDATE t SET id = id + 10 WHERE id = 3", "DELETE FROM t WHERE id = 4",
    ]  # fmt: skip
    return [re.sub(r"\bt(?=\b|_)", table, step) for step in found]


@pytest.mark.parametrize("how", ["apart", "together", "behind"])
async def test_a_change_of_columns_is_told_once_before_the_first_row_that_has_them(
    pg_db: str, nats: NatsServer, how: str
) -> None:
    tables = {f"t{number}": change for number, change in enumerate(CHANGES)}
    config = source(pg_db, nats.url, on_rewrite="warn", tables=["public.t?", "public.mark"])
    for name in tables:
        await execute(pg_db, MARK, TABLE.replace(" t ", f" {name} "))
    plans = [steps(change, name) for name, change in tables.items()]
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, *(f"INSERT INTO {name} VALUES (0, 'z', 0)" for name in tables))
        await settled(config)
        if how == "apart":
            for statements in zip(*plans, strict=True):
                await execute(pg_db, *statements)
                await settled(config)
        elif how == "together":
            await execute(pg_db, *(f"BEGIN; {'; '.join(plan)}; COMMIT" for plan in plans))
            await settled(config)
    if how == "behind":
        # All is over when the bridge comes to read it.
        await execute(pg_db, *(statement for plan in plans for statement in plan))
        async with bridge(config):
            await settled(config)
    for name, change in tables.items():
        layout, key = CHANGES[change]
        told: list[Any] = [(layout, key)] if (layout, key) != (LAYOUT, ("id",)) else []
        # No row shows a column's length: for a transaction's own changes, what it leaves behind counts.
        early = told if how == "together" and "varchar(40)" in change else []
        late = [] if early else told
        found = [one for one in await story(config, name) if one not in ("read", "snapshot", "truncate")]
        ops = ["insert", *early, "insert", "update", "update", *late, "insert", "insert", "update", "delete"]
        assert found == ops, change
        record = await recorded(config, name)
        assert {column.name: column.type for column in record.columns} == layout
        shapes = [{column.name: column.type for column in shape.columns} for shape in record.logged]
        assert shapes == ([LAYOUT, layout] if told else []), change


async def recorded(config: Config, table: str) -> TableRecord:
    """What the state bucket has of a table."""
    async with state_of(config) as state:
        found = await state.get(table_key(config.source.name, "public", table), TableRecord)
    assert found is not None
    return found[0]


async def test_columns_that_come_and_go_within_a_transaction_are_told_where_they_do(
    pg_db: str, nats: NatsServer
) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, MARK, TABLE)
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "BEGIN; INSERT INTO t VALUES (1, 'a', 1); ALTER TABLE t ADD COLUMN x int;"
            " INSERT INTO t VALUES (2, 'b', 2, 3); ALTER TABLE t DROP COLUMN x; INSERT INTO t VALUES (3, 'c', 3);"
            " COMMIT",
        )
        await settled(config)
    wide, narrow = ({**LAYOUT, "x": "integer"}, ("id",)), (LAYOUT, ("id",))
    assert (await story(config))[2:] == ["insert", wide, "insert", narrow, "insert"]
    events = [event for _, event in await messages(config) if event.table == "t"][2:]
    # All of it is one transaction, also for who reads the log by transactions.
    assert len({(event.txid, event.commit_lsn) for event in events}) == 1
    assert not any(is_between(message.position) for message, event in await messages(config) if event.txid)


async def test_rows_that_are_read_anew_are_told_of_before_they_come(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, MARK, TABLE, "INSERT INTO t SELECT g, 'n', g FROM generate_series(1, 3) g")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "ALTER TABLE t ADD COLUMN more text NOT NULL DEFAULT 'x'")
        await caught_up(config)
        await execute(pg_db, "UPDATE t SET n = 0 WHERE id = 1")
        await settled(config)
    told = ({**LAYOUT, "more": "text"}, ("id",))
    begin, end = "snapshot", "snapshot"
    assert await story(config) == [begin, *["read"] * 3, end, told, begin, *["read"] * 3, end, "update"]


async def test_a_hidden_column_is_no_news_and_never_named(pg_db: str, nats: NatsServer) -> None:
    table = {"public.t": Table(exclude=["secret"])}
    config = source(pg_db, nats.url, on_rewrite="warn", table=table)
    await execute(pg_db, MARK, f"{TABLE[:-1]}, secret int)")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (1, 'a', 1, 7)", "ALTER TABLE t ALTER secret TYPE bigint")
        await execute(pg_db, "INSERT INTO t VALUES (2, 'b', 2, 8)", "ALTER TABLE t ADD COLUMN open int")
        await execute(pg_db, "INSERT INTO t VALUES (3, 'c', 3, 9, 1)")
        await settled(config)
    told = ({**LAYOUT, "open": "integer"}, ("id",))
    assert [one for one in await story(config) if one != "snapshot"] == ["insert", "insert", told, "insert"]
    assert not [message for message, _ in await messages(config) if b"secret" in message.data]


async def test_partitions_whose_columns_stand_in_other_places_are_no_change(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(
        pg_db, MARK, f"{TABLE} PARTITION BY RANGE (id)", "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE t2 (n int, gone int, name varchar(20), id int PRIMARY KEY)", "ALTER TABLE t2 DROP COLUMN gone",
        "ALTER TABLE t ATTACH PARTITION t2 FOR VALUES FROM (10) TO (20)",
    )  # fmt: skip
    rows = "INSERT INTO t (id, name, n) VALUES (1, 'a', 1), (11, 'b', 2), (2, 'c', 3), (12, 'd', 4)"
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, rows, "ALTER TABLE t2 REPLICA IDENTITY FULL", "UPDATE t SET n = 0")
        await settled(config)
        await execute(pg_db, "ALTER TABLE t ADD COLUMN x int", "UPDATE t SET x = 1")
        await settled(config)
    told = ({**LAYOUT, "x": "integer"}, ("id",))
    found = [one for one in await story(config) if one != "snapshot"]
    assert found == [*["insert"] * 4, *["update"] * 4, told, *["update"] * 4]


async def test_a_compacted_log_keeps_the_last_change_of_each_table(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn", stream={"mode": "compact"})
    await execute(pg_db, MARK, "CREATE TABLE t (id int PRIMARY KEY, n int)")
    async with bridge(config):
        await streaming(config)
        for change in "ADD COLUMN a int", "ADD COLUMN b int", "DROP COLUMN a":
            await execute(pg_db, f"ALTER TABLE t {change}", "INSERT INTO t (id) SELECT count(*) FROM t")
            await settled(config)
    changes = [(message.subject, event) for message, event in await messages(config) if event.op == "schema"]
    assert [subject for subject, _ in changes] == [f"cdc.{config.source.name}.public.t.@schema"]
    assert [column.name for column in changes[0][1].columns] == ["id", "n", "b"]
    assert [column.name for column in changes[0][1].old_columns] == ["id", "n", "a", "b"]


@pytest.mark.parametrize(
    "point", ["schema.recorded:kill:1", "schema.recorded:kill:2", "batch.closed:kill", "batch.acked:kill"]
)
async def test_who_is_killed_tells_of_a_change_once(pg_db: str, nats: NatsServer, tmp_path: Path, point: str) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, MARK, TABLE, "INSERT INTO t VALUES (0, 'z', 0)")
    process = Process(tmp_path, toml(config))
    process.start()
    await streaming(config)
    await process.end()
    await execute(
        pg_db, "INSERT INTO t VALUES (1, 'a', 1)", "ALTER TABLE t DROP COLUMN n", "INSERT INTO t VALUES (2, 'b')",
        "ALTER TABLE t ADD COLUMN m int", "INSERT INTO t VALUES (3, 'c', 3)",
    )  # fmt: skip
    process.start(failpoint=point)
    killed = await process.wait()
    process.start()
    await settled(config)
    await process.end()
    narrow, other = without(LAYOUT, "n"), {**without(LAYOUT, "n"), "m": "integer"}
    assert killed == -signal.SIGKILL
    assert [one for one in await story(config) if one not in ("read", "snapshot")] == [
        "insert", (narrow, ("id",)), "insert", (other, ("id",)), "insert",
    ]  # fmt: skip


async def test_a_change_that_was_noted_for_a_reading_and_never_published_is_told_later(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, MARK, TABLE, "INSERT INTO t VALUES (0, 'z', 0)", "CREATE TABLE other (id int PRIMARY KEY)")
    process = Process(tmp_path, toml(config))
    process.start(failpoint="schema.recorded:kill")
    await streaming(config)
    await execute(pg_db, "ALTER TABLE t ADD COLUMN m int")
    await ask(config)
    assert await process.wait() == -signal.SIGKILL
    async with state_of(config) as state:
        assert await asking.cancel(state, config.source.name, ("public", "t"))
    # The log goes on, past the position that was noted, without a change of the table.
    for number in range(2):
        process.start()
        await execute(pg_db, f"INSERT INTO other VALUES ({number})")
        await settled(config)
        await process.end()
    process.start()
    await execute(pg_db, "INSERT INTO t VALUES (1, 'a', 1, 1)")
    await settled(config)
    await process.end()
    found = [one for one in await story(config) if one not in ("read", "snapshot")]
    assert found == [({**LAYOUT, "m": "integer"}, ("id",)), "insert"]


FULL, DEFAULT = "ALTER TABLE t REPLICA IDENTITY FULL", "ALTER TABLE t REPLICA IDENTITY DEFAULT"


@pytest.mark.parametrize("hidden", [[], ["name"]])
async def test_changes_from_a_time_of_full_identity_keep_their_key(
    pg_db: str, nats: NatsServer, hidden: list[str]
) -> None:
    table = {"public.t": Table(exclude=hidden)}
    config = source(pg_db, nats.url, on_rewrite="warn", tables=["public.t", "public.mark"], table=table)
    await execute(pg_db, MARK, TABLE, FULL, "INSERT INTO t VALUES (1, 'a', 1), (2, NULL, 2), (3, 'c', NULL)")
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db, "UPDATE t SET n = 9 WHERE id = 1", "DELETE FROM t WHERE id = 2", DEFAULT,
        "UPDATE t SET n = 8 WHERE id = 3", "DELETE FROM t WHERE id = 3",
    )  # fmt: skip
    async with bridge(config):
        await settled(config)
    await agrees(config)
    found = [event for _, event in await messages(config) if event.table == "t" and event.op in ("update", "delete")]
    assert [msgspec.json.decode(event.key) for event in found] == [{"id": 1}, {"id": 2}, {"id": 3}, {"id": 3}]
    before = [msgspec.json.decode(event.before) if bytes(event.before) else None for event in found]
    shown: list[dict[str, Any]] = [{"id": 1, "name": "a", "n": 1}, {"id": 2, "name": None, "n": 2}]
    assert before == [*({name: row[name] for name in row if name not in hidden} for row in shown), None, None]


async def test_a_key_is_in_its_tables_order_whatever_the_order_of_a_partition(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db, MARK, "CREATE TABLE t (id int, d int, v text, PRIMARY KEY (id, d)) PARTITION BY LIST (d)",
        "CREATE TABLE t1 PARTITION OF t FOR VALUES IN (1)", "CREATE TABLE t2 (v text, d int NOT NULL, id int NOT NULL)",
        "ALTER TABLE t ATTACH PARTITION t2 FOR VALUES IN (2)", "INSERT INTO t VALUES (2, 1, 'one'), (1, 2, 'two')",
    )  # fmt: skip
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "UPDATE t SET v = v || '!'", "UPDATE t SET id = id + 1", "DELETE FROM t WHERE d = 2")
        await settled(config)
        await ask(config)
        await read_again(config)
    keys = {bytes(event.key) for _, event in await messages(config) if event.table == "t" and event.op != "snapshot"}
    assert keys == {b'{"id":2,"d":1}', b'{"id":1,"d":2}', b'{"id":3,"d":1}', b'{"id":2,"d":2}'}
    await agrees(config)
