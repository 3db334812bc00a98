"""Tables that DDL rewrites, and whether the bridge has judged what became of them."""

from __future__ import annotations

import anyio
import psycopg

from bridge.config import Config
from bridge.event import Event
from bridge.pipeline.shapes import Shapes
from bridge.source import shapes
from bridge.source.catalog import Filter
from bridge.stream import asking
from bridge.stream.reader import Message
from bridge.stream.state import Shape, State
from bridge.waiting import until
from tests.running import MARK, settled, state_of

MADE = [
    MARK,
    "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL, body text, w varchar(50))",
    "INSERT INTO t SELECT g, -g, 'b' || g FROM generate_series(1, 30) g",
    "CREATE TABLE p (id int PRIMARY KEY, v int, body text) PARTITION BY RANGE (id)",
    "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100)",
    "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (100) TO (200) PARTITION BY RANGE (id)",
    "CREATE TABLE p21 PARTITION OF p2 FOR VALUES FROM (100) TO (150)",
    "CREATE TABLE p22 PARTITION OF p2 FOR VALUES FROM (150) TO (200)",
    "INSERT INTO p SELECT g, g, 'b' || g FROM generate_series(1, 199, 3) g",
    "CREATE SCHEMA aside",
    "CREATE TABLE aside.loose (id int PRIMARY KEY, v int, body text)",
    "INSERT INTO aside.loose SELECT g, g, 'l' || g FROM generate_series(200, 220) g",
]


async def caught_up(config: Config, seconds: float = 40) -> None:
    """Waits until every table was judged as it is now, and nothing is asked for any more."""
    await settled(config)
    why = ""
    with anyio.move_on_after(seconds):
        async with state_of(config) as state, await psycopg.AsyncConnection.connect(str(config.source.dsn)) as sql:
            while True:
                wrong = await not_judged(config, state, sql)
                tables = await asking.tables(state, config.source.name)
                asked = {root: one.again for root, one in tables.items() if one.again is not None}
                if not wrong and not asked:
                    return
                why = f"not judged: {wrong}, asked for: {asked}"
                await anyio.sleep(0.05)
    raise AssertionError(why)


async def judged(config: Config) -> None:
    """Waits until every table was judged as it is now, whatever is asked for."""
    await settled(config)
    async with state_of(config) as state, await psycopg.AsyncConnection.connect(str(config.source.dsn)) as sql:

        async def none_left() -> bool:
            return not await not_judged(config, state, sql)

        assert await until(none_left, seconds=30)


async def not_judged(config: Config, state: State, sql: psycopg.AsyncConnection[object]) -> list[tuple[str, str]]:
    """The tables of which another shape is kept than they have, or of which something is still to be told."""
    published = Filter(config.source.tables)
    kept = Shapes(sql, config.source.name, published, state)
    await kept.load()
    _, found = await shapes.read(sql)
    await sql.rollback()
    today = {one.root: one for one in found if published.matches(*one.root)}
    gone = [root for root, one in kept.kept.items() if not one.gone and root not in today]
    return gone + [root for root, one in today.items() if root not in kept.kept or not is_of(kept.kept[root], one)]


def is_of(kept: Shape, today: shapes.Today) -> bool:
    leaves = [(leaf.oid, leaf.file, leaf.link, leaf.key) for leaf in kept.leaves]
    parts = [(part.oid, part.file, part.link, part.key) for part in today.parts]
    places = [(place.place, place.name, place.oid) for place in kept.columns]
    columns = [(column.place, column.name, column.oid) for column in today.columns]
    here, there = (kept.oid, kept.named, leaves, places), (today.oid, today.named, parts, columns)
    return not kept.gone and kept.turned is None and here == there


def begins(found: list[tuple[Message, Event]]) -> list[str]:
    """The tables that were read, as often as they were."""
    return sorted(one.table for _, one in found if one.phase == "begin")
