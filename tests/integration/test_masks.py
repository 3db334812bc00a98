"""Masks and operations by every way that rows take into the log: of any type, beside a reading, at a restart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.errors import ConfigError
from bridge.operate.verify import verify
from bridge.pipeline import streaming as streaming_module
from bridge.source import pattern
from bridge.source.leaving import mask
from bridge.source.pattern import Patterns
from bridge.source.rows import Plan
from bridge.stream import subjects
from bridge.stream.state import TableRecord
from tests.integration.test_values import TYPES, ZOO
from tests.reading.steps import ask, chunks_of, held, read_again
from tests.running import bridge, command, events, execute, failure, settled, source, state_of, streaming

pytestmark = pytest.mark.anyio

KEY = "0123456789abcdef"


def given(config: Config, **table: Any) -> Config:
    """The configuration with what it says of public.t."""
    found = msgspec.structs.replace(config.source, table={"public.t": Table(**table)} if table else {})
    return msgspec.structs.replace(config, source=found)


def digest(text: str) -> str:
    return str(msgspec.json.decode(mask("hash", KEY)(msgspec.json.encode(text))))


async def recorded(config: Config) -> TableRecord:
    async with state_of(config) as state:
        found = await state.get(subjects.table_key(config.source.name, "public", "t"), TableRecord)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("busy", [False, True])
async def test_a_hash_is_the_same_in_stream_and_snapshots_whatever_the_type(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    taken: Counter[str] = Counter()

    class Counted(Patterns):
        def read(self, data: bytes, closing: bytes) -> tuple[Plan, bytes, bytes] | None:
            found = super().read(data, closing)
            taken.update([found[0].relation.table] if found is not None else [])
            return found

    monkeypatch.setattr(pattern, "BUSY", 1 if busy else 10_000)
    monkeypatch.setattr(streaming_module, "Patterns", Counted)
    columns = ", ".join(f"c{number} {kind}" for number, kind in enumerate(ZOO))
    masks = {f"c{number}": "hash" for number in range(len(ZOO))}
    tables = {f"public.{name}": Table(mask=masks) for name in ("zoo", "copy", "whole")}
    config = source(pg_db, nats.url, table=tables, mask_key=KEY)
    values = [
        ", ".join(f"({found[row]})::{kind}" if row < len(found) else "NULL" for kind, found in ZOO.items())
        for row in range(max(map(len, ZOO.values())))
    ]
    await execute(
        pg_db,
        *TYPES.strip().split(";\n"),
        *(f"CREATE TABLE {name} (id int PRIMARY KEY, {columns})" for name in ("zoo", "copy", "whole")),
        "ALTER TABLE whole REPLICA IDENTITY FULL",
        *(f"INSERT INTO zoo VALUES ({row}, {text})" for row, text in enumerate(values)),
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "INSERT INTO copy SELECT * FROM zoo",
            "INSERT INTO whole SELECT * FROM zoo",
            "UPDATE whole SET id = id + 100",
            "UPDATE whole SET id = id - 100",
        )
        await settled(config)
        await ask(config, "copy")
        await read_again(config, "copy")
        assert all(report.same for report in await verify(config, [nats.url], ["public.copy", "public.whole"]))
    read = [e["after"] for e in await events(config, "zoo")]
    for row in read:
        assert all(value is None or len(bytes.fromhex(value)) == 32 for name, value in row.items() if name != "id")
    assert sum(value is not None for row in read for value in row.values()) == len(read) + sum(map(len, ZOO.values()))
    copied = [e for e in await events(config, "copy") if e["op"] in ("insert", "read")]
    assert [e["after"] for e in copied] == read * 2
    assert [e["op"] for e in copied] == ["insert"] * len(read) + ["read"] * len(read)
    whole = await events(config, "whole")
    assert [e["after"] for e in whole if e["op"] == "insert"] == read
    back = [e for e in whole if e["op"] == "update"][len(read) :]
    assert [e["after"] for e in back] == read
    assert [{**e["before"], "id": e["after"]["id"]} for e in back] == read
    assert bool(taken["copy"] and taken["whole"]) == busy


async def test_a_mask_that_comes_or_goes_counts_from_the_next_start_on(pg_db: str, nats: NatsServer) -> None:
    plain = source(pg_db, nats.url, mask_key=KEY)
    masked = given(plain, mask={"email": "hash"})
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, email text)", "INSERT INTO t VALUES (1, 'a')")
    for config, id in (plain, 2), (masked, 3), (plain, 4):
        async with bridge(config):
            await settled(config)
            await execute(pg_db, f"INSERT INTO t VALUES ({id}, 'a')")
            await settled(config)
    rows = [e for e in await events(plain, "t") if e["op"] != "schema"]
    assert [e["after"]["email"] for e in rows] == ["a", "a", digest("a"), "a"]
    async with bridge(masked):
        await settled(masked)
        [report] = await verify(masked, [nats.url], ["public.t"])
        assert report.counts == {"different": 3}
    assert [column.type for column in (await recorded(masked)).columns] == ["integer", "text"]


@pytest.mark.parametrize("silent", ["insert", "update", "delete", "truncate"])
async def test_changes_that_are_not_published_are_as_if_they_had_not_been(
    pg_db: str, nats: NatsServer, silent: str
) -> None:
    operations = ["insert", "update", "delete", "truncate"]
    config = given(source(pg_db, nats.url), operations=[name for name in operations if name != silent])
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text)", "INSERT INTO t VALUES (1, 'a')")
    async with bridge(config):
        await settled(config)
        await execute(
            pg_db,
            "INSERT INTO t VALUES (2, 'b'), (3, 'c')",
            "UPDATE t SET body = 'x' WHERE id = 2",
            "DELETE FROM t WHERE id = 3",
            "TRUNCATE t",
            "ALTER TABLE t ADD more int",
            "INSERT INTO t VALUES (4, 'd', 1)",
        )
        await settled(config)
    found = [e["op"] for e in await events(config, "t") if e["op"] != "schema"]
    every = ["read", "insert", "insert", "update", "delete", "truncate", "insert"]
    assert found == [op for op in every if op != silent]


async def test_a_change_without_identity_that_is_not_published_stops_nobody(pg_db: str, nats: NatsServer) -> None:
    config = given(source(pg_db, nats.url), operations=["insert"])
    await execute(pg_db, "CREATE TABLE t (v int)")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES (1)", "UPDATE t SET v = 2", "DELETE FROM t")
        await settled(config)
    assert [(e["op"], e["after"]) for e in await events(config, "t")] == [("insert", {"v": 1})]


@pytest.mark.parametrize("silent", ["update", "delete", "truncate"])
async def test_a_row_that_is_being_read_comes_though_a_silent_change_follows(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    chunks_of(monkeypatch, 50)
    operations = [name for name in ("insert", "update", "delete", "truncate") if name != silent]
    config = given(source(pg_db, nats.url), operations=operations)
    await execute(
        pg_db, "CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t SELECT g, 0 FROM generate_series(1, 60) g"
    )
    change = {"update": "UPDATE t SET v = 1", "delete": "DELETE FROM t WHERE id = 7", "truncate": "TRUNCATE t"}
    async with bridge(config), held(monkeypatch, "read", 1) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(pg_db, change[silent])
        await settled(config)
        on.set()
        await read_again(config)
    again = [e for e in await events(config, "t") if e["op"] != "snapshot"][60:]
    assert {e["op"] for e in again} == {"read"}
    assert [e["after"]["v"] for e in again[:50]] == [0] * 50
    assert [e["key"]["id"] for e in again[:50]] == list(range(1, 51))


async def test_a_key_that_is_kept_back_is_refused_before_anything_is_read(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = given(source(pg_db, nats.url), columns=["email"], mask={"email": "constant:"})
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, email text)", "INSERT INTO t VALUES (1, 'a')")
    error = await failure(config)
    assert isinstance(error, ConfigError)
    assert "columns leaves out id, part of its key" in str(error)
    done = await command("run", config, tmp_path)
    assert done.code == 2, done
    assert "add it to columns" in done.err
