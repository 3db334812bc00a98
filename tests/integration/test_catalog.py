"""What the catalogue says of several tables at once is of one moment."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from bridge.config import Source
from bridge.source.catalog import Catalog
from tests.running import execute

pytestmark = pytest.mark.anyio

TREE = [
    "CREATE TABLE t (id int, a text, b text) PARTITION BY LIST (id)",
    "CREATE TABLE between PARTITION OF t FOR VALUES IN (1, 2) PARTITION BY LIST (id)",
    "CREATE TABLE t_1 (b text, a text, id int)",
    "ALTER TABLE between ATTACH PARTITION t_1 FOR VALUES IN (1)",
    "CREATE SCHEMA other",
    "CREATE TABLE other.t_1 (id int PRIMARY KEY)",
]
SWAP = [
    "ALTER TABLE t RENAME a TO c; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME c TO b",
    "ALTER TABLE t RENAME id TO no; ALTER TABLE t RENAME a TO id; ALTER TABLE t RENAME no TO a",
]
ROUNDS = 60


async def test_a_partition_and_its_root_are_read_as_they_were_together(pg_db: str) -> None:
    await execute(pg_db, *TREE)
    names = set[int]()
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as sql:
        catalog = Catalog(sql, Source())
        async with anyio.create_task_group() as tasks:

            async def swap() -> None:
                async with await psycopg.AsyncConnection.connect(pg_db) as session:
                    for number in range(10_000):
                        await session.execute(SWAP[number % 2])
                        await session.commit()

            tasks.start_soon(swap)
            while len(names) < ROUNDS:
                found = await catalog.family("public", "t_1")
                assert found is not None
                part, root = found
                assert (part.name, root.name) == ("public.t_1", "public.t")
                # Their columns stand in opposite orders.
                assert [column.name for column in part.columns] == [column.name for column in root.columns][::-1]
                names.add(max(column.xid for column in root.columns))
            tasks.cancel_scope.cancel()


async def test_a_table_that_is_no_partition_is_its_own_root(pg_db: str) -> None:
    await execute(pg_db, *TREE)
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as sql:
        catalog = Catalog(sql, Source())
        found = await catalog.family("other", "t_1")
        assert found is not None
        assert found[0] is found[1]
        top = await catalog.family("public", "t")
        assert top is not None
        assert (top[0].name, top[0] is top[1]) == ("public.t", True)
        middle = await catalog.family("public", "between")
        assert middle is not None
        assert (middle[0].name, middle[1].name) == ("public.between", "public.t")
        assert await catalog.family("other", "t") is None
