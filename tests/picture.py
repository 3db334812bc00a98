"""The picture of the page in docs/page.png: `python -m tests.picture docs/page.png`.

A bridge named main with an index of messages, on throwaway servers, some seconds of writes, then Chromium. Needs what
`scripts/setup --tests` installs.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import anyio

from bridge import log
from bridge.config import Config, Index, Secret, Source, State, Stream
from bridge.embedded import NatsServer, Postgres, SearchEngine
from bridge.index.indexer import run_index
from tests.browser import chromium
from tests.databases import database
from tests.running import bridge, execute, settled
from tests.serving import at_free_port, serving

WIDTH, HEIGHT = 1040, 900
LARGEST = 150_000
TABLES = ("messages", "people", "lists", "subscriptions", "attachments", "moderation", "sessions")


async def picture(seconds: int) -> bytes:
    """The page as PNG, after so many seconds of writes."""
    taken = b""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            Postgres.throwaway(fsync=False) as pg,
            NatsServer.throwaway() as nats,
            SearchEngine.throwaway() as engine,
            database(pg) as dsn,
            chromium(Path(folder)) as browser,
        ):
            config = await _prepared(dsn, nats.url, engine.url)
            async with (
                bridge(config),
                anyio.create_task_group() as tasks,
                serving(config) as url,
                browser.page() as page,
            ):
                await settled(config)
                tasks.start_soon(run_index, config, ["messages"], [nats.url])
                await page.width(WIDTH, HEIGHT)
                await page.scheme("light")
                await page.open(url)
                await page.until("document.querySelector('#verdict').textContent === '✓ in step'", 60)
                await _writes(dsn, seconds)
                await page.until("document.querySelector('#verdict').textContent === '✓ in step'", 60)
                taken = await page.picture()
                tasks.cancel_scope.cancel()
    return taken


async def _prepared(dsn: str, nats: str, engine: str) -> Config:
    for name in TABLES:
        rows = random.Random(name).randint(20, 3000)
        await execute(
            dsn,
            f"CREATE TABLE {name} (id int PRIMARY KEY, body text)",
            f"INSERT INTO {name} SELECT n, 'text ' || n FROM generate_series(1, {rows}) n",
        )
    return at_free_port(
        Config(
            source=Source(name="main", dsn=Secret(dsn), slot="bridge_main"),
            stream=Stream(servers=[nats], name="cdc_main", sync="always"),
            state=State(bucket="bridge"),
            index={"messages": Index(table="public.messages", url=[engine], alias="messages")},
        )
    )


async def _writes(dsn: str, seconds: int) -> None:
    chance = random.Random(1)
    with anyio.move_on_after(seconds):
        while True:
            name, rows = chance.choice(TABLES[:3]), chance.randint(1, 40)
            await execute(dsn, f"UPDATE {name} SET body = 'changed' WHERE id BETWEEN {rows} AND {2 * rows}")
            await anyio.sleep(chance.uniform(0.05, 0.6))


def main() -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("file", type=Path)
    options.add_argument("--seconds", type=int, default=120, help="of writes, which the charts show")
    chosen = options.parse_args()
    log.configure()
    taken = anyio.run(picture, chosen.seconds, backend_options={"use_uvloop": True})
    assert len(taken) <= LARGEST, f"{len(taken):,} bytes are too many for a picture in the repository"
    chosen.file.write_bytes(taken)


if __name__ == "__main__":
    main()
