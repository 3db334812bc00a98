"""The bridge over HTTP: health, readiness, metrics, who is answered, who may act, and clients that mean harm."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.abc
import msgspec
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bridge.config import Config, Index, Operate
from bridge.embedded import NatsServer, Postgres, SearchEngine, free_port, until
from bridge.errors import ServerRefused
from bridge.failpoints import VARIABLE
from bridge.index.indexer import run_index
from bridge.operate import rebuilds
from bridge.operate.http import door, site, streams, web
from bridge.operate.http.answer import HEADERS
from bridge.operate.lasting import lasting
from bridge.operate.status import live
from bridge.stream import subjects
from tests.databases import database
from tests.running import Process, bridge, command, execute, settled, source, state_of, toml
from tests.serving import TOKEN, Answered, asked, at_free_port, serving, with_token, written

pytestmark = pytest.mark.anyio

PLANTED = "planted-secret-value"


class World(NamedTuple):
    """A bridge, an index and both of their HTTP sides, that several tests share."""

    config: Config
    url: str
    index_url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.fixture(scope="module")
async def world(
    pg: Postgres, nats: NatsServer, osmem: SearchEngine, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    async with database(pg) as dsn:
        await execute(
            dsn,
            "CREATE TABLE t (id text PRIMARY KEY, body text)",
            f"INSERT INTO t SELECT '{PLANTED}' || n, '{PLANTED}' FROM generate_series(1, 20) n",
        )
        config = source(dsn, nats.url)
        name = config.source.name
        config = msgspec.structs.replace(config, index={name: Index(table="public.t", url=[osmem.url], alias=name)})
        config = with_token(config)
        of_index = f"127.0.0.1:{free_port()}"
        async with (
            bridge(config),
            anyio.create_task_group() as tasks,
            serving(config, tmp_path_factory.mktemp("bridge")) as url,
            web.bound(of_index, "index_http") as sockets,
            web.beside_indexes(config, list(config.stream.servers), sockets, [name]),
        ):
            await settled(config)
            tasks.start_soon(run_index, config, [name], list(config.stream.servers))
            found = World(config, url, f"http://{of_index}")
            for one in (found.url, found.index_url):
                await until(partial(answers, f"{one}/readyz", 200), 60, f"{one} is ready")
            yield found
            tasks.cancel_scope.cancel()


async def answers(url: str, status: int) -> bool:
    return (await asked(url)).status == status


# ---- health, readiness, metrics


async def test_ready_is_what_is_in_step_within_a_bound(world: World) -> None:
    assert (await asked(f"{world.url}/healthz")).text == "ok\n"
    assert (await asked(f"{world.url}/readyz?within=5m")).text == "in step within 5 min\n"
    found = await asked(f"{world.url}/readyz", headers={"Accept": "application/json"})
    assert json.loads(found.text) == {"ready": True, "within_seconds": 30.0, "reasons": []}
    wrong = await asked(f"{world.url}/readyz?within=soon")
    assert (wrong.status, "is not a duration" in wrong.text) == (400, True)
    assert (await asked(f"{world.url}/readyz", "HEAD")).text == ""


async def test_without_a_bridge_it_is_alive_and_not_ready(pg_db: str, nats: NatsServer) -> None:
    async with serving(at_free_port(source(pg_db, nats.url))) as url:
        await until(partial(looked, url), 30, "the first look")
        assert (await asked(f"{url}/healthz")).status == 200
        found = await asked(f"{url}/readyz")
        assert found.status == 503
        assert "no bridge is running" in found.text


async def test_a_state_that_cannot_be_read_is_a_reason(pg_db: str, nats: NatsServer) -> None:
    config = at_free_port(source(pg_db, nats.url))
    async with state_of(config) as state:
        await state.put(subjects.checkpoint_key(config.source.name), "no checkpoint")
        async with serving(config) as url:
            await until(partial(looked, url), 30, "the first look")
            found = await asked(f"{url}/readyz")
            assert (found.status, "no bridge has written" in found.text) == (503, True)


async def test_a_defect_of_an_onlooker_does_not_end_the_bridge(capsys: pytest.CaptureFixture[str]) -> None:
    tries = []

    async def run() -> None:
        tries.append(PLANTED)
        if len(tries) < 3:
            raise ValueError(PLANTED)
        tasks.cancel_scope.cancel()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        await lasting("looking", "nothing is looked at", run, pause=0.0)
    text = "".join(capsys.readouterr())
    assert text.count("unexpected ValueError in test_http.py") == 1
    assert PLANTED not in text


async def looked(url: str) -> bool:
    return "bridge_looks_total" in (await asked(f"{url}/metrics")).text


async def test_the_metrics_have_every_figure_under_names_with_units(world: World) -> None:
    [name] = world.config.index
    # Each row is a batch of its own: only what was committed while the reader follows is counted as its delay.
    for number in range(3):
        await execute(str(world.config.source.dsn), f"INSERT INTO t VALUES ('{number}', '{PLANTED}')")

    async def counted() -> bool:
        return samples(await asked(f"{world.index_url}/metrics"))["bridge_commit_to_index_seconds_count"] >= 1

    await until(counted, 30, "the index' delay is counted")
    for url, some in (
        (world.url, {
            "bridge_ready": 1, "bridge_in_step": 1, "bridge_slot_active": 1, "bridge_epoch": 1,
            "bridge_index_reader_up": 1, "bridge_index_dead_letters": 0, "bridge_tables_without_metrics": 0,
        }),
        (world.index_url, {"bridge_ready": 1, "bridge_index_consumer_up": 1}),
    ):  # fmt: skip
        found = await asked(f"{url}/metrics")
        assert found.headers["Content-Type"] == web.METRICS_TYPE
        assert PLANTED not in found.text
        families = list(text_string_to_metric_families(found.text))
        values = samples(found)
        assert {key: values[key] for key in some} == some
        for family in families:
            assert re.fullmatch(r"(bridge|process)_[a-z0-9_]+", family.name), family.name
            assert family.documentation, family.name
            assert not re.search(r"(_ms|_kb|_mb|_milliseconds|_minutes)$", family.name), family.name
        assert len({family.name for family in families}) == len(families)
    labels = [one.labels for one in families_of(await asked(f"{world.url}/metrics"), "bridge_index_behind_events")]
    assert labels == [{"index": name, "physical": f"{name}-000001", "state": "live"}]
    assert samples(await asked(f"{world.url}/metrics"))["bridge_commit_to_ack_seconds_count"] >= 3


def samples(found: Answered) -> dict[str, float]:
    """The last value of each sample's name."""
    return {one.name: one.value for family in text_string_to_metric_families(found.text) for one in family.samples}


def families_of(found: Answered, name: str) -> list[Any]:
    return [one for family in text_string_to_metric_families(found.text) for one in family.samples if one.name == name]


# ---- who is answered


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("LOCALHOST:{port}", 200),
        ("[::1]:{port}", 200),
        ("10.1.2.3", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:{port}", 421),
        ("localhost.evil.example", 421),
        ("localhost@evil.example", 421),
        ("", 421),
    ],
)
async def test_only_who_calls_this_host_by_its_own_name_is_answered(world: World, host: str, status: int) -> None:
    for path in ("/", "/metrics", "/readyz"):
        found = await asked(world.url + path, headers={"Host": host.format(port=world.port)})
        assert found.status == status


async def test_every_answer_has_the_headers_that_keep_browsers_strict(world: World) -> None:
    for path, status in (("/", 200), ("/page.js", 200), ("/metrics", 200), ("/nothing", 404), ("/actions", 405)):
        found = await asked(world.url + path)
        assert found.status == status
        assert {name: found.headers[name] for name in HEADERS} == HEADERS
        assert "unsafe" not in found.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml", "/page.css/../../site.py", "/%2e%2e/site.py", "/..%2fsite.py", "//etc/passwd", "/page",
        "/page/index.html", "/index.html", "/\\..\\site.py", "/page.css%00", "*", "http://127.0.0.1/../site.py",
    ],
)  # fmt: skip
async def test_no_path_leads_to_a_file(world: World, path: str) -> None:
    answer = await raw(world.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"404", b"400"), answer[:200]
    assert b"def " not in answer


# ---- who may act


async def test_without_a_token_nothing_can_be_changed(pg_db: str, nats: NatsServer) -> None:
    async with serving(at_free_port(source(pg_db, nats.url))) as url:
        for path in ("/actions", "/unlock"):
            found = await asked(url + path, "POST", json={"do": "snapshot", "name": "public.t"})
            assert (found.status, "read-only" in found.text) == (403, True)


@pytest.mark.parametrize(
    ("headers", "body", "status", "says"),
    [
        ({}, '{"do": "reindex", "name": "x"}', 401, "missing or wrong"),
        ({"Authorization": "Bearer wrong"}, '{"do": "reindex", "name": "x"}', 401, "missing or wrong"),
        ({"Authorization": f"Basic {TOKEN}"}, '{"do": "reindex", "name": "x"}', 401, "missing or wrong"),
        ({"Origin": "http://evil.example"}, '{"do": "reindex", "name": "x"}', 403, "another page"),
        ({"Origin": "null"}, '{"do": "reindex", "name": "x"}', 403, "another page"),
        ({"Sec-Fetch-Site": "cross-site"}, '{"do": "reindex", "name": "x"}', 403, "another page"),
        ({"Content-Type": "text/plain"}, '{"do": "reindex", "name": "x"}', 415, "send JSON"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "do=reindex", 415, "send JSON"),
        ({}, '{"do": "drop", "name": "x"}', 400, "is not what is asked for"),
        ({}, '{"do": "reindex", "name": "x", "back": true}', 400, "is not what is asked for"),
        ({}, '{"do": "reindex"', 400, "is not what is asked for"),
        ({}, "x" * 20_000, 413, "at most"),
        ({}, '{"do": "reindex", "name": "nosuch"}', 409, "no index nosuch"),
        ({}, '{"do": "cancel-reindex", "name": "nosuch"}', 409, "does not rebuild nosuch"),
        ({}, '{"do": "snapshot", "name": "public.nosuch"}', 409, "no published table is called public.nosuch"),
        ({}, '{"do": "snapshot", "name": "public.*"}', 400, "name one table"),
        ({}, '{"do": "cancel-snapshot", "name": "public.t"}', 409, "is not being read"),
    ],
)
async def test_an_action_needs_the_token_this_page_and_sense(
    world: World, headers: dict[str, str], body: str, status: int, says: str
) -> None:
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers}
    if says == "missing or wrong" and not headers:
        del given["Authorization"]
    found = await asked(f"{world.url}/actions", "POST", data=body, headers=given)
    assert (found.status, says in found.text) == (status, True), found


async def test_with_the_token_a_table_is_asked_for(world: World) -> None:
    found = await asked(
        f"{world.url}/actions", "POST", json={"do": "snapshot", "name": "public.t"},
        headers={"Authorization": f"Bearer {TOKEN}", "Origin": world.url, "Sec-Fetch-Site": "same-origin"},
    )  # fmt: skip
    assert (found.status, json.loads(found.text)) == (202, {"said": "public.t: asked for"})


async def event(url: str, name: str) -> Any:
    """The next event of that name from the page's stream."""
    port, got = int(url.rpartition(":")[2]), b""
    with anyio.fail_after(20):
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while (found := re.search(rb"event: %b\ndata: (.*)\n\n" % name.encode(), got)) is None:
                got += await stream.receive()
    assert PLANTED.encode() not in got
    return json.loads(found[1])


async def test_the_stream_of_events_has_no_value_and_no_key(world: World) -> None:
    state = await event(world.url, "state")
    assert state["source"] == world.config.source.name
    assert state["actions"]
    assert {one["name"] for one in await event(world.url, "tables")} == {"public.mark", "public.t"}
    recent = await event(world.url, "recent")
    assert recent[0].keys() == {"seq", "subject", "op", "lsn", "at"}
    assert [one["seq"] for one in recent] == sorted((one["seq"] for one in recent), reverse=True)


def children(word: str) -> list[psutil.Process]:
    """This process's children with a word in their command line."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [one] if word in one.cmdline() else []
    return found


def stopped(word: str) -> bool:
    return [one.status() for one in children(word)] == [psutil.STATUS_STOPPED]


async def act(url: str, do: str, name: str) -> int:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return (await asked(f"{url}/actions", "POST", json={"do": do, "name": name}, headers=headers)).status


async def test_a_rebuild_that_the_page_began_can_be_cancelled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    [name] = world.config.index
    monkeypatch.setenv(VARIABLE, "index.opened:stop")
    assert await act(world.url, "reindex", name) == 202
    await until(lambda: stopped("reindex"), 60, "the rebuild has come to where it is held")
    assert await act(world.url, "reindex", name) == 409

    async def told() -> bool:
        return [job["state"] for job in (await event(world.url, "state"))["jobs"]] == ["running"]

    await until(told, 10, "the page has heard of it")
    assert await act(world.url, "cancel-reindex", name) == 202
    [rebuild] = children("reindex")
    rebuild.send_signal(signal.SIGCONT)

    async def cancelled() -> bool:
        state = await event(world.url, "state")
        [index] = state["indexes"]
        return state["jobs"][-1]["state"] == "cancelled" and len(index["generations"]) == 1

    await until(cancelled, 30, "the rebuild is cancelled, and what it had built removed")


async def test_no_rebuild_outlives_the_bridge(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [name] = world.config.index
    monkeypatch.setenv(VARIABLE, "index.leased:stop")
    monkeypatch.setattr(rebuilds, "ENDS_WITHIN", 0.2)
    config = msgspec.structs.replace(world.config, operate=with_token(world.config).operate)
    async with serving(config, tmp_path) as url:
        assert await act(url, "reindex", name) == 202
        await until(lambda: stopped("reindex"), 60, "the rebuild has come to where it is held")
    assert children("reindex") == []


# ---- who means harm


async def raw(port: int, *parts: bytes, seconds: float = 20) -> bytes:
    """What a client that sends these bytes gets until the connection is closed."""
    answer = b""
    with anyio.fail_after(seconds):
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            try:
                for part in parts:
                    await stream.send(part)
                while True:
                    answer += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return answer


GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = (
    b"POST /actions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer "
    + TOKEN.encode()
)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"400"),
        (b"NONSENSE\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nbroken header\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n", b"400"),
        (POST + b"\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (POST + b"\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"400"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 500 + b"\r\n", b"400"),
        (POST + b"\r\nContent-Length: 100000000\r\n\r\n", b"413"),
        (POST + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b"x" * 0x8000 + b"\r\n", b"413"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
        (b"GET /events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"200"),
        (GET * 200, b"200"),
    ],
)  # fmt: skip
async def test_what_is_malformed_or_huge_is_refused_and_harms_nothing(world: World, sent: bytes, status: bytes) -> None:
    if status == b"200":
        async with await anyio.connect_tcp("127.0.0.1", world.port) as stream:
            await stream.send(sent)
            answer = await stream.receive()
    else:
        answer = await raw(world.port, sent)
    assert answer.split(b" ")[1] == status, answer[:300]
    assert (await asked(f"{world.url}/healthz")).status == 200


async def test_one_request_a_connection_is_answered(world: World) -> None:
    assert (await raw(world.port, GET * 3)).count(b"HTTP/1.1 200") == 1


async def test_bytes_without_end_are_cut_off(world: World) -> None:
    got = await raw(world.port, b"GET / HTTP/1.1\r\nHost: localhost\r\n", *[b"X: " + b"a" * 4000 + b"\r\n"] * 60)
    assert got == b"" or got.split(b" ")[1] in (b"400", b"413")


async def test_who_is_slow_is_let_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "ASK_SECONDS", 0.5)
    monkeypatch.setattr(site, "BODY_SECONDS", 0.5)
    # Nothing, half a header, and a header that never ends: each is closed by the bridge.
    assert await raw(world.port) == b""
    assert await raw(world.port, GET[:-2]) == b""
    late = await raw(world.port, POST + b"\r\nContent-Length: 30\r\n\r\n", b'{"do"')
    assert late.split(b" ")[1] == b"408"


async def test_however_many_connect_the_next_one_is_answered(world: World) -> None:
    idle: list[anyio.abc.SocketStream] = []
    try:
        for _ in range(3 * door.CONNECTIONS):
            idle.append(await anyio.connect_tcp("127.0.0.1", world.port))
            await idle[-1].send(b"GET /healthz HTTP/1.1\r\n")
        assert (await asked(f"{world.url}/healthz")).status == 200
        assert (await asked(f"{world.url}/readyz")).status == 200
    finally:
        for one in idle:
            await one.aclose()


async def test_where_all_places_are_taken_who_comes_is_told_to_come_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "WATCHERS", door.CONNECTIONS)
    there: list[anyio.abc.SocketStream] = []
    try:
        for _ in range(door.CONNECTIONS):
            there.append(await anyio.connect_tcp("127.0.0.1", world.port))
            await there[-1].send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await heard(there[-1], b"event: history")
        assert (await raw(world.port)).split(b" ")[1] == b"503"
    finally:
        for one in there:
            await one.aclose()
    await until(partial(answers, f"{world.url}/healthz", 200), 10, "there is room again")


async def heard(stream: anyio.abc.SocketStream, what: bytes) -> None:
    """Waits for these bytes."""
    got = b""
    with anyio.fail_after(20):
        while what not in got:
            got += await stream.receive()


async def narrow(port: int) -> anyio.abc.SocketStream:
    """A connection on which little waits for who takes nothing."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.connect(("127.0.0.1", port))
    return await anyio.abc.SocketStream.from_socket(made)


async def test_so_many_may_watch_and_who_takes_nothing_is_let_go(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "TAKES_WITHIN", 0.5)
    monkeypatch.setattr(streams, "WATCHERS", 3)
    # Looks so fast that what is sent soon fills what stands between the bridge and a watcher.
    monkeypatch.setattr(live, "EVERY", 0.005)
    monkeypatch.setattr(door, "SEND_BUFFER", 4096)
    config = at_free_port(source(pg_db, nats.url))
    async with serving(config) as url:
        port = int(url.rpartition(":")[2])
        request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
        watching = [await narrow(port) for _ in range(3)]
        for one in watching:
            await one.send(request)
            await heard(one, b"event: history")
        refused = await raw(port, request)
        assert refused.split(b" ")[1] == b"503"

        async def free() -> bool:
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(request)
                return (await stream.receive()).split(b" ")[1] == b"200"

        # None of the three takes anything.
        await until(free, 60, "a place is free again")
        for one in watching:
            await one.aclose()


# ---- where it listens


async def test_a_configured_port_that_is_in_use_is_an_error_at_the_start(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = at_free_port(source(pg_db, nats.url))
    host, _, port = config.operate.http.rpartition(":")
    with socket.create_server((host, int(port))):
        done = await command("run", config, tmp_path)
    assert done.code == 4
    assert f"{config.operate.http} ([operate] http) is in use by another process" in done.err
    assert "→" in done.err


async def test_a_reader_serves_where_it_is_told_to_or_does_not_start(world: World, tmp_path: Path) -> None:
    config = msgspec.structs.replace(world.config, operate=Operate(http="", index_http=f"127.0.0.1:{free_port()}"))
    arguments = ["-m", "bridge", "--config", str(written(config, tmp_path)), "index"]
    url = f"http://{config.operate.index_http}"
    async with await anyio.open_process([sys.executable, *arguments], stderr=subprocess.DEVNULL) as reader:
        # Another one feeds the index: this one stands by, and speaks of what it would feed.
        await until(partial(reachable, f"{url}/healthz"), 60, "it serves")
        await until(partial(answers, f"{url}/readyz", 200), 30, "it is ready")
        assert (await asked(url)).status == 404
        second = await anyio.run_process([sys.executable, *arguments], check=False)
        assert second.returncode == 4
        assert b"([operate] index_http) is in use by another process" in second.stderr
        reader.terminate()
        assert await reader.wait() == 0


@pytest.mark.parametrize("address", ["192.0.2.1:9300", "no-such-host.invalid:9300"])
async def test_an_address_that_is_not_this_machines_is_an_error(address: str) -> None:
    with pytest.raises(ServerRefused, match=re.escape(address)):
        async with web.bound(address, "http"):
            pass


async def test_the_default_port_is_taken_as_soon_as_it_is_free(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(web, "DEFAULT", address)
    monkeypatch.setattr(web, "FREE_EVERY", 0.05)
    config = msgspec.structs.replace(source(pg_db, nats.url), operate=Operate())
    host, _, port = address.rpartition(":")
    out: list[str] = []

    def said() -> bool:
        out.extend(capsys.readouterr())
        return "no page yet" in "".join(out)

    with socket.create_server((host, int(port))) as other:
        async with serving(config):
            await until(said, 10, "it is said")
            assert "Elasticsearch and OpenSearch use, too; [operate] http sets another" in "".join(out)
            other.close()
            await until(partial(reachable, f"http://{address}/healthz"), 10, "it is served")


async def reachable(url: str) -> bool:
    try:
        return (await asked(url)).status == 200
    except OSError:
        return False


async def test_the_bridge_serves_and_stops_however_many_watch(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = at_free_port(source(pg_db, nats.url))
    port = int(config.operate.http.rpartition(":")[2])
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await process.said("serving")
        await process.said("streaming ")
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await heard(stream, b"event: history")
            assert await process.end() == 0
    finally:
        process.close()
