"""Child servers are gone with their parent, keep their port and data, and belong to one bridge only."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import anyio
import nats as nats_client
import psycopg
import pytest
from anyio.abc import SocketStream
from structlog.testing import capture_logs

from bridge.embedded import NatsServer, Postgres, SearchEngine, find, free_port, supervised, until
from bridge.embedded.nats import shipped_config
from bridge.embedded.neighbour import who
from bridge.embedded.process import alive
from bridge.embedded.search import http_get
from bridge.errors import ServerRefused
from tests.parents import gone, parent

pytestmark = pytest.mark.anyio

THREE_SERVERS = """
async with (
    Postgres.throwaway(fsync=False) as pg, NatsServer.throwaway() as nats, SearchEngine.throwaway() as search
):
    servers = (pg, nats, search)
    print(json.dumps({"pids": [s.pid for s in servers], "keepers": [s.keeper_pid for s in servers],
                      "folders": [str(s.home) for s in servers]}), flush=True)
    await anyio.sleep_forever()
"""
SUPERVISED = """
async with supervised(Path(sys.argv[1])) as server:
    print(json.dumps({"pids": [server.pid], "keepers": [server.keeper_pid], "url": server.url}), flush=True)
    await anyio.sleep_forever()
"""


async def test_children_and_folders_are_gone_after_the_parent_was_killed() -> None:
    with parent(THREE_SERVERS) as (process, children):
        assert all(map(alive, children["pids"]))
        assert all(map(os.path.exists, children["folders"]))
        process.kill()
        process.wait()
        await gone(children["pids"] + children["keepers"])
    assert not any(map(os.path.exists, children["folders"]))


async def test_children_die_with_a_killed_keeper() -> None:
    with parent(THREE_SERVERS) as (_, children):
        for keeper in children["keepers"]:
            os.kill(keeper, signal.SIGKILL)
        await gone(children["pids"])
    for folder in children["folders"]:  # nobody was left to do it
        shutil.rmtree(folder)


async def test_a_stopped_child_is_ended_all_the_same() -> None:
    async with NatsServer.throwaway() as server:
        server.signal(signal.SIGSTOP)
        pid = server.pid
    assert not alive(pid)
    assert not server.home.exists()


async def test_terminal_signals_do_not_reach_the_children() -> None:
    async with NatsServer.throwaway() as server:
        assert os.getsid(server.pid) != os.getsid(0)
        assert os.getpgid(server.pid) != os.getpgid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(server.keeper_pid, number)
        await server.restart()
        assert server.running


async def test_postgres_keeps_port_and_data_over_restart_and_kill(own_pg: Postgres) -> None:
    port, dsn = own_pg.port, own_pg.dsn()
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute("CREATE TABLE kept AS SELECT 7 AS x")
        await connection.execute("SELECT pg_create_logical_replication_slot('s', 'wal2json')")
        pid = own_pg.pid
        await own_pg.kill()
    assert not alive(pid)
    await own_pg.start()
    for mode in ("fast", "immediate", "smart"):
        await own_pg.restart(mode)
    assert own_pg.port == port
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        assert await (await connection.execute("SELECT x FROM kept")).fetchone() == (7,)
        slots = await connection.execute("SELECT plugin, wal_status FROM pg_replication_slots")
        assert await slots.fetchone() == ("wal2json", "reserved")


async def test_postgres_settings_reach_the_server() -> None:
    async with (
        Postgres.throwaway(fsync=False, settings={"application_name": "it's", "wal_sender_timeout": "7s"}) as server,
        await psycopg.AsyncConnection.connect(server.dsn()) as connection,
    ):
        query = "SELECT current_setting('application_name'), current_setting('wal_sender_timeout')"
        assert await (await connection.execute(query)).fetchone() == ("it's", "7s")


async def test_a_setting_that_postgres_refuses_is_named_in_the_error() -> None:
    with pytest.raises(ServerRefused, match="no_such_setting"):
        async with Postgres.throwaway(fsync=False, settings={"no_such_setting": "1"}):
            pass


async def test_nats_server_keeps_port_and_messages_over_a_kill(own_nats: NatsServer) -> None:
    url = own_nats.url
    client = await nats_client.connect(url)
    assert client.max_payload == 8 * 1024 * 1024
    await client.jetstream().add_stream(name="kept", subjects=["kept"])
    await client.jetstream().publish("kept", b"x")
    await client.close()
    await own_nats.kill()
    assert not own_nats.running
    await own_nats.start()
    assert own_nats.url == url
    client = await nats_client.connect(url)
    assert (await client.jetstream().stream_info("kept")).state.messages == 1
    await client.close()


async def test_a_taken_port_is_an_error_when_it_was_asked_for(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerRefused, match=str(port)):
            async with NatsServer.throwaway(port=port):
                pass
        with pytest.raises(ServerRefused, match=f"port {port}"):
            async with supervised(tmp_path, port=port):
                pass


async def test_a_port_that_is_taken_just_before_the_server_binds_it_is_no_error_when_nobody_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("bridge.embedded.nats._choose_port", lambda *_: port)
        async with supervised(tmp_path) as server:
            assert server.url != f"nats://127.0.0.1:{port}"
            assert answers(server.url)


async def test_who_looks_at_the_usual_port_is_told_where_the_server_is_and_whom_he_meets(
    tmp_path: Path, own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.embedded.nats.DEFAULT_PORT", own_nats.port)
    usual = rf"127\.0\.0\.1:{own_nats.port} by another nats-server bridge \d+\.\d+\.\d+"
    for _ in range(2):  # the second one has the first one's port, and the usual one is somebody else's still
        with capture_logs() as said:
            async with supervised(tmp_path) as server:
                [warning] = [line for line in said if line["event"] == "nats-server elsewhere"]
        assert warning["log_level"] == "warning"
        assert warning["url"] == server.url != own_nats.url
        assert re.fullmatch(usual, warning["taken"]), warning
        assert f"export NATS_URL={server.url}" in warning["next"]
    await own_nats.kill()
    with capture_logs() as said:
        async with supervised(tmp_path):
            assert not [line for line in said if line["log_level"] == "warning"]


@pytest.mark.parametrize("says", [b"", b"220 mail.example ESMTP\r\n", b"INFO {broken\n", b"INFO [1]\n"])
async def test_a_neighbour_that_is_no_nats_server_or_says_nothing_is_another_process(says: bytes) -> None:
    async def greet(stream: SocketStream) -> None:
        async with stream:
            await stream.send(says)
            await anyio.sleep_forever()

    port = free_port()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, greet)
        assert await who(port) == "another process"
        tasks.cancel_scope.cancel()


async def test_a_supervised_server_that_is_killed_comes_back_on_its_port_with_its_messages(tmp_path: Path) -> None:
    async with supervised(tmp_path) as server:
        url, killed = server.url, server.pid
        client = await nats_client.connect(url, reconnect_time_wait=0.05, error_cb=ignore)
        await client.jetstream().add_stream(name="kept", subjects=["kept"])
        await client.jetstream().publish("kept", b"x")
        os.kill(killed, signal.SIGKILL)
        await until(lambda: server.restarts == 1, 20, "the server is restarted")
        await until(lambda: answers(url), 20, "the server answers")
        await until(lambda: client.is_connected, 20, "the client has reconnected")
        assert server.url == url
        assert server.pid != killed
        assert (await client.jetstream().stream_info("kept")).state.messages == 1
        await client.close()
        last = server.pid
    assert not alive(last)
    assert find(tmp_path) is None


async def test_a_supervised_server_survives_the_death_of_its_keeper(tmp_path: Path) -> None:
    async with supervised(tmp_path) as server:
        url, killed = server.url, server.pid
        os.kill(server.keeper_pid, signal.SIGKILL)
        await until(lambda: server.pid not in {0, killed}, 20, "the server has another process")
        await until(lambda: answers(url), 20, "the server answers")
        assert not alive(killed)
        last = server.pid
    assert not alive(last)


async def test_an_error_beside_a_supervised_server_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ServerRefused, match="as it is"):
        async with supervised(tmp_path) as server:
            raise ServerRefused("as it is", "nothing")
    assert not alive(server.pid)


async def test_a_second_bridge_on_the_folder_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with parent(SUPERVISED, str(tmp_path)) as (process, children):
        assert find(tmp_path) == children["url"]
        with pytest.raises(ServerRefused, match=f"pid {process.pid}"):
            async with supervised(tmp_path):
                pass
        assert alive(children["pids"][0])


async def test_the_next_bridge_takes_over_folder_and_port_of_a_killed_one(tmp_path: Path) -> None:
    # A port of its own: the default one is any other server's, too.
    (tmp_path / "port").write_text(f"{free_port()}\n")
    with parent(SUPERVISED, str(tmp_path)) as (process, children):
        process.kill()
        process.wait()
        async with supervised(tmp_path) as server:
            assert not alive(children["pids"][0])
            assert server.url == children["url"] == find(tmp_path)


async def test_a_killed_bridge_leaves_no_server_on_the_folder(tmp_path: Path) -> None:
    # Not the default port, which another test's server takes as soon as it is free.
    (tmp_path / "port").write_text(str(free_port()))
    with parent(SUPERVISED, str(tmp_path)) as (process, children):
        process.kill()
        process.wait()
        await gone(children["pids"] + children["keepers"])
        assert find(tmp_path) is None
        assert not answers(children["url"])


async def test_the_embedded_server_syncs_every_message(tmp_path: Path) -> None:
    monitoring_port = free_port()
    async with supervised(tmp_path, settings={"http": f"127.0.0.1:{monitoring_port}"}):
        status, body = await http_get("127.0.0.1", monitoring_port, "/jsz")
    assert status == 200
    assert json.loads(body)["config"]["sync_always"] is True


async def test_a_configuration_in_the_folder_takes_the_place_of_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "nats-server.conf").write_text(shipped_config().read_text().replace("8MB", "16MB"))
    for _ in range(2):
        async with supervised(tmp_path) as server:
            client = await nats_client.connect(server.url)
            assert client.max_payload == 16 * 1024 * 1024
            await client.close()
            assert (tmp_path / "jetstream").exists()


async def test_a_search_engine_starts_empty() -> None:
    async with SearchEngine.throwaway() as own:
        status, body = await http_get(own.host, own.port, "/_cat/indices?format=json")
    assert (status, json.loads(body)) == (200, [])


async def ignore(_: Exception) -> None:
    """nats-py prints errors of the connection that this test cuts."""


def answers(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0
