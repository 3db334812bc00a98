"""Starts on servers that were copied, promoted, set back or damaged, and gaps that are healed by reading again."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import anyio
import msgspec
import pytest
from nats.aio.msg import Msg

from bridge.config import Config, Secret
from bridge.embedded import NatsServer, Postgres, until
from bridge.errors import BridgeError, EventLost, Gap, OtherStream, Rewound, SlotMissing
from bridge.stream.publisher import Publisher
from tests import powercut, replicas
from tests.databases import database
from tests.oracle import Replay, agrees
from tests.running import (
    Process,
    bridge,
    broker_of,
    checkpoint,
    execute,
    failure,
    messages,
    settled,
    source,
    streaming,
    toml,
    writers,
)

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"


@pytest.fixture
async def written(own_pg: Postgres, nats: NatsServer) -> Config:
    """A source on a server of its own whose bridge has run and stopped."""
    config = source(own_pg.dsn(), nats.url)
    await execute(own_pg.dsn(), TABLE, "INSERT INTO t VALUES (1, 'a')")
    await more(config, 2)
    return config


async def more(config: Config, key: int) -> None:
    """One more row, by a bridge that runs only for it."""
    async with bridge(config):
        await streaming(config)
        await execute(str(config.source.dsn), f"INSERT INTO t VALUES ({key}, 'more')")
        await settled(config)


def at(config: Config, server: Postgres, **changes: Any) -> Config:
    """The same source behind another server."""
    dsn = Secret(server.dsn())
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, dsn=dsn, **changes))


def healing(config: Config) -> Config:
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, on_gap="resnapshot"))


async def stops(config: Config, kind: type[BridgeError], *words: str) -> None:
    error = await failure(config)
    assert type(error) is kind, repr(error)
    assert error.exit_code == 3
    for word in words:
        assert word in str(error)


async def api(config: Config, verb: str, body: dict[str, Any] | None = None) -> Any:
    async with broker_of(config) as broker:
        return await broker.api(verb, body)


async def test_a_promoted_replica_that_has_the_slot_goes_on(written: Config, own_pg: Postgres) -> None:
    await own_pg.stop()
    async with replicas.cold_copy(own_pg) as replica:
        await own_pg.start()
        await replicas.start(replica, follow=own_pg)
        await more(written, 3)
        await replicas.caught_up(replica, own_pg)
        await own_pg.stop()
        await replicas.promote(replica)
        moved = at(written, replica)
        async with bridge(moved):
            await streaming(moved)
            await execute(replica.dsn(), "INSERT INTO t VALUES (4, 'd')", "UPDATE t SET body = 'e' WHERE id = 3")
            await settled(moved)
        found = await agrees(moved)
        assert [e.op for _, e in found if e.table == "t"].count("insert") == 3
        assert {message.position[:8] for message, _ in found} == {"00000001", "00000002"}
        await more(moved, 5)  # the checkpoint is of the new timeline now
        await agrees(moved)


async def test_a_replica_that_branched_off_before_the_streams_end_is_refused(written: Config, own_pg: Postgres) -> None:
    await own_pg.stop()
    async with replicas.cold_copy(own_pg) as replica:
        await own_pg.start()
        await replicas.start(replica, follow=own_pg)
        await replicas.caught_up(replica, own_pg)
        await replicas.promote(replica)
        await more(written, 3)  # which the replica does not have
        await stops(at(written, replica), Rewound, "timeline 2", "on_gap")


async def test_a_promoted_replica_without_the_slot_is_refused(written: Config, own_pg: Postgres) -> None:
    async with replicas.base_backup(own_pg) as replica:
        await replicas.start(replica, follow=own_pg)
        await more(written, 3)
        await replicas.caught_up(replica, own_pg)
        await replicas.promote(replica)
        await stops(at(written, replica), SlotMissing, written.source.slot)
        healed = healing(at(written, replica))
        await more(healed, 4)
        await agrees(healed)


async def test_a_database_set_back_to_a_backup_is_refused_and_can_be_read_again(
    written: Config, own_pg: Postgres
) -> None:
    await own_pg.stop()
    async with replicas.cold_copy(own_pg) as backup:
        await own_pg.start()
        await execute(own_pg.dsn(), "CREATE TABLE filler AS SELECT repeat('x', 500) FROM generate_series(1, 9000)")
        await more(written, 3)
        await own_pg.stop()
        await replicas.start(backup)
        await stops(at(written, backup), Rewound, "goes on to")
        healed = healing(at(written, backup))
        await more(healed, 4)
        replay = Replay()
        for message, event in await messages(healed):
            replay.apply(message, event)
        rows = replay.tables["public", "t"].rows
        assert sorted(int(row["id"]) for row in rows) == [1, 2, 4]


async def test_a_slot_made_again_is_noticed_though_nothing_happened_in_between(written: Config) -> None:
    name = written.source.slot
    await execute(
        str(written.source.dsn),
        f"SELECT pg_drop_replication_slot('{name}')",
        f"SELECT pg_create_logical_replication_slot('{name}', 'wal2json')",
    )
    await stops(written, Gap, name)


async def _drop_slot(config: Config) -> None:
    await execute(str(config.source.dsn), f"SELECT pg_drop_replication_slot('{config.source.slot}')")


async def _advance_slot(config: Config) -> None:
    await execute(
        str(config.source.dsn), f"SELECT pg_replication_slot_advance('{config.source.slot}', pg_current_wal_lsn())"
    )


async def _delete_stream(config: Config) -> None:
    await api(config, f"STREAM.DELETE.{config.stream.name}")


async def _lose_slot(config: Config) -> None:
    dsn = str(config.source.dsn)
    await execute(dsn, "ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'", "SELECT pg_reload_conf()")
    for _ in range(4):
        await execute(dsn, "CREATE TABLE IF NOT EXISTS filler (a int)", "INSERT INTO filler VALUES (1)")
        await execute(dsn, "SELECT pg_switch_wal()")
    await execute(dsn, "CHECKPOINT")
    found = await execute(dsn, f"SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'")
    assert found == [("lost",)]


@pytest.mark.parametrize("harm", [_drop_slot, _advance_slot, _delete_stream, _lose_slot])
async def test_a_gap_is_healed_by_reading_everything_again_where_that_is_wanted(
    written: Config, harm: Callable[[Config], Awaitable[None]]
) -> None:
    dsn = str(written.source.dsn)
    # What happens in the gap: an event for none of it may ever come.
    await execute(dsn, "DELETE FROM t WHERE id = 1", "INSERT INTO t VALUES (7, 'in the gap')")
    await harm(written)
    async with bridge(healing(written)):
        await settled(written)
        await execute(dsn, "UPDATE t SET body = 'after' WHERE id = 7")
        await settled(written)
    found = await agrees(written)
    again = [m.epoch for m, e in found if e.table == "t" and e.phase == "begin"]
    assert again == ([2] if harm is _delete_stream else [1, 2])
    assert [w.epoch for w in await writers(written)][-1] == 2
    await more(written, 8)  # a plain start goes on from there
    await agrees(written)


async def test_a_stream_deleted_under_a_running_bridge_is_healed_too(written: Config) -> None:
    async with bridge(healing(written)):
        await streaming(written)
        await _delete_stream(written)
        await execute(str(written.source.dsn), "INSERT INTO t VALUES (7, 'g')")

        async def there() -> bool:
            async with broker_of(written) as broker:
                found = await broker.stream(written.stream.name)
                return found is not None and found.last_seq > 0

        await until(there, 30, "the stream is there again")
        await settled(written)
    await agrees(written)


async def test_a_heal_that_was_interrupted_is_taken_up_again(written: Config, tmp_path: Path) -> None:
    dsn = str(written.source.dsn)
    await execute(dsn, "INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series(100, 20000) g")
    await _drop_slot(written)
    process = Process(tmp_path, toml(healing(written)))
    process.start()
    try:
        await process.said("healing a gap")
        await process.said("slot created")
        await process.end(signal.SIGKILL)
        process.start()
        await settled(written, 60)
        assert await process.end() == 0
    finally:
        process.close()
    await agrees(written)


async def test_another_database_is_never_healed(written: Config) -> None:
    async with Postgres.throwaway(fsync=False) as other:
        await execute(other.dsn(), TABLE)
        error = await failure(healing(at(written, other)))
        assert type(error).__name__ == "OtherDatabase"
        rows = await execute(other.dsn(), "SELECT count(*) FROM pg_replication_slots")
        assert rows == [(0,)]


@pytest.mark.parametrize("on_gap", ["stop", "resnapshot"])
async def test_a_slot_of_another_databases_bridge_is_left_alone(
    pg: Postgres, pg_db: str, nats: NatsServer, on_gap: Literal["stop", "resnapshot"]
) -> None:
    await execute(pg_db, TABLE, "INSERT INTO t VALUES (1, 'first')")
    config = source(pg_db, nats.url)
    async with database(pg) as other:
        await execute(other, TABLE)
        mine = source(other, nats.url)
        mine = msgspec.structs.replace(
            mine, source=msgspec.structs.replace(mine.source, slot=config.source.slot, on_gap=on_gap)
        )
        async with bridge(config):
            await settled(config)
            assert type(await failure(mine)).__name__ == "OtherDatabase"
            await execute(pg_db, "INSERT INTO t VALUES (2, 'second')")
            await settled(config)
        # Also where nobody reads from it.
        assert type(await failure(mine)).__name__ == "OtherDatabase"
        async with bridge(config):
            await settled(config)
    await agrees(config)
    assert len(await writers(config)) == 2, "the first one was never interrupted"


async def test_a_block_that_is_damaged_in_the_middle_is_found(pg_db: str, own_nats: NatsServer, tmp_path: Path) -> None:
    config, store = source(pg_db, own_nats.url), own_nats.store_dir
    await execute(pg_db, TABLE, "INSERT INTO t SELECT g, repeat('x', 1500) FROM generate_series(1, 15000) g")
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await settled(config, 60)
        await own_nats.kill()
        assert len({record.block for record in powercut.records(store, config.stream.name)}) > 2
        powercut.damage(store, config.stream.name, 2000)
        await own_nats.start()
        # The bridge that was running finds it when it comes back, and so does every later one.
        assert await process.wait(60) == 3
        assert process.text.count("are missing") == 1
        process.start()
        assert await process.wait(60) == 3
        assert process.text.count("are missing") == 2
        assert "Traceback" not in process.text
    finally:
        process.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_age": 3600 * 10**9}, "--max-age=0s"),
        ({"max_bytes": 10**9}, "--max-bytes=-1"),
        ({"discard": "new"}, "--discard=old"),
        ({"max_msgs": 10**6}, "--max-msgs=-1"),
        ({"duplicate_window": 10**9}, "--dupe-window="),
        ({"deny_delete": True}, "deny_delete"),
    ],
)
async def test_a_stream_that_was_edited_harmlessly_is_said_once_and_used(
    pg_db: str, nats: NatsServer, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    await more(config, 1)
    made = (await api(config, f"STREAM.INFO.{config.stream.name}"))["config"]
    await api(config, f"STREAM.UPDATE.{config.stream.name}", made | change)
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await settled(config)
        assert await process.end() == 0
    finally:
        process.close()
    assert process.text.count("stream configuration differs") == 1
    assert field in process.text
    await agrees(config)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sealed": True}, "sealed"),
        ({"max_msgs_per_subject": 5}, "--max-msgs-per-subject=-1"),
        ({"no_ack": True, "allow_atomic": False}, "allow"),
        ({"subjects": ["other.>"]}, "other.>"),
        ({"allow_atomic": False}, "--allow-batch"),
        ({"subject_transform": {"src": ">", "dest": "x.>"}}, "subject_transform"),
    ],
)
async def test_a_stream_that_was_edited_so_that_it_keeps_no_log_is_refused(
    pg_db: str, nats: NatsServer, change: dict[str, Any], word: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    await more(config, 1)
    made = (await api(config, f"STREAM.INFO.{config.stream.name}"))["config"]
    await api(config, f"STREAM.UPDATE.{config.stream.name}", made | change)
    await stops(config, OtherStream, word)


async def test_a_stream_that_works_like_a_queue_is_refused(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    made = {"name": config.stream.name, "subjects": [f"cdc.{config.source.name}.>"], "retention": "workqueue"}
    await api(config, f"STREAM.CREATE.{config.stream.name}", {**made, "allow_atomic": True, "storage": "file"})
    await stops(config, OtherStream, "retention is workqueue")
    slots = await execute(pg_db, f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'")
    assert slots == []


async def test_an_event_whose_place_was_taken_stops_every_start_until_the_log_is_made_anew(
    written: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, answered, taken = Publisher._write, Publisher._answered, anyio.Event()

    def displacing(self: Publisher, batch: Any) -> None:
        # As where others' messages arrive first: the batch is refused, what follows finds the sequence it expects.
        if len(batch.items) == 2 and not taken.is_set():
            self._broker.write(b"PUB %b 1\r\nx\r\n" % batch.items[0].subject * 2)
            taken.set()
        write(self, batch)

    async def late(self: Publisher, message: Msg) -> None:
        """Tells of the refusal when the next batch is in the stream."""

        async def followed() -> bool:
            found = await self._broker.stream(self._stream)
            return found is not None and found.last_seq == self.acked.seq + 4

        if b"error" in message.data:
            await until(followed, 10, "the next batch is in the stream")
        await answered(self, message)

    async def load() -> None:
        await streaming(written)
        await execute(str(written.source.dsn), "INSERT INTO t VALUES (10, 'x'), (11, 'y')")
        await taken.wait()
        await execute(str(written.source.dsn), "INSERT INTO t VALUES (20, 'x'), (21, 'y')")

    monkeypatch.setattr(Publisher, "_write", displacing)
    monkeypatch.setattr(Publisher, "_answered", late)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load)
        error = await failure(written)
    assert isinstance(error, EventLost), repr(error)
    assert "instead of the event at" in str(error)
    monkeypatch.undo()
    await stops(written, EventLost, "instead of the event at", "bridge drop")
    healed = healing(written)
    async with bridge(healed):
        await settled(healed)
    await stops_no_more(healed)


async def stops_no_more(config: Config) -> None:
    """What the last start has healed is not asked for again."""
    kept = await checkpoint(config)
    assert kept is not None
    assert not kept.lost
    await more(config, 30)
