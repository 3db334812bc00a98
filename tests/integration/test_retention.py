"""A stream that is full is waited for, whatever filled it; what retention removed is no error."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from bridge.config import Config
from bridge.embedded import Keeper, NatsServer, supervised, until
from bridge.embedded.process import throwaway_folder
from bridge.errors import Unavailable
from bridge.operate.status.collect import collect
from bridge.source import lsn
from tests.disk import enlarge, small_disk
from tests.oracle import agrees, is_whole
from tests.running import Process, bridge, broker_of, checkpoint, execute, messages, settled, source, toml

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id bigserial PRIMARY KEY, body text)"
PUBLISHING = [pytest.param("always", id="batch"), pytest.param("10s", id="chain")]
ROWS = "INSERT INTO t (body) SELECT repeat('x', 1000) FROM generate_series(1, {}) g"
ACCOUNT = "{{ A: {{ jetstream: {{ max_file: {} }}, users: [ {{ user: u, password: p }} ] }} }}"


async def api(config: Config, verb: str, body: dict[str, Any] | None = None) -> Any:
    async with broker_of(config) as broker:
        return await broker.api(verb, body)


async def edited(config: Config, **changes: Any) -> None:
    """The stream with other limits, as `nats stream edit` makes it."""
    made = (await api(config, f"STREAM.INFO.{config.stream.name}"))["config"]
    await api(config, f"STREAM.UPDATE.{config.stream.name}", {**made, **changes})


async def confirmed(config: Config) -> int:
    """How far the slot is confirmed."""
    [(position,)] = await execute(
        str(config.source.dsn),
        f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'",
    )
    return lsn.parse(position)


async def waited_for(
    config: Config,
    folder: Path,
    rows: int,
    words: list[str],
    make_room: Callable[[], Awaitable[Any]],
    narrow: Callable[[], Awaitable[Any]] | None = None,
) -> None:
    """A bridge whose stream fills up: it says so once with `words`, confirms nothing more, and goes on with room."""
    oracle = f"o_{config.source.name}"
    await execute(str(config.source.dsn), TABLE, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    process = Process(folder, toml(config))
    process.start("--verbose")
    try:
        await settled(config)
        if narrow is not None:
            await narrow()
        await execute(str(config.source.dsn), ROWS.format(rows))
        [(end,)] = await execute(str(config.source.dsn), "SELECT pg_current_wal_flush_lsn()")
        await process.said("publish refused", 60)
        # Each one is an attempt; a server whose disk is full may answer to none.
        with anyio.move_on_after(8):
            await process.said("in doubt", 60, times=process.text.count("in doubt") + 6)
        assert process.process is not None
        assert process.process.poll() is None
        # At most once more, where a part of what was on its way had still got in.
        assert process.text.count("publish refused") <= 2
        assert process.text.count("streaming") == 1, "one session waits"
        for word in words:
            assert word in process.text
        assert await confirmed(config) < lsn.parse(end)
        await make_room()
        await settled(config, 90)
        assert await process.end() == 0
        assert "Traceback" not in process.text
    finally:
        process.close()
    await agrees(config, oracle)


@pytest.mark.parametrize("sync", PUBLISHING)
async def test_a_stream_that_takes_no_more_waits_for_its_limit_to_be_raised(
    pg_db: str, nats: NatsServer, tmp_path: Path, sync: str
) -> None:
    config = source(pg_db, nats.url, sync=sync, stream={"max_bytes": "2MB", "discard": "new"})

    async def raised() -> None:
        found = await collect(config, list(config.stream.servers))
        assert any("the stream is full" in finding.what for finding in found.findings)
        await edited(config, max_bytes=100 << 20)

    await waited_for(config, tmp_path, 10_000, ["code=10077", "nats stream edit", "--max-bytes"], raised)


async def test_a_stream_of_so_many_messages_waits_for_its_limit_to_be_raised(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, stream={"discard": "new"})
    words = ["code=10077", "maximum messages exceeded"]
    await waited_for(
        config,
        tmp_path,
        10_000,
        words,
        lambda: edited(config, max_msgs=-1),
        lambda: edited(config, max_msgs=2000),
    )


async def test_a_row_that_is_too_large_for_the_stream_alone_waits_for_its_limit_to_be_raised(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    words = ["code=10054", "--max-msg-size=-1"]
    await waited_for(
        config,
        tmp_path,
        100,
        words,
        lambda: edited(config, max_msg_size=-1),
        lambda: edited(config, max_msg_size=900),
    )


async def test_a_server_whose_store_is_full_waits_for_other_streams_to_go(pg_db: str, tmp_path: Path) -> None:
    async with NatsServer.throwaway() as server:
        limited(server, "max_file_store: 20MB")
        await server.restart()
        config = source(pg_db, server.url)
        other = source(pg_db, server.url)
        await filled(other, 12 << 20)
        words = ["code=10023", "max_file_store"]
        await waited_for(config, tmp_path, 10_000, words, lambda: api(config, f"STREAM.DELETE.{other.stream.name}"))


async def test_an_account_that_is_full_waits_for_other_streams_to_go(pg_db: str, tmp_path: Path) -> None:
    account = {"accounts": ACCOUNT.format("20MB"), "no_auth_user": "u"}
    async with NatsServer.throwaway(settings=account) as server:
        config = source(pg_db, server.url)
        other = source(pg_db, server.url)
        await filled(other, 12 << 20)

        async def removed() -> None:
            found = await collect(config, list(config.stream.servers))
            assert any("the NATS account is full" in finding.what for finding in found.findings)
            await api(config, f"STREAM.DELETE.{other.stream.name}")

        await waited_for(config, tmp_path, 10_000, ["code=10002", "max_file"], removed)


def limited(server: NatsServer, limit: str) -> None:
    """The server's store with another limit from its next start on."""
    store = json.dumps(str(server.store_dir))
    server._settings["jetstream"] = f"{{ store_dir: {store}, sync_interval: always, {limit} }}"


async def filled(config: Config, size: int) -> None:
    """A stream of somebody else's that takes up `size` bytes."""
    name, message = config.stream.name, b"x" * (1 << 20)
    async with broker_of(config) as broker:
        await broker.api(f"STREAM.CREATE.{name}", {"name": name, "subjects": [name], "storage": "file"})
        for _ in range(size // len(message)):
            await broker.request(name, message)


@pytest.mark.parametrize("sync", PUBLISHING)
async def test_a_full_disk_is_waited_for_and_the_server_restarted(pg_db: str, tmp_path: Path, sync: str) -> None:
    # Not within `home`, which could not be removed before the disk is.
    home, store = throwaway_folder(), tmp_path / "small"
    with small_disk(store, 24):
        async with NatsServer(home, Keeper(home), store) as server:
            limited(server, "max_file_store: 10GB")
            await server.restart()
            config = source(pg_db, server.url, sync=sync)

            async def restarted() -> None:
                enlarge(store, 300)
                # nats-server does not write to the stream again before: the bridge says so.
                await server.restart()

            await waited_for(config, tmp_path, 40_000, ["its disk is full", "restart it"], restarted)


async def test_the_embedded_server_writes_again_once_its_full_disk_has_room(tmp_path: Path) -> None:
    store = tmp_path / "small"
    with small_disk(store, 24):
        limits = json.dumps(str(store))
        settings = {"jetstream": f"{{ store_dir: {limits}, sync_interval: always, max_file_store: 10GB }}"}
        async with supervised(store, settings=settings) as server:
            config = source("", server.url)
            with pytest.raises((Unavailable, AssertionError)):
                await stored(config, 40)
            enlarge(store, 300)

            async def writes() -> bool:
                try:
                    await stored(config, 1)
                except (Unavailable, AssertionError):
                    return False
                return True

            await until(writes, 60, "the stream takes messages again")
            assert server.restarts == 1


async def stored(config: Config, count: int) -> None:
    """Messages of a megabyte in a stream of the configuration's name."""
    name = config.stream.name
    async with broker_of(config) as broker:
        if await broker.stream(name) is None:
            await broker.api(f"STREAM.CREATE.{name}", {"name": name, "subjects": [name], "storage": "file"})
        for _ in range(count):
            answer = json.loads((await broker.request(name, b"x" * (1 << 20))).data)
            assert "error" not in answer, answer


async def test_what_retention_removed_from_the_start_is_no_error(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, stream={"max_bytes": "1MB", "discard": "old"})
    await execute(pg_db, TABLE)
    for _ in range(3):
        async with bridge(config):
            await execute(pg_db, ROWS.format(1000))
            await settled(config)
    found = await messages(config)
    is_whole(found)
    assert found[0][0].seq > 1000
    kept = await checkpoint(config)
    assert kept is not None
    assert kept.stream_seq == found[-1][0].seq
    shown = await collect(config, list(config.stream.servers))
    assert shown.stream is not None
    assert shown.stream.first_seq == found[0][0].seq
    assert "not for public.t: the stream" in shown.rebuild or shown.rebuild.startswith("not possible: ")


async def test_a_stream_whose_last_message_has_expired_goes_on(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, stream={"max_age": "1s"})
    await execute(pg_db, TABLE, ROWS.format(10))
    async with bridge(config):
        await settled(config)
        await until(lambda: empty(config), 30, "everything has expired")
    await execute(pg_db, ROWS.format(10))
    async with bridge(config):
        await settled(config)
    last = (await api(config, f"STREAM.INFO.{config.stream.name}"))["state"]["last_seq"]
    async with broker_of(config) as broker:
        state = await broker.stream(config.stream.name)
    assert state is not None
    # 10 rows and the markers, a mark, 10 rows, a mark: each once, though nothing is left to compare with.
    assert last == 10 + 2 + 1 + 10 + 1


async def empty(config: Config) -> bool:
    """Whether the stream has no message."""
    return bool((await api(config, f"STREAM.INFO.{config.stream.name}"))["state"]["messages"] == 0)
