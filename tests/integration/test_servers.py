"""The servers and tools that only the tests use."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anyio
import nats as nats_client
import psycopg
import pytest

from bridge.embedded import NatsServer, Postgres, until
from bridge.embedded.process import alive, children
from bridge.embedded.search import http_get
from tests.parents import gone, parent
from tests.servers import Elasticsearch, OpenSearch, fetched

pytestmark = pytest.mark.anyio

ONE_NODE = """
from tests.servers import OpenSearch
async with OpenSearch.throwaway() as node:
    report = {"pid": node.pid, "keeper": node.keeper_pid, "folder": str(node.home)}
    print(json.dumps(report), flush=True)
    await anyio.sleep_forever()
"""


async def test_opensearch_is_a_real_node_of_the_pinned_version(opensearch: OpenSearch) -> None:
    status, body = await http_get(opensearch.host, opensearch.port, "/")
    assert status == 200
    assert json.loads(body)["version"]["number"] == "2.19.1"
    status, body = await http_get(opensearch.host, opensearch.port, "/_nodes/_local/plugins")
    [node] = json.loads(body)["nodes"].values()
    assert "ingest" in node["roles"]


@pytest.mark.engine
async def test_opensearch_is_gone_after_its_parent_was_killed() -> None:
    fetched("opensearch")
    with parent(ONE_NODE) as (process, node):
        assert alive(node["pid"])
        process.kill()
        process.wait()
        await gone([node["pid"], node["keeper"]])
    await until(lambda: not os.path.exists(node["folder"]), 5, "its folder is gone")


async def test_the_nats_command_talks_to_our_server(natscli: Path, own_nats: NatsServer) -> None:
    client = await nats_client.connect(own_nats.url)
    await client.jetstream().add_stream(name="seen", subjects=["seen"])
    await client.close()
    command = [natscli, "--server", own_nats.url, "stream", "ls", "--names", "--json"]
    done = await anyio.run_process([str(word) for word in command], stdin=subprocess.DEVNULL)
    assert json.loads(done.stdout) == ["seen"]


async def test_every_test_has_a_database_of_its_own(pg: Postgres, pg_db: str) -> None:
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as connection:
        [tables] = await (
            await connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        ).fetchone() or [None]
        assert tables == 0
        # Left behind on purpose: the fixture drops the database all the same.
        await connection.execute("SELECT pg_create_logical_replication_slot('left_behind', 'wal2json')")
    assert pg.running


async def test_what_a_test_left_behind_is_gone(pg: Postgres, pg_db: str) -> None:
    async with await psycopg.AsyncConnection.connect(pg.dsn()) as connection:
        slots = await connection.execute("SELECT count(*) FROM pg_replication_slots WHERE database LIKE 'test\\_%'")
        databases = await connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'test\\_%'")
        assert await slots.fetchone() == (0,)
        assert await databases.fetchall() == [(psycopg.conninfo.conninfo_to_dict(pg_db)["dbname"],)]


@pytest.mark.engine
async def test_elasticsearch_is_a_real_node_and_gone_after_its_parent_was_killed(
    elasticsearch: Elasticsearch,
) -> None:
    status, body = await http_get(elasticsearch.host, elasticsearch.port, "/_nodes/_local/http")
    [node] = json.loads(body)["nodes"].values()
    assert (status, node["version"]) == (200, "8.19.21")
    with parent(ONE_NODE.replace("OpenSearch", "Elasticsearch")) as (process, found):
        nodes = children(found["pid"])
        assert nodes
        process.kill()
        process.wait()
        await gone([found["pid"], found["keeper"], *nodes])
    await until(lambda: not os.path.exists(found["folder"]), 5, "its folder is gone")
