"""Table and index, row by row: every id, every column's value, with all digits. Nothing is taken for granted.

The table's side is PostgreSQL's own `row_to_json`, not the bridge's conversion, so that an error there would show.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import psycopg

from bridge.index.engine import Engine
from bridge.index.mapping import HIDDEN

PAGE = 1000
SHOWN = 5

# A number stays the digits that were written: 12.500 is not 12.5.
_exact = msgspec.json.Decoder(dict[str, Any], float_hook=lambda digits: ("number", digits))


class Comparison(NamedTuple):
    """How many rows were compared, and the ids that are in only one of the two or differ."""

    rows: int
    missing: list[int]
    extra: list[int]
    different: list[int]

    @property
    def agrees(self) -> bool:
        """Whether index and table are the same."""
        return not (self.missing or self.extra or self.different)

    def __str__(self) -> str:
        if self.agrees:
            return f"every id and every value of {self.rows:,} rows is the same in the index"
        parts = [
            f"{len(ids):,} {what} (id {', '.join(map(str, ids[:SHOWN]))}{', …' if len(ids) > SHOWN else ''})"
            for what, ids in (
                ("missing in the index", self.missing),
                ("only in the index", self.extra),
                ("different", self.different),
            )
            if ids
        ]
        return f"of {self.rows:,} rows " + ", ".join(parts)


async def compare(dsn: str, engine: Engine, alias: str, moments: frozenset[str]) -> Comparison:
    """Compare the messages table with the index behind `alias`; `moments` are the columns that hold times."""
    table = await _table(dsn, moments)
    index = await _index(engine, alias, moments)
    return Comparison(
        len(table),
        sorted(table.keys() - index.keys()),
        sorted(index.keys() - table.keys()),
        sorted(number for number in table.keys() & index.keys() if table[number] != index[number]),
    )


async def _table(dsn: str, moments: frozenset[str]) -> dict[int, dict[str, Any]]:
    found = {}
    async with (
        await psycopg.AsyncConnection.connect(dsn, options="-c timezone=UTC") as connection,
        connection.cursor(name="rows") as cursor,
    ):
        cursor.itersize = PAGE
        await cursor.execute("SELECT id, row_to_json(messages)::text FROM messages")
        async for number, text in cursor:
            found[number] = _comparable(_exact.decode(text), moments)
    return found


async def _index(engine: Engine, alias: str, moments: frozenset[str]) -> dict[int, dict[str, Any]]:
    await engine.refresh(alias)
    found: dict[int, dict[str, Any]] = {}
    body: dict[str, Any] = {"size": PAGE, "sort": [{"id": "asc"}], "query": {"match_all": {}}}
    while hits := _exact.decode(await engine.ask("POST", f"/{alias}/_search", body))["hits"]["hits"]:
        for hit in hits:
            source = {name: value for name, value in hit["_source"].items() if name != HIDDEN}
            # A document under another id than its key would be a second one for the same row.
            number = int(hit["_id"])
            found[number] = _comparable(source, moments)
        body["search_after"] = hits[-1]["sort"]
    return found


def _comparable(row: dict[str, Any], moments: frozenset[str]) -> dict[str, Any]:
    """The row with its times as times: the two sides write the same moment differently."""
    return {
        name: datetime.fromisoformat(value).astimezone(UTC) if name in moments and value is not None else value
        for name, value in row.items()
    }
