"""Compact mode: the log keeps one event a row, and is the tables at any time."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import msgspec
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, until
from bridge.errors import ConfigError, NotCompactable, OtherStream
from bridge.event import Position
from bridge.stream import objects, subjects
from bridge.stream.claims import Claims, bucket_of
from bridge.stream.keyed import located
from bridge.stream.reader import Message
from bridge.stream.state import SnapshotStatus, State
from tests.compacted import agrees
from tests.running import (
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

TABLES = [
    "CREATE TABLE users (id int PRIMARY KEY, age int)",
    "CREATE TABLE pairs (a int, b text, n numeric(8,2), PRIMARY KEY (a, b))",
    "ALTER TABLE pairs REPLICA IDENTITY FULL",
    "CREATE TABLE days (day date, n int, seen int, PRIMARY KEY (day, n)) PARTITION BY RANGE (day)",
    "CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')",
    "CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')",
]


def compact(dsn: str, nats: NatsServer, *, ttl: str = "7d", **changes: object) -> Config:
    return source(dsn, nats.url, stream={"mode": "compact", "tombstone_ttl": ttl, **changes})


async def on(config: Config, table: str) -> dict[str, Message]:
    """The messages of a table of public by what follows its subject."""
    start = f"cdc.{config.source.name}.public.{table}."
    found = await messages(config)
    return {message.subject.removeprefix(start): message for message, one in found if message.subject.startswith(start)}


async def test_each_row_has_its_own_subject_with_its_last_state_alone(pg_db: str, nats: NatsServer) -> None:
    await execute(pg_db, *TABLES, "INSERT INTO users VALUES (1, 10), (2, 20)")
    config = compact(pg_db, nats)
    async with bridge(config):
        await settled(config)
        assert {k: m.op for k, m in (await on(config, "users")).items()} == {
            "@begin": "snapshot", "1": "read", "2": "read", "@end": "snapshot",
        }  # fmt: skip
        await execute(
            pg_db,
            "UPDATE users SET age = 11 WHERE id = 1",
            "UPDATE users SET age = 12 WHERE id = 1",
            "DELETE FROM users WHERE id = 2",
            "INSERT INTO pairs VALUES (1, 'a b', 1), (1, 'a,b', 2), (1, '1', 3)",
            "INSERT INTO days VALUES ('2026-01-31', 1, 0)",
        )
        await settled(config)
        assert {k: m.op for k, m in (await on(config, "users")).items()} == {
            "@begin": "snapshot", "@end": "snapshot", "1": "update", "2": "delete",
        }  # fmt: skip
        assert {k for k in await on(config, "pairs") if k[0] != "@"} == {"1,a=20b", "1,a=2Cb", "1,=271"}
        assert {k for k in await on(config, "days") if k[0] != "@"} == {"public=2Edays_1.2026-01-31,1"}
    await agrees(config)


async def test_a_changed_key_is_a_tombstone_and_the_row_in_one_batch(pg_db: str, nats: NatsServer) -> None:
    await execute(
        pg_db,
        *TABLES,
        "INSERT INTO users SELECT g, g FROM generate_series(1, 1300) g",
        "INSERT INTO pairs VALUES (1, 'x', 1)",
    )
    config = compact(pg_db, nats)
    async with bridge(config):
        await streaming(config)
        # One message before the pairs, so that every batch of a thousand would end within a pair.
        await execute(
            pg_db, "BEGIN; INSERT INTO users VALUES (0, 0); UPDATE users SET id = id + 10000 WHERE id > 0; COMMIT"
        )
        await execute(pg_db, "UPDATE pairs SET b = 'y', n = 2 WHERE b = 'x'")
        await settled(config)
    found = await on(config, "users")
    pairs = [(found[str(g)], found[str(g + 10000)]) for g in range(1, 1301)]
    assert all(new.seq == old.seq + 1 and (old.op, new.op) == ("delete", "insert") for old, new in pairs)
    assert all(old.position[:-1] + "1" == new.position and old.position[-1] == "0" for old, new in pairs)
    async with broker_of(config) as broker:

        async def batch(seq: int) -> str:
            stored = await broker.message(config.stream.name, seq=seq)
            assert stored is not None
            return stored.headers["Nats-Batch-Id"]

        assert [await batch(old.seq) for old, _ in pairs] == [await batch(new.seq) for _, new in pairs]
    assert [m.op for m in (await on(config, "pairs")).values() if m.op != "snapshot"] == ["delete", "insert"]
    gone, row = [e for e in await events(config, "pairs") if e["op"] != "read"]
    assert (gone["key"], gone["before"]["n"], "after" in gone) == ({"a": 1, "b": "x"}, 1.0, False)
    assert (row["key"], row["after"]["n"], "before" in row) == ({"a": 1, "b": "y"}, 2.0, False)
    await agrees(config)


async def test_tombstones_go_and_a_start_after_that_finds_no_gap(pg_db: str, nats: NatsServer) -> None:
    await execute(pg_db, *TABLES, "INSERT INTO users VALUES (1, 1), (2, 2)")
    config = compact(pg_db, nats, ttl="1s")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "DELETE FROM users WHERE id = 2", "DELETE FROM users WHERE id = 1")

        async def gone() -> bool:
            async with broker_of(config) as broker:
                state = await broker.stream(config.stream.name)
            assert state is not None
            return state.last_seq > (await messages(config))[-1][0].seq and len(await on(config, "users")) == 2

        await until(gone, 30, "the tombstones are gone")
    async with bridge(config):
        await execute(pg_db, "INSERT INTO users VALUES (1, 5), (3, 3)")
        await settled(config)
    assert {k for k in await on(config, "users") if k[0] != "@"} == {"1", "3"}
    await agrees(config)


async def test_a_truncate_purges_what_it_emptied_and_nothing_else(pg_db: str, nats: NatsServer) -> None:
    await execute(
        pg_db,
        *TABLES,
        "INSERT INTO users SELECT g, g FROM generate_series(1, 50) g",
        "INSERT INTO days SELECT '2026-01-01'::date + g, g, 0 FROM generate_series(0, 58) g",
    )
    config = compact(pg_db, nats)
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "TRUNCATE days_1",
            "BEGIN; INSERT INTO users VALUES (77, 0); TRUNCATE users; INSERT INTO users VALUES (1, 2); COMMIT",
            "INSERT INTO days VALUES ('2026-01-05', 1, 1)",
        )
        await settled(config)
        await purged(config, {"users": {"@truncate", "1"}})
        assert len(await on(config, "days")) == 28 + 1 + 1 + 2  # February, January, its truncate, both markers
        await execute(pg_db, "TRUNCATE days", "INSERT INTO days VALUES ('2026-02-05', 1, 1)")
        await settled(config)
        await purged(
            config,
            {
                "days": {
                    "@truncate",
                    "public=2Edays_1.@truncate",
                    "public=2Edays_2.@truncate",
                    "public=2Edays_2.2026-02-05,1",
                }
            },
        )
    await agrees(config)


async def purged(config: Config, expected: dict[str, set[str]]) -> None:
    """Waits until the tables' subjects are those."""

    async def there() -> bool:
        return {table: set(await on(config, table)) for table in expected} == expected

    await until(there, 30, "what was truncated is purged")


DIES = """
import os, sys, uvloop, anyio
from pathlib import Path
from bridge import configfile
from bridge.pipeline import run
from bridge.stream import compact

def die(*args, **kwargs):
    os.kill(os.getpid(), 9)

add = compact.Compacting.add

def seven_thousand(self, *args, **kwargs):
    if self.next_seq > 7000:
        die()
    add(self, *args, **kwargs)

if sys.argv[2] == "purge":
    compact.purge = die
else:
    compact.Compacting.add = seven_thousand
settings = configfile.load(Path(sys.argv[1]), {})
uvloop.run(run.run(settings, list(settings.stream.servers), anyio.Event()))
"""


async def killed(config: Config, folder: Path, where: str) -> None:
    """A bridge in a process of its own that kills itself before a purge, or within a snapshot."""
    file = folder / "bridge.toml"
    file.write_text(toml(config))
    with anyio.fail_after(60):
        died = await anyio.run_process([sys.executable, "-c", DIES, str(file), where], check=False)
    assert died.returncode == -9, died.stderr.decode()[-2000:]


async def test_a_bridge_killed_before_a_purge_does_it_at_the_next_start(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    await execute(pg_db, *TABLES)
    config = compact(pg_db, nats)
    async with bridge(config):
        await execute(pg_db, "INSERT INTO users SELECT g, g FROM generate_series(1, 50) g")
        await settled(config)
    # Without a snapshot's end to purge at its start: that of an empty table.
    async with broker_of(config) as broker:
        await broker.api(f"STREAM.PURGE.{config.stream.name}", {"filter": f"cdc.{config.source.name}.*.*.@end"})
    await execute(pg_db, "TRUNCATE users", "INSERT INTO users VALUES (1, 2)")
    await killed(config, tmp_path, "purge")
    assert len(await on(config, "users")) > 50
    async with bridge(config):
        await settled(config)
        assert set(await on(config, "users")) == {"@truncate", "1"}
    await agrees(config)


async def test_rows_that_went_between_two_attempts_at_the_snapshot_are_purged(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    await execute(pg_db, *TABLES, "INSERT INTO users SELECT g, g FROM generate_series(1, 20000) g")
    config = compact(pg_db, nats)
    await killed(config, tmp_path, "snapshot")
    assert 20 < len(await on(config, "users")) < 10000
    await execute(pg_db, "DELETE FROM users WHERE id > 20")
    async with bridge(config):
        await settled(config)
        await purged(config, {"users": {"@begin", "@end", *map(str, range(1, 21))}})
    await agrees(config)


async def test_tables_that_it_cannot_hold_are_all_named_at_the_start(pg_db: str, nats: NatsServer) -> None:
    await execute(
        pg_db,
        *TABLES,
        "CREATE TABLE loose (n int)",
        "CREATE TABLE later (id int PRIMARY KEY DEFERRABLE)",
        "CREATE TABLE notes (id int PRIMARY KEY, body text, head varchar(9))",
        "CREATE TABLE codes (code text PRIMARY KEY, n int)",
    )
    error = await failure(compact(pg_db, nats))
    assert isinstance(error, ConfigError)
    found = str(error)
    for expected in [
        "3 tables",
        "public.loose, which has no key",
        'ALTER TABLE "public"."later" ADD PRIMARY KEY',
        "public.notes, whose updates can leave out body, head",
        'ALTER TABLE "public"."notes" REPLICA IDENTITY FULL',
    ]:
        assert expected in found
    assert "codes" not in found
    assert "pairs" not in found


async def test_a_table_that_is_altered_so_that_it_cannot_be_held_stops_the_bridge(pg_db: str, nats: NatsServer) -> None:
    await execute(pg_db, *TABLES, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    await execute(pg_db, "ALTER TABLE notes ALTER body SET STORAGE EXTERNAL, REPLICA IDENTITY FULL")
    await execute(pg_db, "INSERT INTO notes SELECT 1, repeat('x', 5000)")
    config = compact(pg_db, nats)
    async with bridge(config):
        await execute(pg_db, "UPDATE notes SET id = 2")
        await settled(config)
    assert (await events(config, "notes"))[-1]["after"] == {"id": 2, "body": "x" * 5000}
    error = await stopped(config, "ALTER TABLE notes REPLICA IDENTITY DEFAULT", "UPDATE notes SET id = 3")
    assert "leave out body" in error.what
    assert "xxx" not in str(error)
    assert 'ALTER TABLE "public"."notes" REPLICA IDENTITY FULL' in error.remedy
    again = await failure(config)
    assert isinstance(again, ConfigError)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("CREATE TABLE loose (n int)", "no key"),
        ("ALTER TABLE users ADD note text", "leave out note"),
        ("ALTER TABLE users DROP CONSTRAINT users_pkey, ADD UNIQUE (age), ALTER age SET NOT NULL", "no key"),
        ("ALTER TABLE users DROP CONSTRAINT users_pkey, ADD PRIMARY KEY (age)", "was id and is age"),
    ],
)
async def test_what_cannot_be_held_from_now_on_stops_it_with_a_remedy(
    pg_db: str, nats: NatsServer, statement: str, expected: str
) -> None:
    await execute(pg_db, *TABLES, "INSERT INTO users VALUES (1, 1)")
    config = compact(pg_db, nats)
    values = "(7)" if "loose" in statement else "(7, 7)"
    table = "loose" if "loose" in statement else "users"
    if "note" in statement:
        values = "(7, 7, 'x')"
    error = await stopped(config, "UPDATE users SET age = 2", statement, f"INSERT INTO {table} VALUES {values}")
    assert expected in str(error)


async def stopped(config: Config, *statements: str) -> NotCompactable:
    """What ends a bridge that streams, and meets those statements."""
    try:
        async with bridge(config):
            await settled(config)
            await execute(str(config.source.dsn), *statements)
            with anyio.fail_after(60):
                await anyio.sleep_forever()
    except NotCompactable as error:
        return error
    raise AssertionError("it goes on")


async def test_a_renamed_key_is_the_same_key(pg_db: str, nats: NatsServer) -> None:
    await execute(pg_db, *TABLES, "INSERT INTO users VALUES (1, 1)")
    config = compact(pg_db, nats)
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "ALTER TABLE users RENAME id TO number",
            "UPDATE users SET age = 5",
            "INSERT INTO users VALUES (2, 2)",
        )
        await settled(config)
    assert {k for k in await on(config, "users") if k[0] != "@"} == {"1", "2"}
    await agrees(config)


async def test_a_toasted_key_that_an_update_leaves_out_is_taken_from_the_key(pg_db: str, nats: NatsServer) -> None:
    key = "(SELECT string_agg(md5(g::text), '') FROM generate_series(1, 75) g)"
    await execute(pg_db, "CREATE TABLE codes (code text PRIMARY KEY, n int)", f"INSERT INTO codes VALUES ({key}, 1)")
    config = compact(pg_db, nats)
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "UPDATE codes SET n = 2")
        await settled(config)
    found = await on(config, "codes")
    [name] = [k for k in found if k[0] != "@"]
    assert name.startswith("#")
    assert len(name) == 65
    assert found[name].op == "update"
    await agrees(config)


@pytest.mark.parametrize(("made", "wanted"), [("log", "compact"), ("compact", "log")])
async def test_a_stream_of_the_other_mode_is_refused(pg_db: str, nats: NatsServer, made: str, wanted: str) -> None:
    await execute(pg_db, *TABLES)
    config = source(pg_db, nats.url, stream={"mode": made})
    async with bridge(config):
        await settled(config)
    error = await failure(msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, mode=wanted)))
    assert isinstance(error, OtherStream)
    assert f'mode = "{made}"' in error.remedy


async def test_a_compacted_stream_that_would_lose_rows_is_refused(pg_db: str, nats: NatsServer) -> None:
    await execute(pg_db, *TABLES)
    config = compact(pg_db, nats)
    async with bridge(config):
        await settled(config)
    async with broker_of(config) as broker:
        state = await broker.stream(config.stream.name)
        assert state is not None
        await broker.api(f"STREAM.UPDATE.{config.stream.name}", {**state.config, "max_age": 3600 * 10**9})
    error = await failure(config)
    assert isinstance(error, OtherStream)
    assert "max_age" in str(error)


async def past_the_tail(config: Config) -> bool:
    """Whether PostgreSQL was told of more than the log's end: what others wrote meanwhile, which only the bucket
    explains."""
    end = max(Position.parse(message.position).end for message, _ in await messages(config))
    [(confirmed,)] = await execute(
        str(config.source.dsn),
        "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots "
        f"WHERE slot_name = '{config.source.slot}'",
    )
    return int(confirmed) > end


async def test_a_lost_bucket_is_made_again_behind_a_changed_key(pg_db: str, nats: NatsServer) -> None:
    await execute(pg_db, *TABLES, "INSERT INTO users VALUES (1, 1)")
    config = compact(pg_db, nats)
    for number in range(2, 12):
        async with bridge(config):
            await settled(config)
            await execute(pg_db, f"UPDATE users SET id = {number}")

            async def changed(key: str = str(number)) -> bool:
                return key in await on(config, "users")

            await until(changed, 30, "the key has changed")
        if not await past_the_tail(config):
            break
    assert not await past_the_tail(config)
    assert await checkpoint(config) is not None
    async with broker_of(config) as broker:
        await broker.api(f"STREAM.DELETE.KV_{config.state.bucket}")
    async with bridge(config):
        await settled(config)
        async with broker_of(config) as broker:
            state = await State.open(broker, config.state.bucket)
            found = await state.get(subjects.snapshot_key(config.source.name, "public", "users"), SnapshotStatus)
    assert found is not None
    assert found[0].state == "done"
    await agrees(config)


async def test_a_large_row_is_found_under_its_key_and_its_object_goes_with_it(pg_db: str) -> None:
    async with NatsServer.throwaway(settings={"max_payload": "512KB"}) as small:
        config = compact(pg_db, small)
        await execute(
            pg_db,
            "CREATE TABLE notes (id int PRIMARY KEY, body text)",
            "ALTER TABLE notes REPLICA IDENTITY FULL",
            "INSERT INTO notes SELECT g, repeat('x', 900000) FROM generate_series(1, 3) g",
        )
        async with bridge(config):
            await streaming(config)
            await execute(pg_db, "UPDATE notes SET id = 4 WHERE id = 1", "UPDATE notes SET body = 'y' WHERE id = 2")
            await settled(config)
            found = await on(config, "notes")
            assert {k: m.op for k, m in found.items() if k[0] != "@"} == {
                "1": "delete", "2": "update", "3": "read", "4": "insert",
            }  # fmt: skip
            async with broker_of(config) as broker:
                claims = Claims(broker, config.stream.name, 1, located)
                large = [name async for name, _ in objects.oldest(broker, bucket_of(config.stream.name))]
                gone = await claims.compacted("~", set())
            # The second message of a changed key refers to the object under the change's own position.
            kept = {found["2"].position, found["3"].position, found["4"].position[:-1] + "0"}
            assert set(large) - gone == kept
            assert len(gone) == 2
        await agrees(config)
