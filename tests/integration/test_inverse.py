"""Any value of any type, from stream and snapshot: the same bytes, from which PostgreSQL reads the same value.

The records are the plugin's own, read from a slot with SQL, and the lines those of COPY; what makes events of them is
the bridge's. `BRIDGE_EXAMPLES=10000 pytest tests/integration/test_inverse.py` tries more than a run of all tests does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from bridge import event
from bridge.config import Source
from bridge.source import connection, inverse, rows, wal2json
from bridge.source.catalog import Catalog, Relation
from bridge.source.rows import Plan, plan
from tests.pgvalues import CREATED, TYPES
from tests.running import execute

pytestmark = pytest.mark.anyio

EXAMPLES = int(os.environ.get("BRIDGE_EXAMPLES", "60"))
CLOSING = event.transaction("0/1", 1, None)
OPTIONS = [text for pair in wal2json.OPTIONS.items() for text in pair]
number = itertools.count(1)


class Ground(NamedTuple):
    connection: psycopg.AsyncConnection[Any]
    catalog: Catalog


@pytest.fixture
async def ground(pg_db: str) -> AsyncIterator[Ground]:
    await execute(
        pg_db, *CREATED.strip().split(";\n"), "SELECT pg_create_logical_replication_slot('values', 'wal2json')"
    )
    async with connection.connect(pg_db) as there:
        yield Ground(there, Catalog(there, Source(tables=["public.*"])))
        await there.execute("SELECT pg_drop_replication_slot('values')")


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str | None]]]:
    kinds = draw(st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=6))
    row = st.tuples(*(st.none() | TYPES[kind] for kind in kinds))
    return kinds, [list(one) for one in draw(st.lists(row, min_size=1, max_size=4))]


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(found=tables())
async def test_a_value_is_the_same_from_stream_and_snapshot_and_can_be_written_back(
    ground: Ground, found: tuple[list[str], list[list[str | None]]]
) -> None:
    kinds, given_rows = found
    name = f"t{next(number)}"
    try:
        await made(ground, name, kinds, given_rows)
        relation = await ground.catalog.relation("public", name)
        assert relation is not None
        codecs = {column.oid: await ground.catalog.codec(column.oid) for column in relation.columns}
        chosen = plan(relation, "main", "cdc.main", codecs)
        streamed, copied = await from_stream(ground, chosen), await from_snapshot(ground, chosen, name)
        assert streamed == copied
        await written_back(ground, relation, name, copied)
    finally:
        await ground.connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name)))
        await changes(ground)


async def made(ground: Ground, name: str, kinds: list[str], given_rows: list[list[str | None]]) -> None:
    columns = ", ".join(f"c{place} {kind}" for place, kind in enumerate(kinds))
    await ground.connection.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, {columns})".encode())
    casts = ", ".join(f"%s::{kind}" for kind in kinds)
    for place, row in enumerate(given_rows):
        await ground.connection.execute(f"INSERT INTO {name} VALUES ({place}, {casts})".encode(), row)


async def from_stream(ground: Ground, chosen: Plan) -> list[bytes]:
    """The rows of the inserts."""
    records = [wal2json.decode(data) for data in await changes(ground)]
    return [after(rows.change(chosen, one, CLOSING)) for one in records if one.action == "I"]


async def changes(ground: Ground) -> list[str]:
    """What the slot has."""
    cursor = await ground.connection.execute(
        f"SELECT data FROM pg_logical_slot_get_changes('values', NULL, NULL{', %s' * len(OPTIONS)})".encode(), OPTIONS
    )
    return [data for (data,) in await cursor.fetchall()]


async def from_snapshot(ground: Ground, chosen: Plan, name: str) -> list[bytes]:
    """The rows of a COPY."""
    reader = rows.Reader(chosen, b',"lsn":"0/1"' + CLOSING)
    query = f"COPY (SELECT {reader.columns} FROM {name} ORDER BY id) TO STDOUT"
    async with ground.connection.cursor() as cursor, cursor.copy(query.encode()) as copy:
        return [after(reader.payload(bytes(data))) async for data in copy]


def after(payload: bytes) -> bytes:
    return bytes(event.decode(payload).after)


async def written_back(ground: Ground, relation: Relation, name: str, found: list[bytes]) -> None:
    """What PostgreSQL reads from the events prints as the table's own rows do."""
    copy = sql.Identifier(f"{name}_copy")
    await ground.connection.execute(sql.SQL("CREATE TABLE {} (LIKE {})").format(copy, sql.Identifier(name)))
    try:
        casts = ", ".join(f"%s::{column.type}" for column in relation.columns)
        for row in found:
            values = msgspec.json.decode(row, type=dict[str, msgspec.Raw])
            texts = [inverse.text(bytes(values[c.name]), c.base or c.type) for c in relation.columns]
            await ground.connection.execute(f"INSERT INTO {name}_copy VALUES ({casts})".encode(), texts)
        shown = sql.SQL("SELECT ROW(x.*)::text FROM {} x ORDER BY id")
        theirs = await (await ground.connection.execute(shown.format(sql.Identifier(name)))).fetchall()
        ours = await (await ground.connection.execute(shown.format(copy))).fetchall()
        assert ours == theirs
    finally:
        await ground.connection.execute(sql.SQL("DROP TABLE {}").format(copy))
