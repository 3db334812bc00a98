"""The tables of both crash suites in one database, and what writes to them: the log's own in a schema `log`."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from bridge.embedded import Postgres
from tests.crash import load as log_load
from tests.crash.writers import Writers
from tests.crash_index import load as index_load
from tests.running import execute

TEMPLATE = "soak_template"
SCHEMA = "log"
INDEXED = list(index_load.PARTS)
# A row that is larger than a message may be: it goes to the object store.
LARGE = "INSERT INTO notes VALUES (-{r}, 'large', repeat(md5('{r}'), 40000)) ON CONFLICT (id) DO NOTHING"
SELDOM = 0.004
# What keeps the tables from growing for hours, and from being empty; they are compared as a whole after each lap.
TRIMMED = [
    "DELETE FROM log.notes WHERE id NOT BETWEEN 0 AND 400 AND (title = 'large' OR id NOT IN"
    " (SELECT id FROM log.notes WHERE id > 400 ORDER BY id % 97, id LIMIT 500))",
    "DELETE FROM log.accounts WHERE id NOT BETWEEN 0 AND 5000",
    "DELETE FROM log.pairs WHERE b % 2 = 1 AND b > 2000",
    "DELETE FROM log.loose WHERE word IS NULL OR word = 'same'",
    "DELETE FROM posts WHERE id > 9000 AND id % 4 > 0",
    "DELETE FROM words WHERE length(word) > 20",
    "INSERT INTO posts SELECT g, 'again', repeat(md5(g::text), 120) FROM generate_series(1, 300) g"
    " ON CONFLICT DO NOTHING",
    "INSERT INTO days SELECT '2026-01-01'::date + g % 59, g, repeat(md5(g::text), 90) FROM generate_series(1, 300) g"
    " ON CONFLICT DO NOTHING",
    "INSERT INTO words SELECT md5(g::text), 'de', g FROM generate_series(1, 100) g ON CONFLICT DO NOTHING",
]


class Written(NamedTuple):
    """Who has written, and how much so far."""

    writers: list[Writers]

    @property
    def transactions(self) -> int:
        return sum(one.transactions for one in self.writers)


async def prepare(server: Postgres) -> None:
    """Make the template database."""
    await execute(server.dsn(), f"CREATE DATABASE {TEMPLATE}")
    dsn = server.dsn(TEMPLATE)
    more = log_load.MORE_TABLES.replace("{rows}", str(log_load.ROWS))
    await execute(dsn, f"CREATE SCHEMA {SCHEMA}", index_load.TABLES)
    await execute(within(dsn), log_load.TABLES, more)


def within(dsn: str) -> str:
    """A DSN whose unqualified names are those of the schema of the log's own tables."""
    return f"{dsn}{'&' if '?' in dsn else '?'}options=-csearch_path%3D{SCHEMA}"


@asynccontextmanager
async def writing(dsn: str, seed: str) -> AsyncIterator[Written]:
    """Writers to all tables for as long as the block lasts."""

    def scripts(choose: random.Random) -> list[str]:
        if choose.random() < SELDOM:
            return [LARGE.replace("{r}", str(choose.randint(1, 10**6)))]
        return [log_load.statement(choose) for _ in range(choose.randint(1, 3))]

    number = random.Random(seed).randrange(10**9)
    log = Writers(within(dsn), number, scripts, count=2, enough=300, soon=0.25, late=1.2)
    index = index_load.load(dsn, number, INDEXED, poison=False)
    async with log.writing(), index.writing():
        yield Written([log, index])
