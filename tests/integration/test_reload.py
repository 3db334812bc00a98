"""SIGHUP: a running bridge, or reader of indexes, goes on with the configuration as its file has it now."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import msgspec
import pytest

from bridge.config import Config, Index
from bridge.embedded import NatsServer, Postgres, SearchEngine, until
from bridge.index.engine import opened
from tests.oracle import agrees
from tests.running import Process, bridge, complete, events, execute, settled, source, toml

pytestmark = pytest.mark.anyio


def with_tables(config: Config, *patterns: str) -> Config:
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, tables=list(patterns)))


def hang_up(process: Process) -> None:
    assert process.process is not None
    process.process.send_signal(signal.SIGHUP)


async def test_what_has_changed_counts_from_there_on_and_nothing_is_lost(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    await execute(pg_db, *(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in ("a", "b")))
    config = with_tables(source(pg_db, nats.url), "public.*", "!public.b")
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await settled(config)
        await execute(pg_db, "INSERT INTO a VALUES (1)", "INSERT INTO b VALUES (1)")
        process.file.write_text(toml(with_tables(config, "public.*")))
        hang_up(process)
        # While it ends and begins again.
        await execute(pg_db, "INSERT INTO a SELECT generate_series(2, 300)", "INSERT INTO b VALUES (2)")
        await process.said("configuration reloaded", seconds=30)
        assert "changed=['source.tables']" in process.text
        await process.said("streaming", times=2)
        await settled(config)
        await execute(pg_db, "INSERT INTO b VALUES (3)")
        await settled(config)
        await complete(config)
        assert await process.end() == 0
    finally:
        process.close()
    await agrees(with_tables(config, "public.*"))
    assert {one["key"]["id"] for one in await events(config, "b")} == {1, 2, 3}


async def test_a_file_with_mistakes_and_what_names_the_log_change_nothing(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    await execute(pg_db, "CREATE TABLE a (id int PRIMARY KEY)")
    config = source(pg_db, nats.url)
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await settled(config)
        process.file.write_text(toml(config).replace("[source]", "[source]\nnonsense = 1"))
        hang_up(process)
        await process.said("configuration not reloaded")
        assert "nonsense" in process.text
        process.file.write_text(toml(config).replace(config.source.slot, "another_slot"))
        hang_up(process)
        await process.said("configuration reloaded")
        assert "key=source.slot" in process.text
        await execute(pg_db, "INSERT INTO a VALUES (1)")
        await settled(config)
        assert process.text.count("streaming") == 1
        assert await process.end() == 0
    finally:
        process.close()
    await agrees(config)


async def test_a_password_that_was_changed_is_read_from_its_file(
    own_pg: Postgres, nats: NatsServer, tmp_path: Path
) -> None:
    await execute(
        own_pg.dsn(),
        "CREATE TABLE a (id int PRIMARY KEY)",
        "CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 'planted-old'",
    )
    hba = own_pg.data_dir / "pg_hba.conf"
    hba.write_text("host all guarded 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
    await execute(own_pg.dsn(), "SELECT pg_reload_conf()")
    config = source(own_pg.dsn(), nats.url)
    login, secret = own_pg.dsn(user="guarded"), tmp_path / "dsn"
    secret.write_text(login.replace("guarded@", "guarded:planted-old@"))
    process = Process(tmp_path, re.sub(r"(?m)^dsn = .*$", 'dsn_file = "dsn"', toml(config)))
    process.start()
    try:
        await settled(config)
        await execute(own_pg.dsn(), "ALTER ROLE guarded PASSWORD 'planted-new'", "INSERT INTO a VALUES (1)")
        await settled(config)
        secret.write_text(login.replace("guarded@", "guarded:planted-new@"))
        hang_up(process)
        await process.said("changed=['source.dsn']")
        await process.said("streaming", times=2)
        await execute(own_pg.dsn(), "INSERT INTO a VALUES (2)")
        await settled(config)
        assert await process.end() == 0
    finally:
        process.close()
    assert "planted" not in process.text
    assert [one["key"]["id"] for one in await events(config, "a")] == [1, 2]


async def test_a_reader_of_indexes_goes_on_with_what_its_file_has_now(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, tmp_path: Path
) -> None:
    await execute(pg_db, "CREATE TABLE a (id int PRIMARY KEY)", "INSERT INTO a VALUES (1)")
    config = source(pg_db, nats.url)
    first, second = f"{config.source.name}-1", f"{config.source.name}-2"
    password = tmp_path / "password"
    password.write_text("old")

    def file(*names: str, more: str = "") -> str:
        return (
            toml(config)
            + more
            + "".join(
                f'[index.{name}]\ntable = "public.a"\nurl = "{osmem.url}"\nuser = "u"\npassword_file = "{password}"\n'
                for name in names
            )
        )

    reader = Process(tmp_path, file(first))
    async with opened(Index(url=[osmem.url])) as engine, bridge(config):

        async def has(name: str, count: int) -> None:
            async def there() -> bool:
                return await engine.exists(name) and await engine.count(name) == count

            await until(there, 30, f"{name} has {count} documents:\n{reader.text[-2000:]}")

        await settled(config)
        reader.start("index")
        try:
            await has(first, 1)
            await reader.said("following")
            for wrong in (file(first, more="[snapshot]\nnonsense = 1\n"), toml(config)):
                reader.file.write_text(wrong)
                count = reader.text.count("configuration not reloaded")
                hang_up(reader)
                await reader.said("configuration not reloaded", times=count + 1)
            password.write_text("new")
            reader.file.write_text(file(first))
            hang_up(reader)
            await reader.said("configuration reloaded")
            await reader.said("following", times=2)
            reader.file.write_text(file(first, second).replace('index_http = ""', 'index_http = "127.0.0.1:9399"'))
            hang_up(reader)
            await reader.said("configuration reloaded", times=2)
            assert "key=operate.index_http" in reader.text
            assert reader.text.count("changed=['index']") == 2
            await has(second, 1)
            await execute(pg_db, "INSERT INTO a VALUES (2)")
            await has(first, 2)
            await has(second, 2)
            assert await reader.end() == 0
        finally:
            reader.close()
    assert "Traceback" not in reader.text
