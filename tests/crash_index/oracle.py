"""What an index must hold: the rows of its table, asked of PostgreSQL, against the documents, paged from the engine.

Nothing here builds documents or ids as the bridge does. PostgreSQL itself reads the documents' raw values back and
compares; ids follow from the rule in the manual; a transform is called with the table's rows.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
import psycopg
from psycopg import sql

from bridge.config import Index, split_name
from bridge.index.engine import Engine
from tests.oracle import same_rows

PAGE = 500


class Document(msgspec.Struct, frozen=True):
    """A document as the engine holds it."""

    id: str = msgspec.field(name="_id")
    source: dict[str, msgspec.Raw] = msgspec.field(name="_source")


class _Hits(msgspec.Struct):
    hits: list[Document]


class _Page(msgspec.Struct):
    hits: _Hits
    scroll: str = msgspec.field(name="_scroll_id")


async def documents(engine: Engine, index: str) -> list[Document]:
    """Every document of an index or alias."""
    await engine.refresh(index)
    found: list[Document] = []
    body: Any = {"size": PAGE, "query": {"match_all": {}}, "sort": ["_doc"]}
    path = f"/{index}/_search?scroll=1m"
    while True:
        page = msgspec.json.decode(await engine.ask("POST", path, body), type=_Page)
        found += page.hits.hits
        path, body = "/_search/scroll", {"scroll": "1m", "scroll_id": page.scroll}
        if not page.hits.hits:
            await engine.ask("DELETE", "/_search/scroll", {"scroll_id": [page.scroll]})
            return found


async def same(
    dsn: str, index: Index, key: list[str], found: list[Document], transform: Callable[[dict[str, Any]], Any] | None
) -> set[str]:
    """Assert that these are the documents of the index' table; the ids whose transform fails (they may be anything)."""
    schema, table = split_name(index.table)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, client_encoding="utf8") as connection:
        cursor = await connection.execute(
            sql.SQL("SELECT row_to_json(t)::text FROM {} t").format(sql.Identifier(schema, table))
        )
        rows = [json.loads(text, parse_float=Decimal) for (text,) in await cursor.fetchall()]
        wanted = {identified([row[name] for name in key]): row for row in rows}
        assert len(wanted) == len(rows)
        if transform is not None:
            return await _same_transformed(wanted, found, transform)
        _same_ids(table, wanted.keys(), {document.id for document in found})
        back = {new: old for old, new in index.rename.items()}
        read = []
        for document in found:
            values = {back.get(n, n): bytes(v) for n, v in document.source.items() if n != "_bridge"}
            own = identified([json.loads(values[name], parse_float=Decimal) for name in key])
            assert own == document.id, f"{table}: the document {document.id[:80]} holds the row {own[:80]}"
            assert not values.keys() & set(index.exclude), f"{table}: {document.id[:80]} has an excluded column"
            read.append(values)
        # A column that came later is not in the documents of rows that were not written since.
        old = {name for name in rows[0] if not name.startswith("more_")} - set(index.exclude) if rows else set()
        for values in read:
            assert not old - values.keys(), f"{table}: a document lacks {sorted(old - values.keys())}"
        try:
            await same_rows(connection, schema, table, read, list(index.exclude))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{_difference(wanted, key, read)}") from None
    return set()


def _difference(wanted: dict[str, dict[str, Any]], key: list[str], read: list[dict[str, bytes]]) -> str:
    """Columns that differ, as far as JSON shows it: where values are of types that it spells otherwise, too many."""
    found = []
    for values in read:
        document = {name: json.loads(value, parse_float=Decimal) for name, value in values.items()}
        row = wanted[identified([document[name] for name in key])]
        differing = [name for name in (row.keys() & document.keys()) if str(row.get(name)) != str(document.get(name))]
        found += [f"{[row[k] for k in key]} {n}: {row.get(n)!s:.60} is {document.get(n)!s:.60}" for n in differing]
    shown = [line for line in found if " raw:" not in line and " at:" not in line]
    return "\n".join((shown or found)[:8])


def _same_ids(table: str, wanted: Any, found: set[str]) -> None:
    missing, extra = sorted(set(wanted) - found), sorted(found - set(wanted))
    assert not missing, f"{table}: {len(missing)} documents are missing, such as {[i[:60] for i in missing[:5]]}"
    assert not extra, f"{table}: {len(extra)} documents are too many, such as {[i[:60] for i in extra[:5]]}"


async def _same_transformed(
    rows: dict[str, dict[str, Any]], found: list[Document], transform: Callable[[dict[str, Any]], Any]
) -> set[str]:
    wanted: dict[str, Any] = {}
    failing: set[str] = set()
    for doc_id, row in rows.items():
        try:
            made = transform(row)
            if inspect.isawaitable(made):
                made = await made
        except ValueError:
            failing.add(doc_id)
            continue
        if made is not None:
            wanted[doc_id] = made
    read = {
        document.id: {
            n: json.loads(bytes(v), parse_float=Decimal) for n, v in document.source.items() if n != "_bridge"
        }
        for document in found
        if document.id not in failing
    }
    _same_ids("transformed", wanted.keys(), set(read))
    other = [(doc_id, read[doc_id], document) for doc_id, document in wanted.items() if read[doc_id] != document]
    assert not other, f"{len(other)} documents differ, such as {str(other[0])[:700]}"
    return failing


def identified(values: list[Any]) -> str:
    """The id of a row with this key, by the rule in the manual."""
    parts = []
    for value in values:
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, str) and (
            not text
            or text[0] in "'[{#"
            or text in ("true", "false", "null")
            or re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", text)
        ):
            text = f"'{text}"
        parts.append(text.replace("\\", "\\\\").replace("|", "\\|"))
    whole = "|".join(parts)
    return f"#{hashlib.sha256(whole.encode()).hexdigest()}" if len(whole.encode()) > 512 else whole
