"""What `bridge check` finds of NATS: accounts without room, users who may not, streams and buckets that were edited."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from bridge.config import Config, Secret
from bridge.embedded import NatsServer, free_port, until
from bridge.operate.check import check
from bridge.operate.checks.finding import Finding
from bridge.operate.checks.repair import apply
from bridge.stream.objects import stream_of
from tests.cluster import MEMBERS, NatsCluster
from tests.running import bridge, broker_of, execute, settled, source

pytestmark = pytest.mark.anyio

SHIPPED = Path(__file__).parents[2] / "nats-server.conf"


def _user(name: str, permissions: str = "") -> str:
    allowed = f", permissions: {{ {permissions} }}" if permissions else ""
    return f"{{ user: {name}, password: {name}{allowed} }}"


def _shipped_permissions() -> str:
    """What the shipped configuration lists for `bridge`."""
    text = SHIPPED.read_text().replace("\n#", "\n").partition("user: bridge\n")[2]
    found = re.search(r"permissions \{(.*?)\n +\}", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
async def accounts() -> AsyncIterator[NatsServer]:
    """A server with an account of hardly any room, one without JetStream, and users who may more or less."""
    low = 'publish: ["cdc.>", "$JS.API.INFO", "$JS.API.STREAM.INFO.>"], subscribe: ["_INBOX.>"]'
    users = ", ".join([_user("free"), _user("shipped", _shipped_permissions()), _user("low", low)])
    small = "jetstream: { max_file: 64MB, max_streams: 2, max_consumers: 1 }"
    settings = {
        "max_payload": "64KB",
        "accounts": f"{{ FULL: {{ jetstream: enabled, users: [{users}] }}, NONE: {{ users: [{_user('none')}] }},"
        f" SMALL: {{ {small}, users: [{_user('small')}] }} }}",
    }
    async with NatsServer.throwaway(settings=settings) as server:
        yield server


def as_user(config: Config, user: str) -> Config:
    stream = msgspec.structs.replace(config.stream, user=user, password=Secret(user))
    return msgspec.structs.replace(config, stream=stream)


def as_shipped(config: Config) -> Config:
    """With the names that nats-server.conf has in its lists."""
    return msgspec.structs.replace(
        config,
        source=msgspec.structs.replace(config.source, name="main"),
        stream=msgspec.structs.replace(config.stream, name="cdc_main"),
        state=msgspec.structs.replace(config.state, bucket="bridge"),
    )


async def found(config: Config) -> list[Finding]:
    """What is found of NATS."""
    every = (await check(config, list(config.stream.servers))).found
    return [one for one in every if one.id.startswith("jetstream.")]


async def test_what_accounts_and_users_lack_is_named(pg_db: str, accounts: NatsServer) -> None:
    config = source(pg_db, accounts.url)
    [payload] = await found(as_user(config, "free"))
    assert (payload.id, payload.level, "max_payload: 8MB" in payload.next) == ("jetstream.max_payload", "warning", True)
    # What nats-server.conf lists for the bridge is all that it needs, also to tell the clock once there is a stream.
    shipped = as_user(as_shipped(config), "shipped")
    async with bridge(shipped):
        await settled(shipped)
    ids = [one.id for one in (await check(shipped, [accounts.url])).of("ok")]
    assert {"clocks.nats", "jetstream.permissions"} <= set(ids)
    assert [one.id for one in await found(shipped)] == ["jetstream.max_payload"]
    small = [one for one in await found(as_user(config, "small")) if one.id == "jetstream.account"]
    assert [(one.level, one.next) for one in small] == [
        ("error", "raise max_streams of the account to 3 or more"),
        ("warning", "raise max_consumers of the account to 2 or more"),
    ]
    [none] = await found(as_user(config, "none"))
    assert ("JetStream is not enabled" in none.what, none.id) == (True, "jetstream.reachable")
    [wrong] = await found(as_user(config, "nobody"))
    assert ("refuses the login" in wrong.what, wrong.level) == (True, "error")


async def test_a_user_who_may_not_write_or_read_is_told_each_subject(pg_db: str, accounts: NatsServer) -> None:
    config = source(pg_db, accounts.url)
    async with bridge(as_user(config, "free")):
        await settled(as_user(config, "free"))
    denied = [one for one in await found(as_user(config, "low")) if one.id == "jetstream.permissions"]
    stream, bucket = config.stream.name, config.state.bucket
    assert {one.about for one in denied} == {
        f"$KV.{bucket}.bridge-check",
        f"$O.{stream}_large.M.bridge-check",
        *(f"$JS.API.STREAM.{verb}.{one}" for verb in ("CREATE", "MSG.GET") for one in (stream, f"KV_{bucket}")),
        f"$JS.API.CONSUMER.CREATE.{stream}.bridge-check",
    }
    # Nothing of what was tried is stored anywhere.
    async with broker_of(as_user(config, "free")) as broker:
        before = await broker.api("INFO")
        await check(as_user(config, "free"), [accounts.url])
        after = await broker.api("INFO")
        sizes = [(info["streams"], info["consumers"], info["storage"]) for info in (before, after)]
        assert sizes[0] == sizes[1]


async def test_what_was_edited_is_set_back_where_nothing_is_lost(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t SELECT generate_series(1, 100)")
    async with bridge(config):
        await settled(config)
    assert await found(config) == []
    stream, bucket = config.stream.name, f"KV_{config.state.bucket}"
    async with broker_of(config) as broker:
        await edited(broker, stream, max_age=10**15, max_bytes=1 << 30, discard="new")
        await edited(broker, bucket, max_age=10**15)
        now = await found(config)
        assert sorted((one.id, one.what.split(" ")[0]) for one in now) == [
            ("jetstream.bucket", config.state.bucket),
            ("jetstream.drift", "discard"),
            ("jetstream.drift", "max_age"),
            ("jetstream.drift", "max_bytes"),
        ]
        said: list[str] = []
        await apply(config, [nats.url], now, said.append)
        assert len([line for line in said if line.startswith("done: nats stream edit")]) == 3
        [left] = await found(config)
        assert (left.what, left.fix) == ("discard is new, configured is old", None)
        assert (await broker.api(f"STREAM.INFO.{stream}"))["state"]["messages"] >= 100
        # Where the configuration has the smaller limit, only a person may take messages away.
        smaller = msgspec.structs.replace(config.stream, max_age="1s", discard="new")
        [age] = await found(msgspec.structs.replace(config, stream=smaller))
        assert (age.fix, age.next) == (None, f"nats stream edit {stream} --max-age=1s")


async def test_what_a_cluster_has_of_a_stream_is_said(pg_db: str, nats_cluster: NatsCluster) -> None:
    config = source(pg_db, nats_cluster.urls[0], sync="replicated", stream={"replicas": MEMBERS})
    config = msgspec.structs.replace(
        config, stream=msgspec.structs.replace(config.stream, servers=list(nats_cluster.urls))
    )
    async with bridge(config):
        await settled(config)
    await until(lambda: nats_cluster.current(config.stream.name), 60, "every replica is current")
    await until(lambda: nats_cluster.current(f"KV_{config.state.bucket}"), 60, "every replica is current")
    assert await found(config) == []
    one_copy = msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, replicas=1))
    assert "in a cluster, and [stream] replicas is 1" in str(await found(one_copy))
    leader = await nats_cluster.leader(config.stream.name)
    gone = next(member for member in range(MEMBERS) if member != leader)
    await nats_cluster.isolate(gone)

    async def seen() -> bool:
        behind = [one for one in await found(config) if one.id == "jetstream.replicas"]
        return f"replicas of {config.stream.name} are offline or behind: n{gone}" in [one.what for one in behind]

    try:
        await until(seen, 60, "the replica that is cut off is named")
    finally:
        nats_cluster.join()


async def test_the_commands_that_it_names_are_those_of_the_nats_cli(
    pg_db: str, nats: NatsServer, natscli: Path
) -> None:
    config = source(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
    name = f"{config.stream.name}_large"
    store = {"name": stream_of(name), "subjects": [f"$O.{name}.C.>", f"$O.{name}.M.>"], "allow_rollup_hdrs": True}
    async with broker_of(config) as broker:
        await broker.api(f"STREAM.CREATE.{store['name']}", store | {"discard": "new", "max_age": 10**15})
        await edited(broker, stream_of(name), max_bytes=1 << 30)
        await edited(broker, config.stream.name, max_age=10**15, discard="new", duplicate_window=10**9)
    for one in await found(config):
        words = one.next.partition(";")[0].split()
        assert words.pop(0) == "nats"
        force = ["--force"] if words[0] == "stream" else []
        await anyio.run_process([str(natscli), "--server", nats.url, *words, *force])
    assert await found(config) == []


async def edited(broker: Any, stream: str, **fields: Any) -> None:
    now = (await broker.api(f"STREAM.INFO.{stream}"))["config"]
    await broker.api(f"STREAM.UPDATE.{stream}", now | fields)


async def test_a_message_of_somebody_else_is_found_wherever_it_is(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
    subject = f"{config.stream.prefix}.{config.source.name}.public.planted"
    async with broker_of(config) as broker:
        await broker.nc.jetstream().publish(subject, b"{}")
        [foreign] = await found(config)
        assert (foreign.id, foreign.about, foreign.level) == ("jetstream.writers", subject, "error")
        seq = foreign.next.rpartition(" ")[2]
        await broker.api(f"STREAM.MSG.DELETE.{config.stream.name}", {"seq": int(seq)})
    assert await found(config) == []


async def test_a_stream_of_something_else_and_a_forgetting_store_are_errors(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    name = config.stream.name
    store = stream_of(f"{name}_large")
    async with broker_of(config) as broker:
        await broker.api(
            f"STREAM.CREATE.{name}", {"name": name, "subjects": [f"queue.{name}"], "retention": "workqueue"}
        )
        await broker.api(
            f"STREAM.CREATE.{store}",
            {"name": store, "subjects": [f"$O.{name}_large.>"], "storage": "memory", "max_age": 10**12},
        )
    now = await found(config)
    whats = [one.what for one in now if one.id == "jetstream.stream"]
    assert len(whats) == 3
    assert ("holds [" in whats[0], "atomic" in whats[1], "retention is workqueue" in whats[2]) == (True, True, True)
    assert [one.about for one in now if one.id == "jetstream.objects"] == [f"{name}_large"] * 2


async def test_an_embedded_server_that_does_not_run_is_left_alone(pg_db: str, tmp_path: Path) -> None:
    config = source(pg_db, f"nats://127.0.0.1:{free_port()}")
    folder = tmp_path / "data"
    stream = msgspec.structs.replace(config.stream, servers="embedded", store_dir=str(folder))
    every = await check(msgspec.structs.replace(config, stream=stream), [])
    said = {one.id: one for one in every.findings}
    assert "was not asked" in said["jetstream.reachable"].what
    assert said["embedded.store"].level == "ok"
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    stream = msgspec.structs.replace(stream, store_dir=str(tmp_path / "file" / "data"))
    every = await check(msgspec.structs.replace(config, stream=stream), [])
    assert [one.id for one in every.of("error")] == ["embedded.store"]
