"""The users of nats-server.conf: each role does all of its work with its permissions, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from nats.aio.client import Client

from bridge import waiting
from bridge.config import Config, Secret, Source, State, Stream
from bridge.embedded import NatsServer, Postgres, SearchEngine
from bridge.embedded.nats import shipped_config
from bridge.errors import EXIT_DONE, EXIT_FOUND
from bridge.stream import events
from tests.databases import database
from tests.running import Process, broker_of, emptied, execute, settled, source
from tests.running import bridge as running

pytestmark = pytest.mark.anyio

LARGE = 400_000
USERS = ("bridge", "index", "consumer", "operator")


def document(row: dict[str, Any]) -> dict[str, Any]:
    """The index's transform: one row has no document."""
    if row["body"] == "refused":
        raise ValueError
    return row


def shipped(name: str) -> str:
    """A block of nats-server.conf as it is when it is switched on, each user with its own name as password."""
    found = re.search(rf"^# {name} (\{{\n(?:#.*\n)*?# \}})\n", shipped_config().read_text(), re.MULTILINE)
    assert found is not None
    block = re.sub(r"^# ?", "", found[1], flags=re.MULTILINE)
    return re.sub(r"user: (\w+)([,\s]+)password: \"[^\"]*\"", r"user: \1\2password: \1", block)


class World:
    """A bridge, an index and their server, each with its own user."""

    def __init__(self, folder: Path, dsn: str, nats: NatsServer, engine: SearchEngine) -> None:
        self.folder = folder
        self.dsn = dsn
        self.nats = nats
        self.engine = engine

    def process(self, user: str) -> Process:
        (self.folder / user).mkdir(exist_ok=True)
        return Process(
            self.folder / user,
            f'[source]\ndsn = "{self.dsn}"\n'
            f'[stream]\nservers = "{self.nats.url}"\nsync = "always"\nuser = "{user}"\npassword = "{user}"\n'
            f'[index.messages]\ntable = "public.messages"\nurl = "{self.engine.url}"\nalias = "permitted"\n'
            f'transform = "{__name__}:document"\n',
        )

    async def command(self, user: str, *arguments: str) -> str:
        """What a command of the bridge prints for a user; whether it has found something is not the question here."""
        file = self.process(user).file
        called = [sys.executable, "-m", "bridge", "--config", str(file), *arguments]
        with anyio.fail_after(60):
            done = await anyio.run_process(called, stdin=subprocess.DEVNULL, check=False)
        assert done.returncode in (EXIT_DONE, EXIT_FOUND), (arguments, done.stderr.decode())
        return done.stdout.decode()

    async def operator(self, natscli: Path, *arguments: str, code: int = 0) -> str:
        """What the nats command line tool prints for the operator."""
        login = ["--server", self.nats.url, "--user", "operator", "--password", "operator"]
        with anyio.fail_after(30):
            done = await anyio.run_process([str(natscli), *login, *arguments], stdin=subprocess.DEVNULL, check=False)
        said = done.stdout.decode() + done.stderr.decode()
        assert done.returncode == code, (arguments, said)
        return said

    @property
    def violations(self) -> list[str]:
        """What the server has refused so far."""
        lines = self.nats.log.read_text().splitlines()
        return [line.rpartition(" - ")[2] for line in lines if "Violation" in line]


@pytest.fixture(scope="module")
async def world(pg: Postgres, osmem: SearchEngine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    users = shipped("authorization").replace("users = [", "users = [ { user: admin, password: admin }", 1)
    settings = {"authorization": users, "max_payload": "256KB"}
    async with database(pg) as dsn, NatsServer.throwaway(settings=settings) as nats:
        await execute(
            dsn,
            "CREATE TABLE messages (id int PRIMARY KEY, body text)",
            "INSERT INTO messages SELECT n, 'text ' || n FROM generate_series(1, 20) n",
            f"INSERT INTO messages VALUES (100, repeat('x', {LARGE})), (101, 'refused')",
        )
        await emptied(osmem.url, "messages")
        found = World(tmp_path_factory.mktemp("permissions"), dsn, nats, osmem)
        bridge, index = found.process("bridge"), found.process("index")
        bridge.start()
        try:
            await bridge.said("streaming")
            index.start("index")
            await index.said("following")
            yield found
        finally:
            for one in (index, bridge):
                await one.end()
                one.close()


async def test_each_role_does_its_work(world: World, natscli: Path) -> None:
    # The bridge: streams, reads again, keeps large rows, trims, and rebuilds what it is asked to.
    await execute(world.dsn, f"INSERT INTO messages VALUES (102, repeat('y', {LARGE}))")
    await world.command("bridge", "snapshot", "--all", "--wait")
    status = json.loads(await world.command("bridge", "status", "--json"))
    assert (status["away"], status["stream"]["exists"]) == ({}, True)
    await world.command("bridge", "verify")

    async def rebuilt() -> bool:
        found = await client.request("bridge.main.reindex", b'{"name": "messages", "status": true}', timeout=5)
        return bool(json.loads(found.data)["state"] == "done")

    client = await connected(world, "admin")
    await client.request("bridge.main.reindex", b'{"name": "messages"}', timeout=10)
    assert await waiting.until(rebuilt, seconds=60, every=0.2), "the index is rebuilt by the bridge"
    await client.close()
    # The index reader: has built, follows, has dead letters, rebuilds, compares.
    assert "transform" in await world.command("index", "dlq", "messages")
    await world.command("index", "reindex", "messages", "--keep-old")
    await world.command("index", "reindex", "messages", "--drop-old")
    await world.command("index", "verify", "--index", "messages")
    await world.command("index", "dlq", "messages", "retry", "--all")
    await world.command("index", "dlq", "messages", "drop", "--all", "--yes")
    await world.command("bridge", "snapshot", "--all", "--trim")
    # Consumers: with the command, and with the library.
    printed = await world.command("consumer", "replay")
    assert sum(len(line) > LARGE for line in printed.splitlines()) == 2
    seen = 0
    async with events(world.nats.url, durable="app", follow=False, user="consumer", password="consumer") as log:
        async for item in log:
            seen += 1
            await log.ack(item)
    assert seen == len(printed.splitlines())
    # The operator: looks at everything, and has tables read again.
    await world.operator(natscli, "stream", "info", "cdc_main")
    await world.operator(natscli, "stream", "backup", "cdc_main", str(world.folder / "backup"))
    await world.operator(natscli, "kv", "ls", "bridge")
    assert '"in_step"' in await world.operator(natscli, "req", "bridge.main.status", "", "--raw")
    asked = await world.operator(natscli, "req", "bridge.main.snapshot", '{"tables": ["public.messages"]}', "--raw")
    assert '"running":true' in asked
    assert world.violations == []


EVERYBODY = ("$JS.API.STREAM.DELETE.cdc_main", "$JS.API.STREAM.UPDATE.cdc_main", "$JS.API.STREAM.CREATE.mine",
             "$JS.API.STREAM.DELETE.KV_bridge", "$JS.API.STREAM.RESTORE.cdc_main", "cdc.other.public.t",
             "$JS.API.STREAM.MSG.DELETE.cdc_main", "$SYS.REQ.SERVER.PING", "anything")  # fmt: skip
WRITES = ("cdc.main.public.messages", "$KV.bridge.checkpoint.main", "$KV.bridge.lease.bridge.main",
          "$O.cdc_main_large.C.x", "$JS.API.STREAM.PURGE.cdc_main", "bridge.main.reindex",
          "bridge.main.snapshot.where")  # fmt: skip
REFUSED = {
    "bridge": EVERYBODY,
    "index": (*EVERYBODY, *WRITES, "bridge.main.status", "bridge.main.snapshot", "$KV.bridge.epochs.main"),
    "consumer": (*EVERYBODY, *WRITES, "bridge.main.status", "bridge.main.snapshot", "cdc_dlq.main.messages",
                 "$KV.bridge.index.main.messages", "$JS.API.CONSUMER.CREATE.KV_bridge.x"),
    "operator": (*EVERYBODY, *WRITES, "cdc_dlq.main.messages", "$KV.bridge.index.main.messages",
                 "$JS.API.CONSUMER.DELETE.cdc_main.app", "$JS.ACK.cdc_main.app.1.1.1.1.1"),
}  # fmt: skip


@pytest.mark.parametrize("user", USERS)
async def test_each_role_is_refused_what_is_not_its_work(world: World, user: str) -> None:
    heard: list[str] = []

    async def failed(error: Exception) -> None:
        heard.append(str(error))

    client = await connected(world, user, failed)
    for subject in REFUSED[user]:
        await client.publish(subject, b"{}")
    await client.flush()
    for subject in (">", "$KV.>", "$JS.>") + (() if user == "operator" else ("cdc.>",)):
        await client.subscribe(subject)
    subscriptions = 3 if user == "operator" else 4

    async def told() -> bool:  # the client's ping may leave before what it has in its buffer
        return sum("subscription to" in one.lower() for one in heard) >= subscriptions

    await waiting.until(told, seconds=20, every=0.05)
    await client.close()
    refused = {found[1].lower() for one in heard if (found := re.search(r'publish to "([^"]+)"', one, re.IGNORECASE))}
    assert refused == {subject.lower() for subject in REFUSED[user]}, heard
    assert sum("subscription to" in one.lower() for one in heard) == subscriptions


async def stored(config: Config) -> tuple[int, int]:
    """How many messages stream and bucket have."""
    async with broker_of(config) as broker:
        stream, bucket = await broker.stream("cdc_main"), await broker.stream("KV_bridge")
        assert stream is not None
        assert bucket is not None
        return stream.last_seq, bucket.last_seq


async def test_readers_in_an_account_of_their_own_read_and_cannot_let_the_server_write(pg_db: str) -> None:
    async with NatsServer.throwaway(settings={"accounts": shipped("accounts"), "max_payload": "256KB"}) as nats:
        config = msgspec.structs.replace(
            source(pg_db, nats.url),
            source=Source(name="main", dsn=Secret(pg_db), slot="bridge_accounts", tables=["public.*"]),
            stream=Stream(servers=[nats.url], name="cdc_main", sync="always", user="bridge", password=Secret("bridge")),
            state=State(bucket="bridge"),
        )
        await execute(
            pg_db,
            "CREATE TABLE t (id int PRIMARY KEY, body text)",
            "INSERT INTO t SELECT n, 'x' FROM generate_series(1, 3000) n",
            f"INSERT INTO t VALUES (0, repeat('x', {LARGE}))",
        )
        async with running(config):
            await settled(config)
        before = await stored(config)
        client = Client()
        await client.connect(nats.url, user="consumer", password="consumer", allow_reconnect=False)
        for reply in ("cdc.main.public.t", "$KV.bridge.checkpoint.main"):
            for subject in ("$JS.API.INFO", "$JS.API.STREAM.INFO.cdc_main"):
                await client.publish(subject, reply=reply)
        await client.request("$JS.API.INFO", timeout=5)
        await client.close()
        assert await stored(config) == before
        login: dict[str, Any] = {"user": "consumer", "password": "consumer"}
        async with events(nats.url, tables=["public.t"], durable="app", follow=False, **login) as log:
            rows = [len(item.data) > LARGE async for item in log if item.op == "read"]
        assert (len(rows), sum(rows)) == (3001, 1)


async def connected(world: World, user: str, failed: Any = None) -> Client:
    client = Client()
    await client.connect(world.nats.url, user=user, password=user, error_cb=failed, allow_reconnect=False)
    return client
