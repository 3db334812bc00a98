"""A column of a domain has the field, and its values the form, that the domain's own type has."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from bridge.config import Source
from bridge.embedded import NatsServer
from bridge.source.catalog import Catalog
from bridge.stream.server import connect
from bridge.stream.state import Column, State, TableRecord
from bridge.stream.subjects import table_key
from tests.integration.feeding import SCHEMA, TABLE, Log
from tests.running import bridge, execute, source, streaming

pytestmark = pytest.mark.anyio

TYPES = """
CREATE DOMAIN doc AS jsonb;
CREATE DOMAIN page AS doc CHECK (value IS NOT NULL);
CREATE DOMAIN docs AS jsonb[];
CREATE DOMAIN price AS numeric(12, 2);
CREATE DOMAIN many AS price[];
CREATE DOMAIN short AS varchar(20);
CREATE DOMAIN vector AS int2vector;
CREATE TYPE mood AS ENUM ('sad');
CREATE TABLE t (id int PRIMARY KEY, plain text, a doc, b page, c docs, d page[], e price, f many, g short[], h mood,
                i int2vector, j numeric(8, 1)[], k vector)
"""
BASES = {
    "a": "jsonb", "b": "jsonb", "c": "jsonb[]", "d": "jsonb[]", "e": "numeric(12,2)", "f": "numeric(12,2)[]",
    "g": "character varying(20)[]", "k": "int2vector",
}  # fmt: skip


async def test_the_catalogue_says_what_a_domain_is_of(pg_db: str) -> None:
    await execute(pg_db, TYPES)
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as sql:
        found = await Catalog(sql, Source()).relation("public", "t")
    assert found is not None
    assert {column.name: column.base for column in found.columns if column.base} == BASES
    assert found.columns[2].type == "doc"


async def test_a_record_holds_it_where_it_differs(pg_db: str, nats: NatsServer) -> None:
    await execute(pg_db, TYPES)
    await execute(pg_db, "INSERT INTO t (id, b) VALUES (1, '{}')")
    config = source(pg_db, nats.url, tables=["public.t"])
    async with bridge(config):
        await streaming(config)
        async with connect(config.stream, [nats.url]) as broker:
            state = await State.open(broker, config.state.bucket)
            record = await state.get(table_key(config.source.name, "public", "t"), TableRecord)
    assert record is not None
    bases = {column.name: column.base for column in record[0].columns if column.base}
    assert bases == BASES
    assert BASES.items() <= {column.name: column.type for column in record[0].plain}.items()
    assert {column.name: column.type for column in record[0].plain}["j"] == "numeric(8,1)[]"


async def test_documents_hold_what_the_domains_type_holds(quick: Log) -> None:
    columns: list[Any] = [("id", "bigint", ""), ("doc", "page", "jsonb"), ("n", "price", "numeric(12,2)"),
                          ("span", "spans", "int4range[]"), ("old", "jsonish", "")]  # fmt: skip
    record = TableRecord([Column(name, kind, 0, base) for name, kind, base in columns], ["id"])
    await quick.state.put(table_key(quick.config.source.name, SCHEMA, TABLE), record)
    quick.with_index(json="flat")
    await quick.put("insert", {"id": 1}, {"id": 1, "doc": [1], "n": 1.5, "span": ["[1,5)"], "old": "x"})
    await quick.rebuild()
    [live] = (await quick.record()).generations
    kinds = {name: field["type"] for name, field in live.mapping["properties"].items()}
    assert kinds == {"id": "long", "doc": "flat_object", "n": "keyword", "span": "integer_range", "old": "keyword",
                     "_bridge": "object"}  # fmt: skip
    assert (await quick.documents())["1"] == {
        "id": 1, "doc": {"value": [1]}, "n": 1.5, "span": [{"gte": 1, "lt": 5}], "old": "x"
    }  # fmt: skip
