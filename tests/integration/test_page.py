"""The page in a real browser, before real servers: what it shows, on which screens, how soon, and what it may do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
import msgspec
import pytest

from bridge.config import Config, Index
from bridge.embedded import NatsServer, Postgres, SearchEngine, until
from bridge.index.engine import opened
from bridge.index.indexer import run_index
from tests.browser import Browser, Page, chromium
from tests.databases import database
from tests.running import bridge, execute, settled, source, statuses
from tests.serving import TOKEN, serving, with_token

pytestmark = pytest.mark.anyio

IN_STEP = "document.querySelector('#verdict').textContent === '✓ in step'"
PLANTED = "planted-secret-value"
BACKGROUND = "getComputedStyle(document.documentElement).backgroundColor"
ENTER, TAB, ESCAPE = 13, 9, 27


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


async def prepared(dsn: str, nats: str, engine: str) -> Config:
    """Tables with planted values, and an index of one of them."""
    await execute(
        dsn,
        "CREATE TABLE messages (id text PRIMARY KEY, body text)",
        f"INSERT INTO messages SELECT '{PLANTED} ' || n, '{PLANTED} ' || n FROM generate_series(1, 50) n",
        *(f"CREATE TABLE other_{n} (id int PRIMARY KEY)" for n in range(12)),
    )
    made = source(dsn, nats)
    index = Index(table="public.messages", url=[engine], alias=made.source.name)
    return with_token(msgspec.structs.replace(made, index={made.source.name: index}))


@asynccontextmanager
async def served(config: Config, folder: Path) -> AsyncIterator[str]:
    """The page's url, of a bridge and an index that work."""
    async with bridge(config), anyio.create_task_group() as tasks, serving(config, folder) as url:
        await settled(config)
        tasks.start_soon(run_index, config, list(config.index), config.stream.servers)
        yield url
        tasks.cancel_scope.cancel()


class World(NamedTuple):
    """A bridge and an index that several tests share, and where their page is."""

    config: Config
    url: str


@pytest.fixture(scope="module")
async def world(
    pg: Postgres, nats: NatsServer, osmem: SearchEngine, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    async with database(pg) as dsn:
        config = await prepared(dsn, nats.url, osmem.url)
        async with served(config, tmp_path_factory.mktemp("bridge")) as url:
            yield World(config, url)


@pytest.fixture
async def page(world: World, browser: Browser) -> AsyncIterator[Page]:
    """The page, in step; at the end it must have had nothing to complain of."""
    async with browser.page() as found:
        await found.open(world.url)
        await found.until(IN_STEP, 30)
        yield found
        assert found.complaints == []


async def test_it_shows_everything_on_every_screen_and_no_value(world: World, page: Page) -> None:
    [index] = world.config.index
    await execute(str(world.config.source.dsn), f"UPDATE messages SET body = '{PLANTED} changed'")
    await page.until("document.querySelector('#recent').innerText.includes('update')")
    await page.until(f"document.querySelector('#flow').innerText.includes('{index}-000001')")
    await page.until("document.querySelectorAll('#charts svg path').length >= 15")
    await page.until("document.querySelectorAll('#tables tbody tr').length === 14")
    colors = []
    for name in ("light", "dark"):
        await page.scheme(name)
        colors.append(await page.value(BACKGROUND))
        for width in (360, 1280):
            await page.width(width)
            assert await page.value("document.documentElement.scrollWidth") <= width, (name, width)
            assert (await page.picture()).startswith(b"\x89PNG")
    assert colors[0] != colors[1]
    # From left to right on a wide screen, from top to bottom on a phone.
    nodes = "[...document.querySelectorAll('.node')].map((one) => Math.round(one.getBoundingClientRect().{}))"
    lefts = await page.value(nodes.format("left"))
    assert lefts == sorted(set(lefts))
    assert len(lefts) == 3
    await page.width(360)
    tops = await page.value(nodes.format("top"))
    assert tops == sorted(set(tops))
    assert PLANTED not in await page.value("document.documentElement.outerHTML")


async def test_a_table_is_found_by_the_keyboard_alone(page: Page) -> None:
    await page.until("document.querySelectorAll('#tables tbody tr').length === 14")
    await page.press("Tab", TAB)
    assert await page.value("document.activeElement.className") == "skip"
    await page.press("/")
    assert await page.value("document.activeElement.id") == "search"
    await page.write("other_11")
    await page.until("document.querySelectorAll('#tables tbody tr').length === 1")
    # The page is drawn anew each second: what is typed, found and focused stays.
    number = await page.value("document.querySelector('#when').textContent")
    await page.until(f"document.querySelector('#when').textContent !== {number!r}")
    assert await page.value("document.querySelector('#tables tbody').innerText.includes('public.other_11')")
    assert await page.value("document.activeElement.value") == "other_11"
    await page.write("x")
    await page.until("document.querySelector('#tables').innerText === 'no table is called so'")
    await page.press("Escape", ESCAPE)
    await page.until("document.querySelectorAll('#tables tbody tr').length === 14")


async def test_with_the_token_a_table_is_read_again_and_an_index_built_anew(world: World, page: Page) -> None:
    config, [index] = world.config, world.config.index
    assert await page.value("document.querySelectorAll('button[data-do]').length") == 0
    await page.value("document.querySelector('#unlock').focus()")
    await page.press("Enter", ENTER)
    await page.until("document.activeElement.id === 'token'")
    await page.write("a wrong one")
    await page.press("Enter", ENTER)
    await page.until("document.querySelector('#ask-wrong').innerText.includes('missing or wrong')")
    # That an answer was 401 Chromium tells its console by itself.
    assert [one for one in page.complaints if "401" not in one] == []
    page.complaints.clear()
    await page.write(TOKEN)
    await page.press("Enter", ENTER)
    await page.until("document.querySelectorAll('button[data-do]').length > 1")
    assert await page.value("[localStorage.length, document.cookie]") == [0, ""]

    before = await begun(config)
    await press(page, "snapshot", "public.messages")
    await page.until("document.querySelector('#said').innerText.includes('asked for')")

    async def read_again() -> bool:
        return await begun(config) > before

    await until(read_again, 30, "the table has been read again")

    await press(page, "reindex", index)
    await page.until("document.querySelector('#work').innerText.includes(': done')", 60)
    assert await page.value(f"document.querySelector('#flow').innerText.includes('{index}-000002')")
    await press(page, "cancel-reindex", index, there=False)


async def begun(config: Config) -> int:
    """Where the last complete picture of the table begins in the log."""
    return (await statuses(config))["messages"].complete_from


async def press(page: Page, action: str, name: str, *, there: bool = True) -> None:
    """Press one of the page's buttons, and say yes; `there`: whether it is there at all."""
    button = f'document.querySelector(\'button[data-do="{action}"][data-name="{name}"]\')'
    assert (await page.value(f"{button} !== null")) == there
    if there:
        await page.value(f"{button}.click()")
        await page.until("document.querySelector('#ask').open")
        await page.value("document.querySelector('#ask-yes').click()")
        await page.until("!document.querySelector('#ask').open")


async def test_a_fault_is_on_the_page_within_two_seconds(
    own_pg: Postgres, own_nats: NatsServer, osmem: SearchEngine, browser: Browser, tmp_path: Path
) -> None:
    async with database(own_pg) as dsn:
        config = await prepared(dsn, own_nats.url, osmem.url)
        async with served(config, tmp_path) as url, browser.page() as page:
            await page.open(url)
            await page.until(IN_STEP, 30)
            [(name, index)] = config.index.items()
            move = [{action: {"index": f"{name}-000001", "alias": name}} for action in ("remove", "add")]
            async with opened(index) as engine:
                await engine.create(f"other-{name}", {})
                elsewhere = {"add": {"index": f"other-{name}", "alias": name}}
                await engine.json("POST", "/_aliases", {"actions": [move[0], elsewhere]})
                for place in ("#findings", "#flow .is-bad"):
                    shown = f"document.querySelector('{place}')?.innerText.includes('searches see that')"
                    await page.until(shown, 2)
                await engine.delete(f"other-{name}")
                await engine.json("POST", "/_aliases", {"actions": [move[1]]})
            await page.until(IN_STEP, 30)
            await own_nats.stop()
            await page.until("document.querySelector('#findings').innerText.includes('NATS cannot be asked')", 2)
            assert await page.value("document.querySelector('#verdict').textContent") == "✗ needs a look"
            await own_nats.start()
            await page.until(IN_STEP, 30)
            await own_pg.stop()
            await page.until("document.querySelector('#findings').innerText.includes('PostgreSQL cannot be asked')", 2)
            await own_pg.start()
            await page.until(IN_STEP, 30)


async def test_a_bridge_that_is_gone_is_said_to_be(pg_db: str, nats: NatsServer, browser: Browser) -> None:
    config = with_token(source(pg_db, nats.url))
    async with browser.page() as page:
        async with serving(config) as url:
            await page.open(url)
            await page.until("document.querySelector('#verdict').textContent === '✗ needs a look'", 20)
        await page.until("document.querySelector('#verdict').textContent === '✗ the bridge does not answer'", 2)
        async with serving(config):
            await page.until("document.querySelector('#verdict').textContent === '✗ needs a look'", 20)
