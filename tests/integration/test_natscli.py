"""What the README shows with the `nats` command line tool, asked of a running bridge and index."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import psycopg
import pytest

from bridge.embedded import NatsServer, SearchEngine
from tests.running import Process

pytestmark = pytest.mark.anyio


async def ask(natscli: Path, url: str, *arguments: str) -> str:
    with anyio.fail_after(20):
        answer = await anyio.run_process([str(natscli), "--server", url, *arguments])
    return answer.stdout.decode()


async def test_the_nats_cli_shows_stream_state_and_consumer(
    pg_db: str, own_nats: NatsServer, osmem: SearchEngine, natscli: Path, tmp_path: Path
) -> None:
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as sql:
        await sql.execute("CREATE TABLE messages (id int PRIMARY KEY, body text)")
        await sql.execute("INSERT INTO messages SELECT n, 'text ' || n FROM generate_series(1, 5) n")
    settings = (
        f'[source]\ndsn = "{pg_db}"\nslot = "bridge_natscli"\n[stream]\nservers = "{own_nats.url}"\nsync = "always"\n'
        f'[index.natscli]\ntable = "public.messages"\nurl = "{osmem.url}"\n'
    )
    for name in ("bridge", "index"):
        (tmp_path / name).mkdir()
    bridge, index = (Process(tmp_path / name, settings) for name in ("bridge", "index"))
    bridge.start()
    await bridge.said("streaming")
    index.start("index", "natscli")
    await index.said("following")

    streams = json.loads(await ask(natscli, own_nats.url, "stream", "ls", "--json"))
    assert "cdc_main" in streams
    subjects = json.loads(await ask(natscli, own_nats.url, "stream", "subjects", "cdc_main", "--json"))
    assert subjects == {"cdc.main.public.messages": 7}
    keys = set((await ask(natscli, own_nats.url, "kv", "ls", "bridge")).split())
    assert keys >= {"checkpoint.main", "epochs.main", "index.main.natscli", "snapshot.main.public.messages",
                    "table.main.public.messages"}  # fmt: skip
    checkpoint = json.loads(await ask(natscli, own_nats.url, "kv", "get", "bridge", "checkpoint.main", "--raw"))
    assert (checkpoint["phase"], checkpoint["stream_seq"]) == ("stream", 7)
    snapshot = json.loads(
        await ask(natscli, own_nats.url, "kv", "get", "bridge", "snapshot.main.public.messages", "--raw")
    )
    assert (snapshot["state"], snapshot["rows"], snapshot["first_seq"], snapshot["last_seq"]) == ("done", 5, 1, 7)
    record = json.loads(await ask(natscli, own_nats.url, "kv", "get", "bridge", "index.main.natscli", "--raw"))
    consumer = json.loads(
        await ask(natscli, own_nats.url, "consumer", "info", "cdc_main", record["consumer"], "--json")
    )
    assert consumer["config"]["ack_policy"] == "all"
    assert consumer["ack_floor"]["stream_seq"] == 7

    assert await index.end() == 0
    assert await bridge.end() == 0
