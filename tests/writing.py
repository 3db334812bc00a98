"""Rows of events written back into PostgreSQL, as a consumer does it: with the types that the state bucket records."""

from __future__ import annotations

import psycopg

from bridge.config import Config
from bridge.source import inverse
from bridge.stream import subjects
from bridge.stream.state import TableRecord
from tests.documented import Members
from tests.running import state_of

SETTINGS = "-c datestyle=ISO -c lc_monetary=C -c xmloption=content"


async def written_back(config: Config, table: str, row: Members) -> None:
    """Asserts that PostgreSQL reads an event's row as the one that the table in `public` has, but for JSON's own null
    in a column of json or jsonb, which the event has as NULL."""
    async with state_of(config) as state:
        found = await state.get(subjects.table_key(config.source.name, "public", table), TableRecord)
    assert found is not None
    columns = found[0].columns
    texts = [inverse.text(row[column.name], column.base or column.type) for column in columns]
    dsn = str(config.source.dsn)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, options=SETTINGS) as sql:
        await sql.execute(f"CREATE TABLE {table}_again (LIKE {table})".encode())
        casts = ", ".join(f"%s::{column.type}" for column in columns)
        await sql.execute(f"INSERT INTO {table}_again VALUES ({casts})".encode(), texts)
        for column in columns:
            shows = [f'SELECT "{column.name}"::text FROM {name}' for name in (table, f"{table}_again")]
            theirs, ours = [await (await sql.execute(one.encode())).fetchone() for one in shows]
            lost = theirs == ("null",) and column.type in ("json", "jsonb")
            assert ours == ((None,) if lost else theirs), column
