"""`reindex` of a table that is not recorded: what can still come is waited for, and what cannot is said at once."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, free_port
from tests.integration.test_cli import call
from tests.running import Process, bridge, execute, source, streaming, toml

pytestmark = pytest.mark.anyio


def configured(folder: Path, config: Config, *tables: str) -> None:
    """A configuration with an index of these tables; its engine is not needed, and not there."""
    index = f'[index.x]\ntables = {json.dumps(tables)}\nurl = ["http://127.0.0.1:{free_port()}"]\n'
    (folder / "bridge.toml").write_text(f"{toml(config)}{index}")


@pytest.mark.parametrize("options", [[], ["--until", "1"], ["--dry-run"]])
async def test_a_reindex_of_a_table_that_never_comes_is_refused_at_once(
    pg_db: str, nats: NatsServer, tmp_path: Path, options: list[str]
) -> None:
    await execute(pg_db, "CREATE TABLE posts (id int PRIMARY KEY)", "CREATE TABLE secrets (id int PRIMARY KEY)")
    config = source(pg_db, nats.url, tables=["public.*", "!public.secrets"])
    async with bridge(config):
        await streaming(config)
        for table, said in {
            "public.post": "public.post is not published (is it public.posts?): there is no such table",
            "public.secrets": "public.secrets is not published",
        }.items():
            configured(tmp_path, config, "public.posts", table)
            done = await call(tmp_path, "reindex", "x", *options)
            assert done.returncode == 2, done.stderr
            assert f"index x cannot be built: {said}" in done.stderr.decode()
            assert "correct `tables` of [index.x]" in done.stderr.decode()


async def test_without_postgresql_the_configuration_tells_what_never_comes(nats: NatsServer, tmp_path: Path) -> None:
    config = source(f"host=127.0.0.1 port={free_port()} dbname=none", nats.url, tables=["public.*"])
    configured(tmp_path, config, "other.posts")
    done = await call(tmp_path, "reindex", "x")
    assert done.returncode == 2, done.stderr
    assert "index x cannot be built: other.posts is not published" in done.stderr.decode()
    assert "add it to [source] tables" in done.stderr.decode()


@pytest.mark.parametrize("reachable", [True, False])
async def test_a_published_table_that_no_bridge_has_recorded_yet_is_waited_for(
    pg_db: str, nats: NatsServer, tmp_path: Path, reachable: bool
) -> None:
    await execute(pg_db, "CREATE TABLE posts (id int PRIMARY KEY)")
    config = source(pg_db if reachable else f"host=127.0.0.1 port={free_port()} dbname=none", nats.url)
    configured(tmp_path, config, "public.posts")
    process = Process(tmp_path, (tmp_path / "bridge.toml").read_text())
    process.start("reindex", "x")
    try:
        await process.said("waiting for the bridge to make it")
        assert await process.end(signal.SIGINT) == 130
    finally:
        process.close()
