"""`bridge check`: each finding is true, and gone once its remedy was followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.operate.check import check, inexact, missing
from bridge.source.catalog import Catalog
from tests.running import bridge, command, events, execute, settled, source, streaming

pytestmark = pytest.mark.anyio


def about(found: list[Any], table: str) -> list[Any]:
    return [one for one in found if one.about == table]


async def test_a_table_without_identity_is_found_and_mended_as_it_says(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        'CREATE TABLE "Plain t" (a int)',
        "CREATE TABLE fit (a int NOT NULL, b int)",
        "CREATE UNIQUE INDEX fit_a ON fit (a) INCLUDE (b)",
        "CREATE TABLE nulls (a int UNIQUE)",
        "CREATE TABLE part (a int NOT NULL, b int)",
        "CREATE UNIQUE INDEX ON part (a) WHERE b > 0",
        "CREATE TABLE none (a int PRIMARY KEY)",
        "ALTER TABLE none REPLICA IDENTITY NOTHING",
        "CREATE TABLE whole (a int)",
        "ALTER TABLE whole REPLICA IDENTITY FULL",
        "CREATE TABLE keyed (a int PRIMARY KEY)",
    )
    found = await check(config)
    remedies = {one.about: one.next for one in found.findings if "replica identity" in one.what}
    assert remedies == {
        "public.Plain t": 'ALTER TABLE "public"."Plain t" REPLICA IDENTITY FULL; or give it a primary key',
        "public.fit": 'ALTER TABLE "public"."fit" REPLICA IDENTITY USING INDEX "fit_a"; or ALTER TABLE "public"."fit"'
        " REPLICA IDENTITY FULL",
        "public.nulls": 'ALTER TABLE "public"."nulls" REPLICA IDENTITY FULL; or give it a primary key',
        "public.part": 'ALTER TABLE "public"."part" REPLICA IDENTITY FULL; or give it a primary key',
        "public.none": 'ALTER TABLE "public"."none" REPLICA IDENTITY USING INDEX "none_pkey"; or ALTER TABLE'
        ' "public"."none" REPLICA IDENTITY FULL',
    }
    assert found.tables == 7
    assert {one.level for one in found.findings} == {"error"}
    for remedy in remedies.values():
        await execute(pg_db, remedy.partition("; or ")[0])
    assert (await check(config)).findings == []
    # And so the log has what it lacked.
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO fit VALUES (1, 1)", "UPDATE fit SET b = 2", "DELETE FROM fit")
        await settled(config)
    assert [one["op"] for one in await events(config, "fit") if one["op"] != "snapshot"] == [
        "insert",
        "update",
        "delete",
    ]


async def test_where_it_is_accepted_a_missing_identity_is_a_warning(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, table={"public.b": Table(on_missing_identity="warn")})
    await execute(pg_db, "CREATE TABLE a (a int)", "CREATE TABLE b (a int)")
    found = (await check(config)).findings
    assert [(one.about, one.level) for one in found] == [("public.a", "error"), ("public.b", "warning")]
    accepted = source(pg_db, nats.url, on_missing_identity="warn")
    assert {one.level for one in (await check(accepted)).findings} == {"warning"}


async def test_what_it_says_of_numbers_is_what_the_stream_does(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, table={"public.t": Table(exclude=["hidden"])})
    await execute(
        pg_db, "CREATE TABLE t (id int PRIMARY KEY, n numeric, f float8, r real, l numeric[], hidden numeric)",
        "CREATE TABLE u (id int PRIMARY KEY)",
    )  # fmt: skip
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (1, 'NaN', 'NaN', 'Infinity', '{NaN}', 'NaN')")
        await settled(config)
    after = (await events(config, "t"))[-1]["after"]
    assert after["l"] == ["NaN"]
    found = await check(config)
    assert found.exact is (after["n"] == "NaN")
    said = [one.what for one in about(found.findings, "public.t")]
    assert said == ([] if found.exact else ["NaN and infinities of n, f, r arrive as null"])
    assert about(found.findings, "public.u") == []


async def test_an_older_plugin_concerns_the_columns_that_are_published(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, table={"public.t": Table(exclude=["hidden", "gone", "lost"])})
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2), d float8, hidden real, s text)")
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as sql:
        tables = await Catalog(sql, config.source).published()
    assert [one.what for one in inexact(tables, config.source)] == ["NaN and infinities of n, d arrive as null"]
    assert [one.what for one in missing(tables, config.source)] == ["there is no column gone, lost, which is excluded"]


async def test_on_the_command_line(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    clean = await command("check", config, tmp_path)
    assert (clean.code, clean.out) == (0, "1 table: all is well\n")
    await execute(pg_db, "CREATE TABLE u (id int)")
    wrong = await command("check", config, tmp_path)
    assert wrong.code == 1
    assert wrong.out.splitlines() == [
        "error: public.u: no replica identity: its updates and deletes are not in PostgreSQL's log",
        "  the bridge stops at the first one",
        '  → ALTER TABLE "public"."u" REPLICA IDENTITY FULL; or give it a primary key',
        "2 tables: 1 error",
    ]
    printed = json.loads((await command("check", config, tmp_path, "--json")).out)
    assert (printed["ok"], printed["tables"], len(printed["findings"])) == (False, 2, 1)
    away = await command("check", _elsewhere(config), tmp_path)
    assert away.code == 4 or "cannot be reached" in away.err


def _elsewhere(config: Config) -> Config:
    dsn = type(config.source.dsn)("postgresql://nobody@127.0.0.1:1/x")
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, dsn=dsn))
