"""The bridge as a NATS micro service: found and asked with the `nats` command line tool and by plain requests."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec
import nats as client
import psutil
import pytest
from nats.aio.client import Client

from bridge import __version__, waiting
from bridge.config import Operate
from bridge.embedded import NatsServer, Postgres, SearchEngine
from bridge.operate.around import around
from tests.databases import database
from tests.running import Process, emptied, execute, source

pytestmark = pytest.mark.anyio

ROWS = 50


async def until(condition: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Waits, and asks no more often than a person's script would."""
    assert await waiting.until(condition, seconds=seconds, every=0.1), what


class Answer(NamedTuple):
    """What came back; `code` and `error` as its headers have them."""

    body: Any
    code: int
    error: str


class World:
    """A bridge with an index and its reader, on servers of their own."""

    def __init__(self, folder: Path, dsn: str, nats: NatsServer, engine: SearchEngine) -> None:
        self.folder = folder
        self.dsn = dsn
        self.nats = nats
        self.settings = (
            f'[source]\ndsn = "{dsn}"\n[stream]\nservers = "{nats.url}"\nsync = "always"\n'
            f'[index.messages]\ntable = "public.messages"\nurl = "{engine.url}"\nalias = "service-messages"\n'
        )
        self.bridge = self.process("bridge")
        self.client = Client()

    def process(self, name: str, settings: str = "") -> Process:
        (self.folder / name).mkdir(exist_ok=True)
        return Process(self.folder / name, self.settings + settings)

    async def ask(self, verb: str, body: Any = b"", seconds: float = 20) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = await self.client.request(f"bridge.main.{verb}", data, timeout=seconds)
        headers = found.headers or {}
        code = int(headers.get("Nats-Service-Error-Code", 0))
        return Answer(json.loads(found.data), code, headers.get("Nats-Service-Error", ""))

    async def active(self) -> bool:
        """Whether it answers as the one that streams; it says "streaming" before it has looked at its lease."""
        return any(one["metadata"]["role"] == "active" for one in await self.instances())

    async def in_step(self) -> bool:
        """Whether the bridge says so of itself."""
        return (await self.ask("status")).body["in_step"] is True

    async def resting(self) -> psutil.Process:
        """The process of the rebuild that was asked for, once it rests."""
        found: list[psutil.Process] = []

        async def there() -> bool:
            assert self.bridge.process is not None
            children = psutil.Process(self.bridge.process.pid).children(recursive=True)
            found[:] = [one for one in children if one.status() == psutil.STATUS_STOPPED]
            return bool(found)

        await until(there, 30, "the rebuild replays")
        return found[0]

    async def read_again(self, table: str) -> None:
        """Waits until nothing is to be read of a table any more."""

        async def done() -> bool:
            status = (await self.ask("snapshot", {"tables": [table], "status": True})).body
            return all(one["state"] == "done" for one in status["tables"].values())

        await until(done, 30, f"{table} is read")

    async def instances(self, verb: str = "INFO") -> list[dict[str, Any]]:
        """What every instance says of itself within a moment."""
        inbox = self.client.new_inbox()
        heard = await self.client.subscribe(inbox)
        await self.client.publish(f"$SRV.{verb}.bridge", reply=inbox)
        found = []
        try:
            while True:
                said = await heard.next_msg(timeout=0.7)
                if said.data:  # else: that there is none
                    found.append(json.loads(said.data))
        except client.errors.TimeoutError:
            await heard.unsubscribe()
            return found


@pytest.fixture(scope="module")
async def world(pg: Postgres, osmem: SearchEngine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with database(pg) as dsn, NatsServer.throwaway() as nats:
        await execute(
            dsn,
            "CREATE TABLE messages (id int PRIMARY KEY, body text)",
            f"INSERT INTO messages SELECT n, 'text ' || n FROM generate_series(1, {ROWS}) n",
            'CREATE TABLE "odd.name" (id int PRIMARY KEY)',
        )
        await emptied(osmem.url, "messages")
        found = World(tmp_path_factory.mktemp("service"), dsn, nats, osmem)
        await found.client.connect(nats.url)
        reader = found.process("index")
        # Every rebuild that is asked for rests while it replays, until it is sent SIGCONT.
        found.bridge.start(failpoint="rebuild.replaying:stop")
        try:
            await found.bridge.said("streaming")
            reader.start("index")
            await reader.said("following")
            await until(found.active, 30, "the bridge answers to every verb")
            yield found
        finally:
            await found.client.close()
            for one in (reader, found.bridge):
                await one.end()
                one.close()


def shape(found: Any) -> Any:
    """Which keys there are, at every depth."""
    if isinstance(found, dict):
        return {name: shape(value) for name, value in found.items()}
    return [shape(one) for one in found] if isinstance(found, list) else None


async def printed(world: World, *arguments: str) -> Any:
    """What a command of the same configuration prints."""
    command = [sys.executable, "-m", "bridge", "--config", str(world.bridge.file), *arguments]
    return json.loads((await anyio.run_process(command, check=False)).stdout)


async def test_each_bridge_is_an_instance_that_says_who_it_is(world: World, natscli: Path) -> None:
    [found] = await world.instances()
    metadata = {"source": "main", "role": "active", "epoch": "1", "host": socket.gethostname()}
    assert (found["name"], found["version"], found["metadata"]) == ("bridge", __version__, metadata)
    assert {one["name"]: one["subject"] for one in found["endpoints"]} == {
        "status": "bridge.main.status",
        "check": "bridge.main.check",
        "snapshot": "bridge.main.snapshot",
        "snapshot-where": "bridge.main.snapshot.where",
        "reindex": "bridge.main.reindex",
    }
    for one in ("info", "stats"):
        shown = await nats_cli(natscli, world.nats.url, "micro", one, "bridge")
        assert found["id"] in shown
        assert "bridge.main.status" in shown or "status" in shown
    assert found["id"] in await nats_cli(natscli, world.nats.url, "micro", "ls")
    assert found["id"] in await nats_cli(natscli, world.nats.url, "micro", "ping")


async def test_status_and_check_answer_what_the_commands_print(world: World) -> None:
    await until(world.in_step, 20, "the index is there, by a look that is a second old at most")
    answered, shown = (await world.ask("status")).body, await printed(world, "status", "--json")
    # One look alone tells no rates, and is no second one.
    assert answered.pop("rates") is not None
    assert shown.pop("rates") is None
    assert shape(answered) == shape(shown)
    for same in ("in_step", "source", "settings", "process", "findings"):
        assert answered[same] == shown[same], same
    assert answered["in_step"] is True
    answered, shown = (await world.ask("check", {})).body, await printed(world, "check", "--json")
    assert shape(answered) == shape(shown)
    # What is said of each holds figures of its moment.
    told = [[(one["id"], one["level"], one["about"]) for one in found["findings"]] for found in (answered, shown)]
    assert told[0] == told[1]
    assert "postgres.wal_keep" in [id for id, _, _ in told[0]]


async def test_tables_are_read_again_as_the_command_asks_for_it(world: World) -> None:
    asked = await world.ask("snapshot", {"tables": ["public.messages"]})
    assert asked.body["running"] is True
    assert asked.body["tables"].keys() == {"public.messages"}
    await world.read_again("public.messages")
    taken = world.bridge.text.count("snapshot requested")
    assert taken
    idle = await world.ask("snapshot", {"tables": ["public.messages"], "cancel": True})
    assert idle.body["idle"] == ["public.messages"]
    assert world.bridge.text.count("snapshot requested") == taken
    everything = await world.ask("snapshot", {"tables": "all", "status": True})
    assert everything.body["tables"].keys() == {"public.messages", 'public."odd.name"'}


async def test_a_condition_has_a_subject_of_its_own(world: World) -> None:
    refused = await world.ask("snapshot", {"tables": ["public.messages"], "where": "id = 7"})
    assert (refused.code, "send it to bridge.main.snapshot.where" in refused.error) == (400, True)
    before = (await world.ask("status")).body["stream"]["last_seq"]
    assert (await world.ask("snapshot.where", {"tables": ["public.messages"], "where": "id = 7"})).code == 0
    await world.read_again("public.messages")

    async def one_more() -> bool:
        return bool((await world.ask("status")).body["stream"]["last_seq"] > before)

    await until(one_more, 20, "the row is in the stream")


@pytest.mark.parametrize(
    ("verb", "body", "code", "words"),
    [
        ("snapshot", {"tables": ["public.nothing"]}, 400, "no published table is called public.nothing"),
        ("snapshot", {"tables": []}, 400, "tables is empty"),
        ("snapshot", {"tables": ["public.a"] * 101}, 400, "101 tables are named"),
        ("snapshot", {"tables": ["public.*a*a*a*a*a"]}, 400, "more than 4 *"),
        ("snapshot", {"tables": ["nodot"]}, 400, "is not a table name"),
        ("snapshot", {"tables": "all", "pause": True, "cancel": True}, 400, "pause and cancel exclude each other"),
        ("snapshot", {"tables": "some"}, 400, "tables"),
        ("snapshot", {"tables": "all", "trim": True}, 400, "unknown field `trim`"),
        ("snapshot", {}, 400, "missing required field `tables`"),
        ("snapshot.where", {"tables": "all", "where": " "}, 400, "where is empty or too long"),
        ("reindex", {"name": "nothing"}, 400, "has no index nothing (there is: messages)"),
        ("reindex", {"name": "--help"}, 400, "has no index --help"),
        ("reindex", {"name": "messages", "back": True, "keep_old": True}, 400, "do not go together"),
        ("reindex", {"name": "messages", "until": "noon"}, 400, "is neither a sequence nor a time"),
        ("reindex", {"name": "messages", "cancel": True}, 409, "does not rebuild messages now"),
        ("reindex", {"name": "messages", "mapping": "/etc/passwd"}, 400, "unknown field `mapping`"),
        ("status", {"surprise": 1}, 400, "it may have: nothing"),
        ("status", b"{", 400, "Input data was truncated"),
        ("status", b"\xff\xfe", 400, "cannot be read"),
        ("status", b"[" * 60_000, 400, "cannot be read"),
        ("status", b'{"a\\r\\nNats-Service-Error: no": 1}', 400, "unknown field"),
        ("check", b" " * 70_000, 413, "65,536 are taken at most"),
        ("check", b" " * 7_000_000, 413, "7,000,000 bytes"),
    ],
)
async def test_a_request_that_is_wrong_is_told_what_is_wrong_and_what_to_do(
    world: World, verb: str, body: Any, code: int, words: str
) -> None:
    taken = world.bridge.text.count("snapshot requested")
    found = await world.ask(verb, body)
    assert found.code == code
    assert words in found.error
    assert world.bridge.text.count("snapshot requested") == taken
    assert found.body.keys() == {"error", "next"}
    assert found.body["next"]
    assert "Traceback" not in str(found)


async def test_a_rebuild_runs_beside_the_bridge_one_at_a_time_and_is_told_of(world: World) -> None:
    begun = await world.ask("reindex", {"name": "messages"})
    assert (begun.code, begun.body["state"]) == (0, "running")
    rests = await world.resting()

    async def told() -> bool:
        [index] = (await world.ask("status")).body["indexes"]
        return "building" in [one["state"] for one in index["generations"]]

    await until(told, 10, "the status, which may be a second old, shows it")
    second = await world.ask("reindex", {"name": "messages"})
    assert (second.code, "is being rebuilt since" in second.error) == (409, True)
    rests.resume()

    async def ended() -> bool:
        return bool((await world.ask("reindex", {"name": "messages", "status": True})).body["state"] != "running")

    await until(ended, 30, "the rebuild has ended")
    done = (await world.ask("reindex", {"name": "messages", "status": True})).body
    assert done["state"] == "done", done
    assert f"{ROWS} documents" in done["said"]
    assert "alias switched" in world.bridge.text


async def test_a_rebuild_that_is_cancelled_leaves_nothing(world: World) -> None:
    async def generations() -> list[str]:
        [index] = (await world.ask("status")).body["indexes"]
        return [one["physical"] for one in index["generations"]]

    async def one() -> bool:
        return len(await generations()) == 1  # the one before may be on its way out yet

    await until(one, 20, "one generation is left")
    before = await generations()
    await world.ask("reindex", {"name": "messages"})
    rests = await world.resting()
    cancelled: list[Answer] = []

    async def cancel() -> None:
        cancelled.append(await world.ask("reindex", {"name": "messages", "cancel": True}))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel)
        await world.bridge.said("rebuild cancelled by request")
        rests.resume()
    assert cancelled[0].body["state"] == "cancelled"
    await until(one, 20, "what was begun is gone")
    assert await generations() == before


async def test_an_answer_goes_to_an_inbox_and_nowhere_else(world: World) -> None:
    # The bridge may publish to all of these: a stranger who names one as reply subject would write with its rights.
    await until(world.in_step, 30, "nothing of before is under way")
    before = (await world.ask("status")).body["stream"]
    key = "$KV.bridge.checkpoint.main"
    heard = await world.client.subscribe("$KV.bridge.checkpoint.*")
    for reply in ("cdc.main.public.messages", key, "$JS.API.STREAM.PURGE.cdc_main", "bridge.main.check", "_INBOX.>"):
        for subject in ("bridge.main.status", "$SRV.PING", "$SRV.INFO.bridge"):
            await world.client.publish(subject, reply=reply)
        await world.client.publish("bridge.main.snapshot", b"{", reply=reply)
    after = (await world.ask("status")).body
    assert (after["stream"]["messages"], after["stream"]["last_seq"]) == (before["messages"], before["last_seq"])
    assert after["in_step"] is True
    while heard.pending_msgs:
        assert b'"phase"' in (await heard.next_msg()).data  # the bridge's own
    [stats] = await world.instances("STATS")
    assert any(one["last_error"] == "its reply subject is no inbox" for one in stats["endpoints"])


async def test_a_flood_and_frames_that_break_a_client_do_no_harm(world: World) -> None:
    [before] = await world.instances("STATS")
    async with Raw(world.nats.port) as raw:
        for block in (b"NATS/1.0 \xff\xff\xff\r\n\r\n", b"NATS/1.0\r\n\r\n", b"NATS/1.0\r\n:\xff\r\n\r\n", b"\0" * 12):
            await raw.send(b"HPUB bridge.main.status _INBOX.x %d %d\r\n%b\r\n" % (len(block), len(block), block))
        # Not a tenth of these may arrive: the server is told to keep them away.
        await raw.send(b"PUB bridge.main.status _INBOX.flood 0\r\n\r\n" * 20_000)
        await raw.send(b"PUB $SRV.STATS _INBOX.flood 0\r\n\r\n" * 20_000)
    await execute(world.dsn, "INSERT INTO messages VALUES (1000, 'after the flood')")

    async def answers() -> bool:
        try:
            return bool((await world.ask("status")).body.get("in_step"))
        except client.errors.NoRespondersError:
            return False  # until the second is over

    await until(answers, 20, "requests are answered again")
    [after] = await world.instances("STATS")
    assert after["id"] == before["id"], "the connection has broken"
    asked = [one["endpoints"][0]["num_requests"] for one in (before, after)]
    assert asked[1] - asked[0] < 2_000
    assert "Traceback" not in world.bridge.text


async def test_a_bridge_that_stands_by_answers_what_only_looks_and_takes_over_the_rest(world: World) -> None:
    second = world.process("second")
    second.start()
    try:
        await second.said("standing by")

        async def both() -> bool:
            return sorted(one["metadata"]["role"] for one in await world.instances()) == ["active", "standby"]

        await until(both, 20, "both are there")
        [standby] = [one for one in await world.instances() if one["metadata"]["role"] == "standby"]
        assert [one["name"] for one in standby["endpoints"]] == ["status", "check"]
        assert "epoch" not in standby["metadata"]
        assert await world.bridge.end() == 0

        async def takes_over() -> bool:
            found = [one["metadata"] for one in await world.instances()]
            return [(one["role"], one.get("epoch")) for one in found] == [("active", "2")]

        await until(takes_over, 30, "the second has taken over")
        assert (await world.ask("snapshot", {"tables": "all", "status": True})).body["running"] is True
        [index] = (await world.ask("status")).body["indexes"]
        assert index["reader"]
    finally:
        await second.end()
        second.close()


async def test_without_the_service_nobody_answers(world: World) -> None:
    silent = world.process("silent", "[operate]\nservice = false\n")
    if world.bridge.process is not None and world.bridge.process.poll() is None:
        await world.bridge.end()
    silent.start()
    try:
        await silent.said("streaming")
        assert await world.instances() == []
        with pytest.raises(client.errors.NoRespondersError):
            await world.ask("status")
    finally:
        await silent.end()
        silent.close()


async def test_a_bridge_whose_user_may_not_answer_streams_all_the_same(pg_db: str, tmp_path: Path) -> None:
    users = '{ users: [{ user: bridge, password: word, permissions { subscribe: { deny: ["$SRV.>"] } } }] }'
    async with NatsServer.throwaway(settings={"authorization": users}) as nats:
        await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
        bridge = Process(
            tmp_path,
            f'[source]\ndsn = "{pg_db}"\nslot = "bridge_unheard"\n'
            f'[stream]\nservers = "{nats.url}"\nsync = "always"\nuser = "bridge"\npassword = "word"\n',
        )
        bridge.start()
        try:
            await bridge.said("streaming")
            await bridge.said("no requests are answered: NATS at")
            assert "grant this user the permissions that nats-server.conf lists" in bridge.text
            assert await bridge.end() == 0
        finally:
            bridge.close()


async def test_requests_are_answered_again_when_the_server_is_back(pg_db: str, own_nats: NatsServer) -> None:
    config = source(pg_db, own_nats.url)
    subject = f"bridge.{config.source.name}.status"

    async def answers() -> bool:
        try:
            asking = Client()
            await asking.connect(own_nats.url, allow_reconnect=False, connect_timeout=2)
            try:
                return "in_step" in json.loads((await asking.request(subject, timeout=5)).data)
            finally:
                await asking.close()
        except (client.errors.Error, OSError):
            return False

    async with around(msgspec.structs.replace(config, operate=Operate(http="")), list(config.stream.servers), [], []):
        await until(answers, 20, "it answers, also while no bridge has run")
        await own_nats.kill()
        await own_nats.start()
        await until(answers, 30, "it answers again")


class Raw:
    """A client that sends what it likes."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Raw:
        self._stream = await anyio.connect_tcp("127.0.0.1", self._port)
        await self._stream.send(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n')
        return self

    async def send(self, data: bytes) -> None:
        await self._stream.send(data)

    async def __aexit__(self, *_: object) -> None:
        """Only once the server has read everything."""
        await self._stream.send(b"PING\r\n")
        heard = b""
        with anyio.fail_after(20):
            while b"PONG\r\n" not in heard:
                heard = heard[-10:] + await self._stream.receive()
        await self._stream.aclose()


async def nats_cli(program: Path, url: str, *arguments: str) -> str:
    with anyio.fail_after(20):
        found = await anyio.run_process([str(program), "--server", url, *arguments])
    return found.stdout.decode()
