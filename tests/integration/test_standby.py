"""Two bridges with one configuration: one works, the other stands by and takes over, and nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from bridge.config import Config, Secret
from bridge.config import State as StateConfig
from bridge.embedded import NatsServer, Postgres, free_port, until
from bridge.errors import OtherDatabase
from bridge.operate.status.collect import collect
from bridge.operate.status.parts import Status
from bridge.pipeline import standing
from bridge.stream import lease
from bridge.stream.lease import Lease, lease_key, take
from bridge.stream.state import State
from tests.databases import database
from tests.oracle import agrees
from tests.proxy import Proxy
from tests.running import (
    Process,
    bridge,
    broker_of,
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

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, body text)"
MARK = "CREATE TABLE mark (id text PRIMARY KEY)"
TAKEOVER = 25.0  # of which 15 are promised; the rest is for a machine that has other things to do


class Pair:
    """A first bridge that works and a second that stands by."""

    def __init__(self, folder: Path, config: Config, first: Config | None = None) -> None:
        (folder / "first").mkdir()
        (folder / "second").mkdir()
        self.config = config
        self.first = Process(folder / "first", toml(first or config))
        self.second = Process(folder / "second", toml(config))

    async def start(self) -> None:
        self.first.start()
        await self.first.said("streaming")
        await streaming(self.config)
        self.second.start()
        await self.second.said("standing by")

    async def taken_over(self, seconds: float) -> None:
        await self.second.said("[info     ] streaming", seconds)

    def signal(self, number: int) -> None:
        assert self.first.process is not None
        self.first.process.send_signal(number)

    def close(self) -> None:
        for process in (self.first, self.second):
            if process.process is not None:
                process.process.send_signal(signal.SIGCONT)
            process.close()


@asynccontextmanager
async def pair(folder: Path, config: Config, first: Config | None = None) -> AsyncIterator[Pair]:
    both = Pair(folder, config, first)
    try:
        await both.start()
        yield both
    finally:
        both.close()


@asynccontextmanager
async def written_to(dsn: str) -> AsyncIterator[None]:
    """Transactions of 100 rows, some of them changed again, while the block lasts."""
    ended = anyio.Event()

    async def write() -> None:
        number = 0
        while not ended.is_set():
            await execute(
                dsn,
                f"INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series({number}, {number + 99}) g",
                f"UPDATE t SET body = 'changed' WHERE id BETWEEN {number} AND {number + 9}",
            )
            number += 100
            await anyio.sleep(0.03)  # a pace that the oracle can follow

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        try:
            yield
        finally:
            ended.set()


async def prepared(dsn: str, config: Config) -> str:
    """Tables, and the name of an independent slot that the oracle reads."""
    oracle = f"o_{config.source.name}"
    await execute(dsn, TABLE, MARK, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    return oracle


async def held_by(config: Config) -> Lease | None:
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        found = await state.get(lease_key("bridge", config.source.name), Lease)
        return found[0] if found else None


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_standby_takes_over_at_once_from_a_bridge_that_ends(
    pg_db: str, nats: NatsServer, tmp_path: Path, how: str
) -> None:
    config = source(pg_db, nats.url)
    oracle = await prepared(pg_db, config)
    async with pair(tmp_path, config) as both:
        async with written_to(pg_db):
            began = time.monotonic()
            if how == "stopped":
                assert await both.first.end() == 0
            else:
                await both.first.end(signal.SIGKILL)
            await both.taken_over(TAKEOVER)
            # Far below the ten seconds after which a silent holder counts as gone.
            assert time.monotonic() - began < lease.STALE - 2
        await settled(config, 60)
        assert await both.second.end() == 0
    await agrees(config, oracle)
    assert [w.epoch for w in await writers(config)] == [1, 2]


async def test_a_paused_bridge_is_replaced_and_says_so_when_it_wakes(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    oracle = await prepared(pg_db, config)
    async with pair(tmp_path, config) as both:
        async with written_to(pg_db):
            await anyio.sleep(1)  # somewhere in the middle of its work
            both.signal(signal.SIGSTOP)
            await both.taken_over(TAKEOVER)
            both.signal(signal.SIGCONT)
            assert await both.first.wait() == 3
        assert "replaced" in both.first.text or "has taken" in both.first.text, both.first.text
        assert "only one" in both.first.text or "stand by" in both.first.text
        assert "Traceback" not in both.first.text
        await settled(config, 60)
        assert "predecessor" in both.second.text
        # Once, and once more where what the zombie still had on its way came in behind the successor's beginning.
        again = both.second.text.count("reading its end again")
        assert both.second.text.count("[info     ] streaming") == 1 + again <= 2, both.second.text
        assert await both.second.end() == 0
    await agrees(config, oracle)


async def test_what_a_dead_host_leaves_open_at_postgresql_is_ended(
    pg: Postgres, pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy], tmp_path: Path
) -> None:
    database, broker = proxied(pg.port), proxied(nats.port)
    config = source(pg_db, nats.url)
    far = source(pg_db.replace(f":{pg.port}/", f":{database.port}/"), f"nats://127.0.0.1:{broker.port}")
    far = msgspec.structs.replace(
        config,
        source=msgspec.structs.replace(config.source, dsn=far.source.dsn),
        stream=msgspec.structs.replace(config.stream, servers=far.stream.servers),
    )
    oracle = await prepared(pg_db, config)
    async with pair(tmp_path, config, far) as both:
        async with written_to(pg_db):
            database.strand()
            broker.strand()
            await both.first.end(signal.SIGKILL)
            await both.taken_over(TAKEOVER)
        await settled(config, 60)
        assert "ending the predecessor's session" in both.second.text
        assert await both.second.end() == 0
    await agrees(config, oracle)


async def test_a_broker_that_is_away_for_long_takes_the_lease_from_nobody(
    pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy], tmp_path: Path
) -> None:
    broker = proxied(nats.port)
    config = source(pg_db, nats.url)
    far = msgspec.structs.replace(
        config, stream=msgspec.structs.replace(config.stream, servers=[f"nats://127.0.0.1:{broker.port}"])
    )
    oracle = await prepared(pg_db, config)
    (tmp_path / "a").mkdir()
    async with pair(tmp_path / "a", far) as both:
        before = await held_by(config)
        assert before is not None
        await broker.refuse()
        await anyio.sleep(lease.STALE * 2)  # the outage itself
        await execute(pg_db, "INSERT INTO t VALUES (1, 'a')")
        broker.accept()
        await both.first.said("[info     ] streaming", 60, times=2)
        await settled(config, 60)
        await anyio.sleep(lease.STALE + 2)  # long enough for one that counted the outage
        now = await held_by(config)
        assert now is not None
        assert (now.holder, now.epoch) == (before.holder, before.epoch)
        assert "[info     ] streaming" not in both.second.text
        assert await both.second.end() == 0
        assert await both.first.end() == 0
    await agrees(config, oracle)
    assert [w.epoch for w in await writers(config)] == [1]


async def test_a_snapshot_whose_bridge_is_paused_starts_over_from_a_new_slot(
    pg_db: str, nats: NatsServer, proxied: Callable[[int], Proxy], tmp_path: Path
) -> None:
    broker = proxied(nats.port)
    config = source(pg_db, nats.url)
    far = msgspec.structs.replace(
        config, stream=msgspec.structs.replace(config.stream, servers=[f"nats://127.0.0.1:{broker.port}"])
    )
    await execute(pg_db, TABLE, "INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series(1, 40000) g")
    both = Pair(tmp_path, config, far)
    try:
        broker.delay = 0.1
        both.first.start()
        await both.first.said("slot created")

        async def read() -> bool:
            async with broker_of(config) as there:
                found = await there.stream(config.stream.name)
                return found is not None and found.last_seq > 2000

        await until(read, 30, "a part of the snapshot is in the stream")
        both.signal(signal.SIGSTOP)
        both.second.start()
        await both.taken_over(TAKEOVER + 30)
        await execute(pg_db, "UPDATE t SET body = 'changed' WHERE id <= 10")
        await settled(config)
        both.signal(signal.SIGCONT)
        assert await both.first.wait(60) == 3
        await execute(pg_db, "DELETE FROM t WHERE id > 39990")
        await settled(config)
        assert await both.second.end() == 0
    finally:
        both.close()
    await agrees(config)


async def test_a_bridge_with_another_bucket_keeps_away_from_a_slot_in_use(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    other = msgspec.structs.replace(
        config,
        state=StateConfig(bucket=f"{config.state.bucket}_2"),
        stream=msgspec.structs.replace(config.stream, name=f"{config.stream.name}_2", prefix="other"),
    )
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
        async with bridge(other):
            for number in range(3):
                await execute(pg_db, f"INSERT INTO t VALUES ({number}, 'a')")
                await settled(config)
            async with broker_of(config) as broker:
                assert await broker.stream(other.stream.name) is None
    await agrees(config)


@pytest.fixture
async def state(nats: NatsServer) -> AsyncIterator[State]:
    config = source("", nats.url)
    async with broker_of(config) as broker:
        yield await State.open(broker, config.state.bucket)


async def test_a_pid_that_now_is_another_process_s_is_a_dead_holder(state: State) -> None:
    mine = lease._lease("gone")
    await state.put("lease.test", msgspec.structs.replace(mine, started=mine.started - 1))
    with anyio.fail_after(5):
        await take(state, "lease.test", "two", patient=True)
    await state.put("lease.test", mine)
    with anyio.move_on_after(3) as waited:
        await take(state, "lease.test", "three", patient=True)
    assert waited.cancelled_caught


async def test_a_holder_on_another_host_with_the_same_pid_is_not_taken_for_dead(state: State) -> None:
    ended = await anyio.run_process(["true"])
    assert ended.returncode == 0
    await state.put("lease.test", Lease("far", "host/boot/pid:[1]", 2**22, "", 7))
    with anyio.move_on_after(3) as waited:
        await take(state, "lease.test", "two", patient=True)
    assert waited.cancelled_caught


async def test_a_holder_that_cannot_renew_gives_up_before_anybody_else_may_begin(
    nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(nats.port)
    near = source("", nats.url)
    far = msgspec.structs.replace(
        near, stream=msgspec.structs.replace(near.stream, servers=[f"nats://127.0.0.1:{proxy.port}"])
    )
    times: dict[str, float] = {}
    async with broker_of(far) as one, broker_of(near) as two:
        hold = await take(await State.open(one, near.state.bucket), "lease.test", "one", patient=True)

        async def work() -> None:
            try:
                await hold.keep()
            except lease.Lost:
                times["stopped"] = time.monotonic()

        async def stand_by() -> None:
            await take(await State.open(two, near.state.bucket), "lease.test", "two", patient=True)
            times["began"] = time.monotonic()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            tasks.start_soon(stand_by)
            await anyio.sleep(3)
            assert not times
            proxy.hold()
            await until(lambda: len(times) == 2, TAKEOVER, "one has stopped and the other has begun")
        assert times["stopped"] < times["began"]
        proxy.release()


async def test_only_reads_that_succeed_count_against_a_holder(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    await state.put("lease.test", Lease("far", "host/boot/pid:[1]", os.getpid(), "", 7))
    read, slow = state.get, 6.0

    async def slowly(key: str, kind: type[Lease]) -> tuple[Lease, int] | None:
        await anyio.sleep(slow)
        return await read(key, kind)

    monkeypatch.setattr(state, "get", slowly)
    with anyio.move_on_after(lease.STALE * 2) as waited:
        await take(state, "lease.test", "two", patient=True)
    assert waited.cancelled_caught


async def test_messages_show_one_writer_at_a_time(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    for number in range(3):
        async with bridge(config):
            await streaming(config)
            await execute(pg_db, f"INSERT INTO t VALUES ({number}, 'a')")
            await settled(config)
            held = await held_by(config)
            assert held is not None
            assert held.epoch == number + 1
        assert await held_by(config) is None
    epochs = [message.epoch for message, _ in await messages(config)]
    assert epochs == sorted(epochs)


async def test_a_standby_of_another_database_is_refused_while_the_first_one_works(
    pg: Postgres, pg_db: str, nats: NatsServer
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, MARK)
    async with bridge(config), database(pg) as elsewhere:
        await settled(config)
        other = with_dsn(config, elsewhere)
        error = await failure(other, 20)
        assert isinstance(error, OtherDatabase)
        assert "was written from database" in error.what
        assert "[source] dsn" in error.remedy
        await execute(pg_db, "INSERT INTO t VALUES (1, 'goes on')")
        await settled(config)


async def test_a_standby_that_does_not_reach_postgresql_yet_waits(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, MARK)
    away = pg_db.replace(pg_db.split("@")[1].split("/")[0], f"127.0.0.1:{free_port()}")
    far = with_dsn(config, away)
    second = Process(tmp_path, toml(far))
    try:
        async with bridge(config):
            await settled(config)
            second.start()
            await second.said("standing by")
            # It is asked more than once meanwhile.
            with pytest.raises(TimeoutError):
                await until(lambda: second.process is None or second.process.poll() is not None, 8, "it has ended")
        assert await second.end() == 0
    finally:
        second.close()


async def guarded(pg: Postgres, word: str) -> str:
    """A dsn with this password, of a role that is asked for the password `right`."""
    await execute(pg.dsn(), TABLE, MARK, "CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 'right'")
    hba = pg.data_dir / "pg_hba.conf"
    hba.write_text("host all guarded 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
    await execute(pg.dsn(), "SELECT pg_reload_conf()")
    return pg.dsn(user="guarded").replace("guarded@", f"guarded:{word}@")


def with_dsn(config: Config, dsn: str) -> Config:
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, dsn=Secret(dsn)))


async def shown(config: Config, *, able: bool) -> Status:
    """A status with one standby, once it says of itself that it could take over or not."""
    found: list[Status] = []

    async def said() -> bool:
        found[:] = [await collect(config, list(config.stream.servers))]
        return [not one.why for one in found[0].process.standby] == [able]

    await until(said, 30, f"the standby is shown to be {'able' if able else 'unable'} to take over")
    return found[0]


async def test_a_standby_that_postgresql_does_not_let_in_says_so_and_is_mended_while_it_waits(
    own_pg: Postgres, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(own_pg.dsn(), nats.url)
    wrong = with_dsn(config, await guarded(own_pg, "swordfish"))
    second = Process(tmp_path, toml(wrong))
    try:
        async with bridge(config):
            await settled(config)
            second.start()
            await second.said("could not take over")
            await second.said("password authentication failed")
            found = await shown(config, able=False)
            [finding] = [one for one in found.findings if one.level == "problem"]
            assert "could not take over: PostgreSQL refuses the connection" in finding.what
            second.file.write_text(toml(with_dsn(config, str(wrong.source.dsn).replace("swordfish", "right"))))
            assert second.process is not None
            second.process.send_signal(signal.SIGHUP)
            assert (await shown(config, able=True)).in_step
        await second.said("[info     ] streaming")
        await settled(config)
        assert second.text.count("could not take over") == 1
        assert "swordfish" not in second.text
        assert await second.end() == 0
    finally:
        second.close()


async def test_a_standby_asks_postgresql_again_while_it_waits(
    own_pg: Postgres, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "LOOK_EVERY", 0.2)
    config = source(own_pg.dsn(), nats.url)
    theirs = with_dsn(config, await guarded(own_pg, "right"))
    with capture_logs() as said:

        def told(event: str) -> list[str]:
            return [line["log_level"] for line in said if line["event"] == event]

        async with bridge(config):
            await settled(config)
            async with bridge(theirs):
                await shown(config, able=True)
                await execute(own_pg.dsn(), "ALTER ROLE guarded PASSWORD 'another'")
                await shown(config, able=False)
                await execute(own_pg.dsn(), "ALTER ROLE guarded PASSWORD 'right' NOREPLICATION NOSUPERUSER")
                await until(lambda: len(told("could not take over")) == 2, 30, "it says what keeps it now")
                await execute(own_pg.dsn(), "ALTER ROLE guarded SUPERUSER")
                assert (await shown(config, able=True)).in_step
    assert told("could not take over") == ["warning", "warning"]
    assert told("could take over again") == ["info"]
