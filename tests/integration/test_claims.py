"""Rows larger than the largest message: by claim check through an object store, and from there to every reader."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from bridge import drop, event
from bridge.config import Config
from bridge.embedded import NatsServer, until
from bridge.errors import ObjectMissing, Overtaken, TooLarge, Unavailable
from bridge.stream import claims, objects
from bridge.stream.claims import Claims, bucket_of, resolve, whole
from bridge.stream.reader import read
from bridge.stream.server import Broker
from bridge.stream.subjects import source_subjects
from tests import compacted
from tests.oracle import agrees
from tests.running import bridge, broker_of, execute, failure, messages, settled, source

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"
SMALL = "512KB"
LARGE = 1_500_000


@pytest.fixture
async def small() -> AsyncIterator[NatsServer]:
    async with NatsServer.throwaway(settings={"max_payload": SMALL}) as server:
        yield server


def large(letter: str, size: int = LARGE) -> str:
    """A text that PostgreSQL makes and that does not compress into nothing, for SQL."""
    return f"repeat('{letter}', {size})"


async def names(broker: Broker, config: Config) -> list[str]:
    """The objects that are there, oldest first."""
    return [name async for name, _ in objects.oldest(broker, bucket_of(config.stream.name))]


async def raw(config: Config) -> list[Any]:
    """The stream's messages as they are stored."""
    async with broker_of(config) as broker:
        wanted = [source_subjects(config.stream.prefix, config.source.name)]
        return [m async for batch in read(broker, config.stream.name, subjects=wanted) for m in batch]


async def lose(broker: Broker, config: Config, name: str) -> None:
    """What a power failure that took the object back has left."""
    info = await objects.find(broker, bucket_of(config.stream.name), name)
    assert info is not None
    for subject in (objects.chunk_subject(info.bucket, info.nuid), objects.description_subject(info.bucket, name)):
        await objects.purge(broker, info.bucket, subject)


async def test_large_rows_of_snapshot_and_stream_go_by_claim_check_and_come_back_whole(
    pg_db: str, small: NatsServer
) -> None:
    config = source(pg_db, small.url, workers=2)
    full = "CREATE TABLE f (id int, body text, other text)"
    await execute(pg_db, TABLE, full, "ALTER TABLE f REPLICA IDENTITY FULL")
    await execute(pg_db, f"INSERT INTO t SELECT n, {large('r')} FROM generate_series(1, 3) n")
    await execute(pg_db, f"INSERT INTO f SELECT n, {large('s')}, 'x' FROM generate_series(1, 3) n")
    await execute(pg_db, "INSERT INTO t SELECT n, 'small' FROM generate_series(10, 500) n")
    async with bridge(config):
        await settled(config)
        await execute(
            pg_db,
            f"INSERT INTO t VALUES (4, {large('i')})",
            "INSERT INTO t VALUES (5, 'between')",
            f"UPDATE t SET body = {large('u')} WHERE id = 5",
            "UPDATE t SET id = 6 WHERE id = 4",  # its body stays where it is: not sent, unchanged
            "UPDATE f SET other = 'y' WHERE id = 2",  # the old row and the new one
            "DELETE FROM f WHERE id = 3",
            "DELETE FROM t WHERE id = 1",
        )
        await settled(config)
    await agrees(config)
    stored = await raw(config)
    short = [json.loads(m.data) for m in stored if b'"ref":' in m.data]
    assert [one["op"] for one in short] == ["read"] * 6 + ["insert", "update", "update", "delete"]
    assert all("after" not in one and "before" not in one for one in short)
    assert short[6]["key"] == {"id": 4}
    assert short[6].keys() == {
        "op",
        "source",
        "schema",
        "table",
        "key",
        "ref",
        "lsn",
        "commit_lsn",
        "txid",
        "committed_at",
    }
    whole_ones = {m.seq: m for m, _ in await messages(config)}
    for message in stored:
        ref = json.loads(message.data).get("ref")
        if ref:
            assert (ref["bucket"], ref["name"]) == (bucket_of(config.stream.name), message.position)
            assert ref["size"] == len(whole_ones[message.seq].data) > LARGE


async def test_the_nats_cli_lists_and_gets_large_rows(
    pg_db: str, small: NatsServer, natscli: Path, tmp_path: Path
) -> None:
    config = source(pg_db, small.url)
    await execute(pg_db, TABLE, f"INSERT INTO t VALUES (1, {large('x')})")
    async with bridge(config):
        await settled(config)
    bucket, file = bucket_of(config.stream.name), tmp_path / "object"
    async with broker_of(config) as broker:
        [name] = await names(broker, config)

    async def ask(*arguments: str) -> str:
        with anyio.fail_after(30):
            answer = await anyio.run_process([str(natscli), "--server", small.url, "object", *arguments])
        return answer.stdout.decode()

    assert name in await ask("ls", bucket)
    await ask("get", bucket, name, "--output", str(file), "--no-progress", "--force")
    found = json.loads(file.read_bytes())
    assert (found["op"], found["after"]) == ("read", {"id": 1, "body": "x" * LARGE})
    assert "SHA-256" in (await ask("info", bucket, name)).replace("SHA256", "SHA-256")


async def test_a_killed_put_is_done_again_and_leaves_nothing_behind(
    pg_db: str, small: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, small.url)
    await execute(pg_db, TABLE)
    store = objects._store
    failed: list[str] = []

    async def dies(broker: Broker, subject: str, data: bytes, headers: Any = None) -> int:
        if ".M." in subject and not failed:
            failed.append(subject)
            raise RuntimeError("killed")
        return await store(broker, subject, data, headers)

    async with bridge(config):
        await settled(config)
    monkeypatch.setattr(objects, "_store", dies)
    await execute(pg_db, f"INSERT INTO t VALUES (1, {large('x')})")
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="killed")):
        async with bridge(config):
            await anyio.sleep(30)
    async with broker_of(config) as broker:
        assert await names(broker, config) == []
        left = await objects.counted(broker, bucket_of(config.stream.name), "$O.*.C.>")
        assert len(left) == 1
        async with bridge(config):
            await settled(config)
        found = await objects.counted(broker, bucket_of(config.stream.name), "$O.*.C.>")
        assert len(found) == 1
        assert found.keys() != left.keys()
    await agrees(config)


async def test_an_object_that_is_there_is_not_stored_twice_and_a_damaged_one_is_replaced(
    pg_db: str, small: NatsServer
) -> None:
    config = source(pg_db, small.url)
    payload = (
        b'{"op":"insert","source":"s","schema":"public","table":"t","key":{"id":1},"after":{"id":1,"body":"%s"}'
        % (b"x" * LARGE)
        + b',"lsn":"0/1","commit_lsn":"0/2","txid":7,"committed_at":null}'
    )
    async with broker_of(config) as broker:
        writer = Claims(broker, config.stream.name, 1)
        short = await writer.put(b"s.t", "p", payload)
        bucket = bucket_of(config.stream.name)
        first = await objects.find(broker, bucket, "p")
        assert await writer.put(b"s.t", "p", payload) == short
        assert await objects.find(broker, bucket, "p") == first
        assert first is not None
        chunk = await broker.message(objects.stream_of(bucket), last_by_subj=objects.chunk_subject(bucket, first.nuid))
        assert chunk is not None
        await broker.api(f"STREAM.MSG.DELETE.{objects.stream_of(bucket)}", {"seq": chunk.seq})
        ref = event.ref_of(short)
        assert ref is not None
        with pytest.raises(ObjectMissing, match="damaged"):
            await resolve(broker, ref, seq=1)
        assert await writer.put(b"s.t", "p", payload) == short
        assert await resolve(broker, ref, seq=1) == payload
        mended = await objects.find(broker, bucket, "p")
        assert mended is not None
        chunks = objects.chunk_subject(bucket, mended.nuid)
        await objects.purge(broker, bucket, chunks)
        for start in range(0, len(payload), 100_000):
            await objects._store(broker, chunks, payload[start : start + 100_000].replace(b"x", b"y"))
        with pytest.raises(ObjectMissing, match="damaged"):
            await resolve(broker, ref, seq=1)
        assert len(await objects.counted(broker, bucket, "$O.*.C.>")) == 1


async def test_what_a_stalled_writer_stores_late_does_not_replace_the_newer_object(
    pg_db: str, small: NatsServer
) -> None:
    config = source(pg_db, small.url)
    bucket = bucket_of(config.stream.name)
    async with broker_of(config) as broker:
        await objects.ensure(broker, bucket, 1, "")
        digest = await objects.digest_of(b"new")
        newer = await objects.put(broker, objects.Info("p", bucket, "p.new", digest=digest), b"new")
        with pytest.raises(Unavailable, match="wrong last sequence"):
            await objects.put(broker, objects.Info("p", bucket, "p.old", digest="old"), b"old")
        assert await objects.find(broker, bucket, "p") == newer


async def test_a_change_that_recovery_skips_puts_its_missing_object_again(pg_db: str, small: NatsServer) -> None:
    # PostgreSQL is told a minute later only: after a restart it sends everything again.
    config = source(pg_db, small.url, sync="1m")
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, f"INSERT INTO t VALUES (1, {large('x')})", f"INSERT INTO t VALUES (2, {large('y')})")
        await settled(config)
    await agrees(config)
    async with broker_of(config) as broker:
        first, second = await names(broker, config)
        kept = await objects.find(broker, bucket_of(config.stream.name), second)
        await lose(broker, config, first)
        with pytest.raises(ObjectMissing, match="gone"):
            await messages(config)
        async with bridge(config):
            await settled(config)
        assert set(await names(broker, config)) == {first, second}
        assert await objects.find(broker, bucket_of(config.stream.name), second) == kept
    await agrees(config)


async def test_objects_go_once_their_events_have_left_the_stream(pg_db: str, small: NatsServer) -> None:
    config = source(pg_db, small.url)
    await execute(pg_db, TABLE, f"INSERT INTO t VALUES (1, {large('x')})")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, f"INSERT INTO t VALUES (2, {large('y')})", f"INSERT INTO t VALUES (3, {large('z')})")
        await settled(config)
    stored = [m for m in await raw(config) if b'"ref":' in m.data]
    assert len(stored) == 3
    async with broker_of(config) as broker:
        writer = Claims(broker, config.stream.name, 1)
        stream, acked = config.stream.name, stored[-1].position
        assert await writer.collect(await writer.floor(acked)) == 0
        await broker.api(f"STREAM.PURGE.{stream}", {"seq": stored[1].seq})
        assert await writer.collect(await writer.floor(acked)) == 1
        assert await names(broker, config) == [m.position for m in stored[1:]]
        await broker.api(f"STREAM.PURGE.{stream}")
        # An event that is not acked yet has its object already, and the stream shows nothing of it.
        assert await writer.collect(await writer.floor(stored[1].position)) == 1
        assert await names(broker, config) == [stored[2].position]
        assert await writer.collect(await writer.floor("")) == 0
        assert await writer.collect(await writer.floor(acked)) == 1
        state = await broker.stream(objects.stream_of(bucket_of(stream)))
        assert state is not None
        assert state.messages == 0


async def test_a_running_bridge_collects_what_retention_has_removed(
    pg_db: str, small: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EVERY", 0.2)
    config = source(pg_db, small.url)
    await execute(pg_db, TABLE)
    async with bridge(config), broker_of(config) as broker:
        await settled(config)
        await execute(pg_db, f"INSERT INTO t VALUES (1, {large('x')})", f"INSERT INTO t VALUES (2, {large('y')})")
        await settled(config)
        stored = [m for m in await raw(config) if b'"ref":' in m.data]
        await broker.api(f"STREAM.PURGE.{config.stream.name}", {"seq": stored[1].seq})

        async def one_left() -> bool:
            return await names(broker, config) == [stored[1].position]

        await until(one_left, 20, "the object of the removed event is gone")
        await anyio.sleep(1)
        assert await one_left()
    async with broker_of(config) as broker:
        [message] = [m for m in await raw(config) if b'"ref":' in m.data]
        [[found]] = [part async for part in whole(broker, config.stream.name, [message])]
        assert found.data.endswith(b"}")
        with pytest.raises(Overtaken, match="retention"):
            [part async for part in whole(broker, config.stream.name, [stored[0]])]


async def test_a_compacted_stream_keeps_the_objects_of_its_last_messages(pg_db: str, small: NatsServer) -> None:
    config = source(pg_db, small.url)
    stream = config.stream.name
    positions = [f"{number:08x}-00000000" for number in range(5)]
    payload = (
        b'{"op":"insert","source":"s","schema":"public","table":"t","key":{"id":1},"after":{"body":"%s"}'
        % (b"x" * LARGE)
        + b',"lsn":"0/1","commit_lsn":"0/2","txid":7,"committed_at":null}'
    )
    async with broker_of(config) as broker:
        wanted = {"name": stream, "subjects": ["s.>"], "max_msgs_per_subject": 1, "allow_msg_ttl": True}
        await broker.api(f"STREAM.CREATE.{stream}", wanted)
        keys = dict(zip(positions, (b"a", b"b", b"a", b"a", b"c"), strict=True))
        writer = Claims(broker, stream, 1, lambda subject, position, _: subject + b"." + keys[position])
        for position in positions:
            short = await writer.put(b"s.t", position, payload)
            # The last two are not published yet; the key of the second was changed.
            if position < positions[3]:
                at = position[:-1] + "1" if position == positions[1] else position
                await broker.request(f"s.t.{keys[position].decode()}", short, headers={"Bridge-Position": at})
        doomed = await writer.compacted(positions[2], set())
        assert doomed == {positions[0]}
        assert await names(broker, config) == positions
        assert await writer.compacted(positions[2], doomed) == set()
        assert await names(broker, config) == positions[1:]
        [stale] = [m async for batch in read(broker, stream, subjects=["s.>"], last=2) for m in batch]
        stale.seq = 1  # which a later message of its key has taken the place of
        await broker.api(f"STREAM.PURGE.{objects.stream_of(bucket_of(stream))}", {})
        assert [part async for part in whole(broker, stream, [stale])] == []


async def test_chunks_that_a_killed_bridge_left_go_at_the_next_start(pg_db: str, small: NatsServer) -> None:
    config = source(pg_db, small.url)
    await execute(pg_db, TABLE, f"INSERT INTO t VALUES (1, {large('x')})")
    async with bridge(config):
        await settled(config)
    bucket = bucket_of(config.stream.name)
    async with broker_of(config) as broker:
        await objects._store(broker, objects.chunk_subject(bucket, "0-left.behind"), b"x")
        async with bridge(config):
            await settled(config)

            async def gone() -> bool:
                return len(await objects.counted(broker, bucket, "$O.*.C.>")) == 1

            await until(gone, 20, "the chunk is gone")
        assert len(await names(broker, config)) == 1


async def test_a_row_whose_key_alone_is_too_large_stops_and_goes_on_once_the_broker_takes_it(pg_db: str) -> None:
    async with NatsServer.throwaway(settings={"max_payload": "2KB"}) as tiny:
        config = source(pg_db, tiny.url)
        await execute(pg_db, "CREATE TABLE t (id text PRIMARY KEY, body text)")
        async with bridge(config):
            await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES ('a', 'small')", "INSERT INTO t VALUES (repeat('k', 1500), 'x')")
        error = await failure(config)
        assert isinstance(error, TooLarge)
        assert ".public.t" in str(error)
        assert "kkk" not in str(error)
        tiny._settings["max_payload"] = "1MB"
        await tiny.restart()
        async with bridge(config):
            await settled(config)
        await agrees(config)


async def test_dropping_the_stream_drops_its_large_rows(pg_db: str, small: NatsServer) -> None:
    config = source(pg_db, small.url)
    await execute(pg_db, TABLE, f"INSERT INTO t VALUES (1, {large('x')})")
    async with bridge(config):
        await settled(config)
    await drop.stream_of(config, [small.url])
    async with broker_of(config) as broker:
        assert await broker.stream(objects.stream_of(bucket_of(config.stream.name))) is None


async def test_a_compacted_log_keeps_the_objects_of_the_rows_that_are_there(
    pg_db: str, small: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EVERY", 0.3)
    monkeypatch.setattr(claims, "COMPACT_EVERY", 0.3)
    config = source(pg_db, small.url, stream={"mode": "compact", "tombstone_ttl": "7d"})
    await execute(pg_db, TABLE, "ALTER TABLE t REPLICA IDENTITY FULL")
    await execute(pg_db, f"INSERT INTO t SELECT n, {large('r')} FROM generate_series(1, 5) n")
    async with bridge(config), broker_of(config) as broker:
        await settled(config)
        await execute(
            pg_db,
            f"UPDATE t SET body = {large('u')} WHERE id = 1",  # a new object takes the old one's place
            "UPDATE t SET body = 'small' WHERE id = 2",  # still large: the identity is FULL, so it has the old row
            "UPDATE t SET body = 'smaller' WHERE id = 2",
            "UPDATE t SET id = 30 WHERE id = 3",
            "DELETE FROM t WHERE id = 4",
        )
        await settled(config)
        referring = {m.subject.rpartition(".")[2]: m for m in await raw(config) if b'"ref":' in m.data}
        assert set(referring) == {"1", "30", "4", "5"}
        wanted = {json.loads(m.data)["ref"]["name"] for m in referring.values()}

        async def collected() -> bool:
            return set(await names(broker, config)) == wanted

        await until(collected, 30, "only what is referred to is kept")
        await anyio.sleep(1)
        assert await collected()
    await compacted.agrees(config)
