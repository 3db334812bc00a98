"""What DDL changes behind the log's back while something else goes on: readings, stops, kills, standbys, other DDL."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from bridge.config import Config, Table
from bridge.embedded import NatsServer, Postgres
from bridge.operate.show import snapshot as show_snapshot
from bridge.operate.show.status import page
from bridge.operate.status.collect import collect
from bridge.operate.verify import verify
from bridge.pipeline.initial import Initial
from bridge.pipeline.reading import Reading
from bridge.pipeline.rewrites import Rewrites
from bridge.pipeline.shapes import Look, Shapes
from bridge.stream import asking
from bridge.stream.reach import complete_from
from bridge.stream.state import SnapshotStatus
from bridge.waiting import until
from tests import compacted
from tests.crash.process import Bridge
from tests.oracle import agrees
from tests.reading.steps import chunks_of, held
from tests.rewriting import MADE, begins, caught_up, judged
from tests.running import (
    MARK,
    bridge,
    command,
    events,
    execute,
    messages,
    settled,
    source,
    state_of,
    statuses,
    streaming,
    toml,
)

pytestmark = pytest.mark.anyio

LARGE = [
    "INSERT INTO t SELECT g, -g, 'b' || g FROM generate_series(31, 300) g",
    "INSERT INTO p SELECT g, g, 'b' || g FROM generate_series(0, 199) g ON CONFLICT DO NOTHING",
]
DEFAULT = "ALTER TABLE t ADD extra int DEFAULT 7"


async def so(config: Config, table: str, condition: Callable[[SnapshotStatus], bool]) -> SnapshotStatus:
    """Waits until a table's status is so."""
    found: list[SnapshotStatus] = []

    async def true() -> bool:
        found[:] = [(await statuses(config))[table]]
        return condition(found[0])

    assert await until(true, seconds=30), found
    return found[0]


async def ask(config: Config, table: str, where: str = "") -> None:
    async with state_of(config) as state:
        await asking.ask(state, config.source.name, ("public", table), where=where)


@pytest.mark.parametrize("where", ["read", "published"])
@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("t", [DEFAULT]),
        ("t", ["ALTER TABLE t ALTER v TYPE int USING v - 1000"]),
        ("t", ["ALTER TABLE t DROP body, ADD body text"]),
        ("t", ["ALTER TABLE t SET UNLOGGED", "UPDATE t SET v = v - 1000", "ALTER TABLE t SET LOGGED"]),
        (
            "t",
            ["BEGIN; DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (70, 0); COMMIT"],
        ),
        ("t", ["TRUNCATE t", "INSERT INTO t VALUES (3, 0, 'n')"]),
        ("p", ["ALTER TABLE p ATTACH PARTITION aside.loose FOR VALUES FROM (200) TO (300)"]),
        ("p", ["ALTER TABLE p DETACH PARTITION p1"]),
        ("p", ["DROP TABLE p22"]),
        ("p", ["ALTER TABLE p ALTER v TYPE int USING v - 1000"]),
    ],
)
async def test_a_table_that_is_being_read_is_read_from_its_beginning(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, table: str, change: list[str], where: str
) -> None:
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE, *LARGE)
    async with bridge(config), held(monkeypatch, where, 2) as (there, on):
        await caught_up(config)
        await ask(config, table)
        await there.wait()
        await execute(pg_db, *change)
        await judged(config)
        on.set()
        await caught_up(config)
    await agrees(config, rewritten=["t", "p"])
    assert (await statuses(config))[table].state == "done"


async def test_a_reading_goes_on_with_a_table_that_is_made_again_before_anybody_has_seen_it(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 50)
    seen, each = anyio.Event(), Rewrites._each

    async def waiting(self: Rewrites, *arguments: Any) -> None:
        await seen.wait()
        await each(self, *arguments)

    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE, *LARGE)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await caught_up(config)
        monkeypatch.setattr(Rewrites, "_each", waiting)
        await ask(config, "t")
        await there.wait()
        await execute(
            pg_db, "DROP TABLE t", "CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (70, 0)"
        )
        on.set()
        found = await so(config, "t", lambda status: status.again is None or status.again.state == "failed")
        assert (found.state, found.rows) == ("done", 1)
        seen.set()
        await caught_up(config)
    await agrees(config, rewritten=["t"])


async def test_a_reading_that_its_table_left_begins_when_there_is_one_again(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE, *LARGE)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await caught_up(config)
        await ask(config, "t")
        await there.wait()
        await execute(pg_db, "DROP TABLE t")
        on.set()
        await so(config, "t", lambda status: status.again is not None and status.again.state == "failed")
        await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (70, 0)")
        await caught_up(config)
    await agrees(config, rewritten=["t"])


async def test_a_reading_that_begins_just_then_is_no_reason_to_forget_it(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, on = anyio.Event(), anyio.Event()
    collect = Reading._collect

    async def waiting(self: Reading) -> None:
        await collect(self)
        there.set()
        await on.wait()

    monkeypatch.setattr(Reading, "_collect", waiting)
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        await ask(config, "t")
        await there.wait()
        await execute(pg_db, DEFAULT)
        await so(config, "t", lambda status: status.state == "incomplete")
        on.set()
        found = await so(config, "t", lambda status: status.again is None)
        await caught_up(config)
    assert (found.state, found.error) == ("done", "")
    await agrees(config)


async def test_a_whole_reading_that_is_asked_for_during_one_of_some_rows_takes_place(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE, *LARGE)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await caught_up(config)
        await ask(config, "t", where="id > 0")
        await there.wait()
        await ask(config, "t")
        on.set()
        await caught_up(config)
    assert begins(await agrees(config)) == ["mark", "p", "t", "t"]


async def test_what_was_read_since_is_not_read_once_more(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, on, each = anyio.Event(), anyio.Event(), Rewrites._each

    async def waiting(self: Rewrites, *arguments: Any) -> None:
        there.set()
        await on.wait()
        await each(self, *arguments)

    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        monkeypatch.setattr(Rewrites, "_each", waiting)
        await execute(pg_db, DEFAULT)
        await there.wait()
        await ask(config, "t")
        await so(config, "t", lambda status: status.again is None)
        on.set()
        await caught_up(config)
    assert begins(await agrees(config)) == ["mark", "p", "t", "t"]


async def test_a_warning_is_all_where_that_is_asked_for(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        before = (await statuses(config))["t"]
        await execute(pg_db, DEFAULT, "DROP TABLE p1")
        await so(config, "p", lambda status: status.state == "incomplete")
        await so(config, "t", lambda status: status.state == "incomplete")
    async with bridge(config):
        await caught_up(config)
        assert begins(await messages(config)) == ["mark", "p", "t"]
        found = (await statuses(config))["t"]
        assert found.error == "column extra added with a default: its rows in the log are from before"
        assert complete_from(found, 1, "cdc", "public.t") == before.complete_from > 0
        [report] = await verify(config, [nats.url], ["public.t"])
        assert report.counts == {"different": 30}
        status = await collect(config, [nats.url])
        told = {one.what: one.next for one in status.findings if one.level == "problem"}
        assert {next_ for what, next_ in told.items() if found.error in what} == {"bridge snapshot public.t"}
        assert {next_ for what, next_ in told.items() if "partition public.p1 left" in what} == {
            "bridge snapshot public.p"
        }
        page(status, text := io.StringIO())
        assert f"public.t: incomplete, {found.error}" in text.getvalue()
        show_snapshot.told({("public", "t"): found}, text := io.StringIO(), asked=False, running=True)
        assert found.error in text.getvalue()
        assert (await command("snapshot", config, tmp_path, "public.*", "--wait")).code == 0
        await caught_up(config)
        assert (await collect(config, [nats.url])).in_step
    await agrees(config, rewritten=["t", "p"])


async def test_a_change_of_mind_heals_what_was_only_warned_of(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        await execute(pg_db, DEFAULT)
        await so(config, "t", lambda status: status.state == "incomplete")
    config = replace(config, snapshot=replace(config.snapshot, on_rewrite="snapshot"))
    async with bridge(config):
        await caught_up(config)
    await agrees(config)


async def test_what_was_warned_of_is_no_picture_of_a_table_that_was_left_out(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        await execute(pg_db, DEFAULT)
        await so(config, "t", lambda status: status.state == "incomplete")
    without = replace(config, source=replace(config.source, tables=["public.*", "!public.t"]))
    async with bridge(without):
        await execute(pg_db, "DELETE FROM t WHERE id < 5")
        await settled(without)
    assert (await statuses(config))["t"].complete_from == 0
    async with bridge(config):
        await caught_up(config)
    await agrees(config)


async def test_a_table_without_key_is_named_and_loses_partitions_all_the_same(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    keyless = [
        "CREATE TABLE k (n int)",
        "INSERT INTO k VALUES (1)",
        "CREATE TABLE l (n int) PARTITION BY LIST (n)",
        "CREATE TABLE l1 PARTITION OF l FOR VALUES IN (1)",
        "CREATE TABLE l2 PARTITION OF l FOR VALUES IN (2)",
        "INSERT INTO l VALUES (1), (1), (2)",
    ]
    await execute(pg_db, MARK, *keyless)
    async with bridge(config):
        await caught_up(config)
        await execute(pg_db, "ALTER TABLE k ADD extra int DEFAULT 7", "DROP TABLE l1")
        found = await so(config, "k", lambda status: status.state == "incomplete")
        await caught_up(config)
        assert found.again is None
        assert "it has no key to be read again by" in found.error
        assert (await statuses(config))["l"].state == "done"
        status = await collect(config, [nats.url])
        assert any("public.k" in one.what and one.level == "problem" for one in status.findings)
    left = [one for one in await events(config, "l") if one["op"] == "truncate"]
    assert [one["partition"] for one in left] == ["public.l1"]
    await execute(pg_db, "ALTER TABLE k DROP extra")
    await agrees(config)


@pytest.mark.parametrize("state", ["paused", "failed"])
async def test_a_reading_that_rests_does_so_and_begins_anew_when_it_goes_on(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE, *LARGE)
    root = ("public", "t")
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on), state_of(config) as bucket:
        await caught_up(config)
        await ask(config, "t")
        await there.wait()
        if state == "paused":
            assert await asking.pause(bucket, config.source.name, root)
        else:
            await execute(pg_db, "ALTER TABLE t DROP CONSTRAINT t_pkey")
        on.set()
        if state == "failed":
            await so(config, "t", lambda status: status.again is not None and status.again.state == "failed")
            await execute(pg_db, "ALTER TABLE t ADD PRIMARY KEY (id)")
        await execute(pg_db, "ALTER TABLE t ALTER v TYPE int USING v - 1000")
        await settled(config)
        # What is seen at one look is told; the key may have gone at one before.
        found = await so(config, "t", lambda s: "all rows written anew" in s.error and s.again is not None)
        assert found.again is not None
        assert (found.state, found.again.state, found.again.after) == ("incomplete", state, [])
        assert await asking.resume(bucket, config.source.name, root)
        await caught_up(config)
    await agrees(config, rewritten=["t"])


@pytest.mark.parametrize("point", ["rewrite.asked", "reading.began", "reading.ended"])
async def test_a_bridge_that_is_killed_meanwhile_forgets_nothing(
    pg_db: str, nats: NatsServer, tmp_path: Path, point: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    process = Bridge(tmp_path, toml(config))
    try:
        await process.start(f"{point}:kill")
        await caught_up(config)
        await execute(pg_db, DEFAULT)
        assert await process.ended() == -9
        await process.start()
        await caught_up(config)
        await process.stop()
    finally:
        await process.close()
    await agrees(config)
    assert (await statuses(config))["t"].state == "done"


async def test_a_truncate_right_before_a_stop_is_no_rewrite_at_the_next_start(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        await execute(pg_db, "TRUNCATE t", "INSERT INTO t VALUES (1, 1, 'n')")
        await settled(config)
    async with bridge(config):
        await caught_up(config)
    assert begins(await agrees(config)) == ["mark", "p", "t"]


async def test_a_truncate_that_nobody_has_looked_at_is_sent_again(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it was killed before it looked: a table without a key could not be read again.
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE k (v int)", "ALTER TABLE k REPLICA IDENTITY FULL", "INSERT INTO k VALUES (1)")
    async with bridge(config):
        await caught_up(config)
    with monkeypatch.context() as patch:
        patch.setattr(Rewrites, "run", never)
        patch.setattr(Rewrites, "settled", never)
        async with bridge(config):
            await settled(config)
            await execute(pg_db, "TRUNCATE k", "INSERT INTO k VALUES (2)")
            await settled(config)
    async with bridge(config):
        await caught_up(config)
    assert begins(await agrees(config)) == ["k"]
    assert (await statuses(config))["k"].state == "done"


async def never(_: Rewrites) -> None:
    await anyio.sleep_forever()


@pytest.mark.parametrize("mode", ["initial", "incremental"])
@pytest.mark.parametrize(
    "change",
    [
        [DEFAULT],
        ["ALTER TABLE p DETACH PARTITION p1"],
        ["ALTER TABLE p ATTACH PARTITION aside.loose FOR VALUES FROM (200) TO (300)"],
        ["BEGIN; DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (7); COMMIT"],
        ["ALTER TABLE t SET UNLOGGED", "UPDATE t SET v = v - 1000", "ALTER TABLE t SET LOGGED"],
        [
            "CREATE TABLE n (id int PRIMARY KEY, v int)",
            "INSERT INTO n VALUES (1, 1)",
            "ALTER TABLE n ADD w int DEFAULT 7",
        ],
    ],
)
async def test_what_is_altered_before_the_stream_begins_is_seen(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, mode: str, change: list[str]
) -> None:
    exported, read = Shapes.exported, Initial.read

    async def altered(self: Shapes, created: Any) -> None:
        await exported(self, created)
        await execute(pg_db, *change)

    async def altered_later(self: Initial) -> None:
        await read(self)
        await execute(pg_db, *change)

    if mode == "initial":
        monkeypatch.setattr(Initial, "read", altered_later)
    else:
        monkeypatch.setattr(Shapes, "exported", altered)
    config = source(pg_db, nats.url, mode=mode)
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
    await agrees(config, rewritten=["t", "p"])
    assert {one.state for one in (await statuses(config)).values()} == {"done"}


async def test_a_commit_that_is_not_visible_yet_is_waited_for(own_pg: Postgres, nats: NatsServer) -> None:
    dsn = own_pg.dsn()
    config = source(dsn, nats.url)
    await execute(dsn, *MADE)
    async with bridge(config), anyio.create_task_group() as tasks:
        await caught_up(config)
        await execute(dsn, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
        tasks.start_soon(execute, dsn, f"SET synchronous_commit = on; {DEFAULT}")

        async def hidden() -> bool:
            rows = await execute(dsn, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            return rows == [(1,)]

        assert await until(hidden, seconds=20)
        assert (await statuses(config))["t"].state == "done"
        await execute(dsn, "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
        await so(config, "t", lambda status: status.mode == "incremental")
        await caught_up(config)
    await agrees(config)


async def test_tables_of_an_older_version_are_taken_as_they_are(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE, "ALTER TABLE t ADD was int DEFAULT 7")
    async with bridge(config):
        await caught_up(config)
    async with state_of(config) as state:
        for key in await state.keys(f"shape.{config.source.name}."):
            await state.delete(key)
    async with bridge(config):
        await caught_up(config)
        await execute(pg_db, DEFAULT)
        await so(config, "t", lambda status: status.mode == "incremental")
        await caught_up(config)
    assert begins(await agrees(config)) == ["mark", "p", "t", "t"]


async def test_what_is_excluded_may_be_changed(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, table={"public.t": Table(exclude=["extra", "more"])})
    await execute(pg_db, *MADE, "ALTER TABLE t ADD extra int, ADD more int")
    async with bridge(config):
        await caught_up(config)
        await execute(pg_db, "ALTER TABLE t DROP extra", "ALTER TABLE t ADD extra int DEFAULT 7")
        await caught_up(config)
    assert begins(await agrees(config)) == ["mark", "p", "t"]


async def test_a_table_that_was_altered_before_it_was_met_is_read(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    made = [
        "CREATE TABLE n (id int, v int)",
        "INSERT INTO n SELECT g, g FROM generate_series(1, 9) g",
        "ALTER TABLE n RENAME v TO w",
        "ALTER TABLE n ADD PRIMARY KEY (id)",
    ]
    load = Shapes.of

    async def late(self: Shapes, root: tuple[str, str]) -> Any:
        if root == ("public", "n"):
            await execute(pg_db, *made[2:])
        return await load(self, root)

    async with bridge(config):
        await caught_up(config)
        monkeypatch.setattr(Shapes, "of", late)
        await execute(pg_db, f"BEGIN; {made[0]}; {made[1]}; COMMIT")
        await caught_up(config)
    await agrees(config)
    assert (await statuses(config))["n"].state == "done"


async def test_a_partition_of_a_moment_leaves_no_rows(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep, on, look = anyio.Event(), anyio.Event(), Shapes.look

    async def waiting(self: Shapes) -> Look:
        asleep.set()
        await on.wait()
        return await look(self)

    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        monkeypatch.setattr(Shapes, "look", waiting)
        await execute(
            pg_db, "CREATE TABLE p3 PARTITION OF p FOR VALUES FROM (200) TO (300)", "INSERT INTO p VALUES (201, 1, 'n')"
        )
        await asleep.wait()
        await settled(config)
        await execute(pg_db, "DROP TABLE p3")
        await settled(config)
        on.set()
        await caught_up(config)
    assert begins(await agrees(config)) == ["mark", "p", "t"]


async def test_a_partition_that_takes_anothers_name_keeps_its_rows(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Rewrites._left

    async def later(self: Rewrites, *arguments: Any) -> None:
        await execute(
            pg_db, "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100)", "INSERT INTO p VALUES (4, 4, 'n')"
        )
        await settled(config)
        await left(self, *arguments)

    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    async with bridge(config):
        await caught_up(config)
        monkeypatch.setattr(Rewrites, "_left", later)
        await execute(pg_db, "DROP TABLE p1")
        await caught_up(config)
    await agrees(config, rewritten=["p"])


@pytest.mark.parametrize(
    "change",
    [
        [DEFAULT],
        ["ALTER TABLE p DETACH PARTITION p1"],
        ["ALTER TABLE p ATTACH PARTITION aside.loose FOR VALUES FROM (200) TO (300)"],
        ["ALTER TABLE p1 RENAME TO p1_old"],
        ["BEGIN; DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (7, 7); COMMIT"],
        ["TRUNCATE t", "INSERT INTO t VALUES (1, 1)"],
    ],
)
@pytest.mark.parametrize("runs", [True, False])
async def test_a_compacted_log_is_healed_too(pg_db: str, nats: NatsServer, change: list[str], runs: bool) -> None:
    config = source(pg_db, nats.url, stream={"mode": "compact"})
    full = [f"ALTER TABLE {table} REPLICA IDENTITY FULL" for table in ("t", "p1", "p21", "p22", "aside.loose", "mark")]
    await execute(pg_db, *MADE, *full)
    async with bridge(config):
        await caught_up(config)
        if runs:
            await execute(pg_db, *change)
            await caught_up(config)
    if not runs:
        await execute(pg_db, *change)
        async with bridge(config):
            await caught_up(config)
    await compacted.agrees(config)


async def test_nothing_is_kept_of_a_source_that_is_dropped(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    async with bridge(config):
        await streaming(config)
        await caught_up(config)
    async with state_of(config) as state:
        assert await state.keys(f"shape.{config.source.name}.")
        assert (await command("drop", config, tmp_path, "--state", "--yes")).code == 0
        assert not await state.keys("")
