"""`bridge check`: each finding is true, and gone once its remedy was followed."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import psycopg
import pytest

from bridge.config import Config, Index, Table
from bridge.embedded import NatsServer, SearchEngine
from bridge.index.engine import opened
from bridge.operate.check import check as look
from bridge.operate.checks.finding import Checked, Finding
from bridge.operate.checks.tables import inexact, missing
from bridge.source.catalog import Catalog
from tests.running import MARK, Process, bridge, command, events, execute, settled, source, streaming, toml

pytestmark = pytest.mark.anyio


async def check(config: Config) -> Checked:
    """Everything, asked of the servers that are there."""
    return await look(config, list(config.stream.servers))


async def of_tables(config: Config) -> list[Finding]:
    """What is found of tables alone."""
    return [one for one in (await check(config)).found if one.id.startswith("tables.")]


def about(found: list[Finding], table: str) -> list[Finding]:
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
    remedies = {one.about: one.next for one in found.of("error")}
    assert remedies == {
        "public.Plain t": 'ALTER TABLE "public"."Plain t" REPLICA IDENTITY FULL; or give it a primary key',
        "public.fit": 'ALTER TABLE "public"."fit" REPLICA IDENTITY USING INDEX "fit_a"; or ALTER TABLE "public"."fit"'
        " REPLICA IDENTITY FULL",
        "public.nulls": 'ALTER TABLE "public"."nulls" REPLICA IDENTITY FULL; or give it a primary key',
        "public.part": 'ALTER TABLE "public"."part" REPLICA IDENTITY FULL; or give it a primary key',
        "public.none": 'ALTER TABLE "public"."none" REPLICA IDENTITY USING INDEX "none_pkey"; or ALTER TABLE'
        ' "public"."none" REPLICA IDENTITY FULL',
    }
    assert [one.what for one in found.of("ok") if one.id == "tables.published"] == ["7 tables published"]
    assert {one.id for one in found.of("error")} == {"tables.identity"}
    for remedy in remedies.values():
        await execute(pg_db, remedy.partition("; or ")[0])
    assert await of_tables(config) == []
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
    found = await of_tables(config)
    assert [(one.about, one.level) for one in found] == [("public.a", "error"), ("public.b", "warning")]
    accepted = source(pg_db, nats.url, on_missing_identity="warn")
    assert {one.level for one in await of_tables(accepted)} == {"warning"}
    assert (await check(accepted)).sound


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
    [plugin] = [one.what for one in found.findings if one.id == "postgres.wal2json"]
    exact = after["n"] == "NaN"
    assert ("2.6 or newer" in plugin) is exact
    said = [one.what for one in about(found.found, "public.t")]
    assert said == ([] if exact else ["NaN and infinities of n, f, r arrive as null"])
    assert about(found.found, "public.u") == []


async def test_an_older_plugin_concerns_the_columns_that_are_published(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, table={"public.t": Table(exclude=["hidden", "gone", "lost"])})
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2), d float8, hidden real, s text)")
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as sql:
        tables = await Catalog(sql, config.source).published()
    assert [one.what for one in inexact(tables, config.source)] == ["NaN and infinities of n, d arrive as null"]
    assert [one.what for one in missing(tables, config.source)] == ["there is no column gone, lost"]


async def test_on_the_command_line(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    clean = await command("check", config, tmp_path)
    assert clean.code == 0
    assert "ok tables.published: 1 table published\n" in clean.out
    # PostgreSQL's own default, which is a warning and no failure.
    assert (await command("check", config, tmp_path, "--strict", "--quiet")).code == 1
    await execute(pg_db, "CREATE TABLE u (id int)")
    wrong = await command("check", config, tmp_path, "--quiet")
    assert wrong.code == 1
    assert wrong.out.splitlines()[:3] == [
        "error tables.identity: public.u: no replica identity: its updates and deletes are not in PostgreSQL's log",
        "  the bridge stops at the first one",
        '  → ALTER TABLE "public"."u" REPLICA IDENTITY FULL; or give it a primary key',
    ]
    assert wrong.out.splitlines()[3].startswith("warning postgres.wal_keep: ")
    assert "1 error, 1 warning" in wrong.out.splitlines()[-1]
    assert not [line for line in wrong.out.splitlines() if line.startswith("ok ")]
    printed = json.loads((await command("check", config, tmp_path, "--json")).out)
    assert (printed["ok"], printed["errors"], printed["warnings"]) == (False, 1, 1)
    assert {"ok", "warning", "error"} == {one["level"] for one in printed["findings"]}
    levels = [one["level"] for one in printed["findings"]]
    assert levels == ["error", "warning", *["ok"] * (len(levels) - 2)]
    worst = printed["findings"][0]
    assert (worst["id"], worst["fix"]["runs"]) == (
        "tables.identity",
        ['ALTER TABLE "public"."u" REPLICA IDENTITY FULL'],
    )
    assert {"id", "level", "about", "what", "why", "next"} == set(printed["findings"][-1])


async def test_servers_that_are_away_are_one_finding_each_and_the_rest_is_looked_at(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    away = await command("check", _elsewhere(config), tmp_path, "--quiet")
    assert away.code == 1
    assert [line.split(":")[0] for line in away.out.splitlines() if line[0] not in " 1234567890"] == [
        "error postgres.reachable"
    ]
    other = msgspec.structs.replace(
        config,
        stream=msgspec.structs.replace(config.stream, servers=["nats://127.0.0.1:1"]),
        index={"t": Index(table="public.t", alias="t", url=["http://127.0.0.1:1"])},
    )
    found = await check(other)
    assert [(one.id, one.next) for one in found.of("error")] == [
        ("jetstream.reachable", "start nats-server, or correct [stream] servers"),
        ("engine.reachable", "start it, or correct `url` of the index"),
    ]
    assert "postgres.version" in [one.id for one in found.of("ok")]


async def test_patterns_sections_and_unlogged_tables(pg_db: str, nats: NatsServer) -> None:
    config = source(
        pg_db,
        nats.url,
        tables=["public.*", "shop.*", "!public.gone_*"],
        table={"public.t": Table(exclude=["id"]), 'public."t"': Table(), "public.nobody": Table()},
    )
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)", "CREATE UNLOGGED TABLE quick (id int)")
    found = await of_tables(config)
    assert [(one.id, one.about) for one in found] == [
        ("tables.section", "public.t"),
        ("tables.columns", "public.t"),
        ("tables.pattern", "shop.*"),
        ("tables.pattern", "!public.gone_*"),
        ("tables.section", "public.nobody"),
        ("tables.unlogged", "public.quick"),
    ]
    absent = await of_tables(source(pg_db, nats.url, tables=["public.t", "public.absent"]))
    assert [(one.id, one.level) for one in absent] == [("tables.published", "error")]
    assert "public.absent does not exist" in absent[0].what
    none = await of_tables(source(pg_db, nats.url, tables=["nowhere.*"]))
    assert [(one.id, one.level) for one in none] == [("tables.published", "warning")]


async def test_a_table_of_an_index_that_is_not_published_is_an_error_and_mended_as_it_says(
    pg_db: str, nats: NatsServer
) -> None:
    await execute(
        pg_db,
        "CREATE TABLE messages (id int PRIMARY KEY)",
        'CREATE TABLE "Odd.one" (id int PRIMARY KEY)',
        "CREATE TABLE notes (id int PRIMARY KEY)",
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (10)",
        "CREATE TABLE waiting (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE UNLOGGED TABLE quick (id int PRIMARY KEY)",
    )

    async def said(tables: list[str], **index: list[str]) -> list[tuple[str, str, str]]:
        made = {
            name: Index(table=held[0], alias=name) if len(held) == 1 else Index(tables=held, alias=name)
            for name, held in index.items()
        }
        config = msgspec.structs.replace(source(pg_db, nats.url, tables=tables), index=made)
        found = await look(config, list(config.stream.servers), thorough=False)
        assert {one.level for one in found.found if one.id == "tables.index"} <= {"error"}
        return [(one.about, one.what, one.next) for one in found.found if one.id == "tables.index"]

    assert await said(["public.messages", "public.no*"], typo=["public.mesages"], right=["public.messages"]) == [
        (
            "typo",
            "public.mesages is not published (is it public.messages?): there is no such table",
            "correct `table` of [index.typo], or create it and add it to [source] tables",
        )
    ]
    assert await said(["public.messages", "!public.notes"], several=["public.messages", "public.notes"]) == [
        (
            "several",
            "public.notes is not published",
            "correct `tables` of [index.several], or add it to [source] tables",
        )
    ]
    assert await said(["public.*"], later=["public.later"], part=["public.parted_1"], quick=["public.quick"]) == [
        (
            "later",
            "public.later is not published: there is no such table",
            "correct `table` of [index.later], or create it",
        ),
        (
            "part",
            "public.parted_1 is a partition: its changes stand under the name public.parted",
            "correct `table` of [index.part]",
        ),
        (
            "quick",
            "public.quick is UNLOGGED, and so not published",
            "make it LOGGED, or correct `table` of [index.quick]",
        ),
    ]
    await execute(pg_db, "CREATE TABLE later (id int PRIMARY KEY)", "ALTER TABLE quick SET LOGGED")
    every = ['public."Odd.one"', "public.notes", 'public."messages"', "public.parted", "public.waiting"]
    assert await said(["public.*"], every=every, later=["public.later"], quick=["public.quick"]) == []
    elsewhere = await said(["public.*"], typo=["shop.notes"])
    assert "is it public.notes?" in elsewhere[0][1]
    # A table that [source] tables names and that is not there keeps nobody from the others.
    absent = await said(["public.notes", "public.gone"], typo=["public.note"])
    assert [what for _, what, _ in absent] == [
        "public.note is not published (is it public.notes?): there is no such table"
    ]


async def test_where_postgresql_is_away_nothing_is_said_of_the_tables_of_an_index(pg_db: str, nats: NatsServer) -> None:
    typo = {"typo": Index(table="public.mesages", alias="typo")}
    config = msgspec.structs.replace(_elsewhere(source(pg_db, nats.url)), index=typo)
    found = await look(config, list(config.stream.servers), thorough=False)
    assert [one.id for one in found.of("error")] == ["postgres.reachable"]


async def test_what_a_compacted_log_cannot_hold_is_an_error_and_mended_as_it_says(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, stream={"mode": "compact"})
    await execute(
        pg_db,
        "CREATE TABLE toasted (id int PRIMARY KEY, body text)",
        "CREATE TABLE whole (id int PRIMARY KEY, n int)",
    )
    [found] = await of_tables(config)
    assert (found.id, found.about, "body (TOASTed values)" in found.what) == ("tables.compact", "public.toasted", True)
    assert found.fix is not None
    await execute(pg_db, *found.fix.runs)
    assert await of_tables(config) == []


async def test_a_running_bridge_says_once_what_is_found_and_what_it_says_itself_not_twice(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, tables=["public.*", "nowhere.*"], on_missing_identity="warn")
    await execute(pg_db, MARK, "CREATE TABLE loose (id int)", "CREATE UNLOGGED TABLE quick (id int)")
    process = Process(tmp_path, toml(config))
    process.start("--log-format", "json")
    try:
        await process.said("tables.pattern")
        await settled(config)
        # A session that begins anew has nothing new to say.
        await execute(
            pg_db,
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            f" WHERE slot_name = '{config.source.slot}'",
        )
        await process.said('"event": "streaming"', times=2)
        await settled(config)
        assert await process.end() == 0
        lines = [json.loads(line) for line in process.text.splitlines()]
        said = [line for line in lines if line["event"] == "check"]
        assert [line["id"] for line in said if not line["id"].startswith("clocks.")] == [
            "postgres.wal_keep",
            "tables.pattern",
        ]
        assert all(line["next"] and line["why"] and line["level"] == "warning" for line in said)
        assert {"table without key", "table not logged"} <= {line["event"] for line in lines}
    finally:
        process.close()


def _elsewhere(config: Config) -> Config:
    dsn = type(config.source.dsn)("postgresql://nobody@127.0.0.1:1/x")
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, dsn=dsn))


async def test_of_an_index_that_can_never_be_built_it_is_not_said_that_it_will_be(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    await execute(pg_db, "CREATE TABLE messages (id int PRIMARY KEY)")
    config = source(pg_db, nats.url)
    typo, right = f"{config.source.name}typo", f"{config.source.name}right"
    made = {
        typo: Index(table="public.mesages", url=[osmem.url], alias=typo),
        right: Index(table="public.messages", url=[osmem.url], alias=right),
    }
    config = msgspec.structs.replace(config, index=made)
    found = (await look(config, list(config.stream.servers))).findings
    assert [one.about for one in found if one.id == "tables.index"] == [typo]
    assert {(one.about, one.what) for one in found if one.id == "engine.alias"} == {
        (right, f"not built yet: `bridge index {right}` does it")
    }
    # Whatever else is wrong with it is said all the same.
    async with opened(made[typo]) as engine:
        await engine.create(typo, {})
        try:
            found = (await look(config, list(config.stream.servers))).findings
        finally:
            await engine.delete(typo)
    assert (typo, "error") in {(one.about, one.level) for one in found if one.id == "engine.alias"}
