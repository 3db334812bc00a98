"""The page in a real browser, before real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import msgspec
import pytest

from bridge.config import Config, Index
from bridge.embedded import NatsServer, SearchEngine
from bridge.index.indexer import run_index
from tests.browser import Browser, Page, chromium
from tests.running import bridge, execute, settled, source
from tests.serving import TOKEN, serving, with_token

pytestmark = pytest.mark.anyio

READY = "document.querySelector('#verdict').textContent === '✓ in step'"


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
async def config(pg_db: str, own_nats: NatsServer, osmem: SearchEngine) -> Config:
    await execute(
        pg_db,
        "CREATE TABLE messages (id int PRIMARY KEY, body text)",
        "INSERT INTO messages SELECT n, 'planted-secret-value ' || n FROM generate_series(1, 50) n",
        *(f"CREATE TABLE other_{n} (id int PRIMARY KEY)" for n in range(12)),
    )
    made = source(pg_db, own_nats.url)
    index = Index(table="public.messages", url=[osmem.url], alias=made.source.name)
    return with_token(msgspec.structs.replace(made, index={made.source.name: index}))


async def test_the_page_shows_all_of_it(config: Config, browser: Browser, tmp_path: Path) -> None:
    async with (
        bridge(config),
        anyio.create_task_group() as tasks,
        serving(config, tmp_path) as url,
        browser.page() as page,
    ):
        tasks.start_soon(run_index, config, list(config.index), config.stream.servers)
        await settled(config)
        await page.open(url)
        await page.until(READY, 30)
        await page.until("document.querySelector('#tables').innerText.includes('public.other_3')")
        await page.until("document.querySelector('#recent').innerText.includes('public.mark')")
        for name in ("light", "dark"):
            await page.scheme(name)
            for width in (360, 1280):
                await page.width(width, 1800 if width > 500 else 2600)
                Path(f"/tmp/web-shot-{name}-{width}.png").write_bytes(await page.picture())
        print(page.complaints)
        tasks.cancel_scope.cancel()
