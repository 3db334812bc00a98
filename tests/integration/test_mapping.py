"""Fields on real engines: no value that PostgreSQL holds is refused, and searches find what they should."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import psycopg
import pytest
from structlog.testing import capture_logs

from bridge.config import Index, Source, State
from bridge.errors import ConfigError, ServerMissing, ServerRefused
from bridge.index import convert, feed, mapping
from bridge.index.bulk import Sender
from bridge.index.columns import grow
from bridge.index.design import design
from bridge.index.document import Operation, Put
from bridge.index.engine import Engine, Item, opened
from bridge.index.preview import preview
from bridge.source.catalog import Catalog
from bridge.stream.state import Column
from tests.integration.feeding import COLUMNS, Log

pytestmark = pytest.mark.anyio

# Column type: values as SQL expressions, the worst of each kind.
VALUES = {
    "integer": ["-2147483648"],
    "bigint": ["9223372036854775807"],
    "numeric": ["'NaN'", "'Infinity'", "repeat('9', 131072)::numeric", "('0.' || repeat('1', 16383))::numeric", "1e400",
                "-1e-20"],
    "numeric(10,2)": ["12345678.91"],
    "real": ["'NaN'", "3.4028235e38", "1e-45"],
    "double precision": ["'-Infinity'", "5e-324", "1.7976931348623157e308"],
    "boolean": ["true"],
    "text": ["repeat('long', 30000)", "''"],
    "bytea": ["decode(repeat('00ff', 5000), 'hex')"],
    "date": ["'0044-03-15 BC'", "'5874897-12-31'", "'infinity'"],
    "timestamp": ["'294276-12-31 23:59:59.999999'", "'-infinity'", "'4713-11-24 00:00:00 BC'"],
    "timestamptz": ["'2026-01-31 12:00:00.123456+02'"],
    "inet": ["'10.0.0.1/8'", "'::ffff:1.2.3.4'", "'fe80::1'"],
    "cidr": ["'10.0.0.0/8'", "'0.0.0.0/0'", "'::/0'", "'::ffff:1.2.3.0/120'", "'::1.2.3.4/128'", "'2001:db8::/32'"],
    "int4range": ["'[1,5)'", "'empty'", "'(,)'", "'[2147483647,)'", "'(,-2147483648)'", "'[5,5]'"],
    "int8range": ["'[9223372036854775807,)'", "'[-9223372036854775808,9223372036854775807)'"],
    "numrange": [
        "'(1,1.0000000000000000001)'", "'[1,NaN]'", "'[NaN,]'", "'(1.5,2.5]'", "numrange(1e400, NULL)",
        "numrange(-1e400, 1e400)", "numrange(0, 1e-400)", "numrange(repeat('9', 2000)::numeric - 1, NULL)",
        "numrange(('0.' || repeat('1', 1500))::numeric, 1)", "'[0,0]'",
    ],
    "daterange": ["'[2020-01-01,2020-02-01)'", "'[0044-03-15 BC,12345-01-01)'", "'[-infinity,infinity]'", "'[,)'",
                  "'[5874897-12-30,5874897-12-31)'", "'[infinity,infinity]'"],
    "tsrange": [
        "'[2020-01-01 00:00:00.5,2020-01-02 00:00:00.123456)'", "'(2020-01-01,2020-01-01 00:00:00.001)'",
        "'(2020-01-01 00:00:00.0001,2020-01-01 00:00:00.0002)'", "'[4713-11-24 00:00:00 BC,294276-12-31 23:59:59)'",
        "'(2020-01-01 00:00:01,2020-01-01 00:00:01.000001]'", "'[2020-01-01,infinity]'",
    ],
    "tstzrange": ["'[2020-01-01 00:00+02,)'", "'(0001-12-31 23:59:59+00 BC,0001-01-01 00:00:00+00]'"],
    "point": ["'(1.5,-2)'", "'(NaN,Infinity)'", "'(1e300,1e-300)'"],
    "json": ['\'{"a" : 1,\n "a":2}\'', "'\"x\"'", "'{\"\\u0000\": \"\\u0000\", \"\": {\".\": 1}}'"],
    "jsonb": [
        "'[1, [2, {\"a\": null}]]'", "'1'", "'null'", "'{\"a\": [{\"b\": null}, 2]}'", "'{\"a\": {\"a\": 1, \"\": 2}}'",
        "jsonb_build_object('a', repeat('9', 3000)::numeric)", "jsonb_build_object('long', repeat('x', 70000))",
        "jsonb_build_object(repeat('k', 40000), 1)", "(repeat('{\"a\":', 100) || '1' || repeat('}', 100))::jsonb",
        "jsonb_build_object('ü', repeat('語', 8191))", "'{\"a.b\": 1, \"..\": 2, \" \": 3}'",
    ],
    "integer[]": ["'{1,NULL}'", "'[0:1]={7,8}'", "'{{1,2},{3,4}}'"],
    "boolean[]": ["'{t,NULL}'", "'[0:1]={t,f}'"],
    "int4range[]": ["ARRAY['[1,5)'::int4range, 'empty', NULL]", "'[0:0]={\"[1,2)\"}'"],
    "jsonb[]": ["ARRAY['{\"a\": 1}'::jsonb, '2', '[3]']"],
    "point[]": ["ARRAY['(1,2)'::point, '(NaN,1)']"],
    "timestamptz[]": ["'{infinity,\"2026-01-31 12:00+02\"}'", "'[2:2]={infinity}'"],
    "interval": ["'1 year'"],
    "tsvector": ["'a:1 b:2A'"],
    "money": ["-1.5"],
}  # fmt: skip
MULTIRANGES = {
    "int4multirange": ["'{[1,3),[5,7)}'", "'{}'", "'{(,)}'"],
    "nummultirange": ["'{(1,1.0000000000000000001),[5,)}'"],
    "tstzmultirange": ["'{[2020-01-01 00:00+00,2020-01-02 00:00+00),[2021-01-01 00:00+00,)}'"],
}


@pytest.fixture
async def engine(engine_url: str) -> AsyncIterator[Engine]:
    async with opened(Index(table="a.b", url=[engine_url])) as found:
        yield found


@pytest.fixture
async def index(engine: Engine) -> AsyncIterator[str]:
    """The name of an index; it and others with more behind it are gone at the end."""
    name = f"fields{secrets.token_hex(4)}"
    yield name
    for made in await engine.indexes(f"{name}*"):
        await engine.delete(made)


async def printed(dsn: str) -> list[tuple[str, str, bytes]]:
    """(column, type, JSON) of every value, as events have it."""
    found = []
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, options="-c timezone=UTC") as sql:
        known = VALUES | (MULTIRANGES if sql.info.server_version >= 140_000 else {})
        if sql.info.server_version < 140_000:
            known = {**known, "numeric": [v for v in VALUES["numeric"] if v != "'Infinity'"]}
        catalog = Catalog(sql, Source())
        for number, (kind, values) in enumerate(known.items()):
            asked = ", ".join(f"(({value})::{kind})::text" for value in values)
            oid, name, *texts = (
                await (
                    await sql.execute(
                        f"SELECT '{kind}'::regtype::oid::int8, format_type('{kind}'::regtype, NULL), {asked}"
                    )
                ).fetchone()
                or ()
            )
            codec = await catalog.codec(oid)
            found += [(f"c{number}", name, codec.convert(text)) for text in texts]
    return found


async def bulk(engine: Engine, index: str, documents: list[bytes]) -> list[str]:
    """Index documents, their places as ids; what was refused."""
    lines = b"".join(b'{"index":{"_id":"%d"}}\n%b\n' % numbered for numbered in enumerate(documents))
    answer = json.loads(await engine.ask("POST", f"/{index}/_bulk?refresh=true", lines, lines=True))
    return [
        f"{documents[place][:80]!r}: {item['index']['error']}"
        for place, item in enumerate(answer["items"])
        if item["index"]["status"] != 201
    ]


@pytest.mark.parametrize(
    "choices", [{}, {"json": "flat", "numeric": "double"}, {"json": "object", "numeric": "scaled_float:100"}]
)
async def test_no_value_of_postgres_is_refused(engine: Engine, index: str, pg_db: str, choices: dict[str, Any]) -> None:
    values = await printed(pg_db)
    if choices.get("json") == "object":
        # There the engine guesses, and what is of another kind than the first value is refused.
        values = [value for value in values if not value[1].startswith("json")]
    config = Index(table="public.zoo", settings={"number_of_replicas": 0}, **choices)
    designed = await design(engine, config, None, index)
    types = {name: kind for name, kind, _ in values}
    columns = [Column(name, kind, 0) for name, kind in types.items()]
    properties = mapping.fields(columns, keep=[], exclude=[], rename={}, chosen=designed.choices)
    await engine.create(index, designed.body(properties, {}))
    by = convert.converters(properties, types)
    documents = [convert.fit(convert.document(b'{"%b":%b}' % (name.encode(), raw), by)) for name, _, raw in values]
    assert await bulk(engine, index, documents) == []
    assert await engine.count(index) == len(values)
    again = [convert.fit(convert.document(document, by)) for document in documents]
    assert again == documents


async def found(engine: Engine, index: str, query: dict[str, Any]) -> set[str]:
    body = {"query": query, "_source": False}
    answer = await engine.json("POST", f"/{index}/_search", body)
    return {hit["_id"] for hit in answer["hits"]["hits"]}


async def test_searches_find_what_was_converted(engine: Engine, index: str) -> None:
    types = {
        "ages": "int4range",
        "at": "tstzmultirange",
        "net": "cidr",
        "host": "inet",
        "doc": "jsonb",
        "spot": "point",
    }
    config = Index(
        table="public.zoo", json="flat", fields={"spot": {"type": "geo_point"}}, settings={"number_of_replicas": 0}
    )
    designed = await design(engine, config, None, index)
    columns = [Column(name, kind, 0) for name, kind in types.items()]
    properties = mapping.fields(columns, keep=[], exclude=[], rename={}, chosen=designed.choices)
    await engine.create(index, designed.body(properties, {}))
    rows = [
        {"ages": "[1,5)", "net": "10.0.0.0/8", "host": "10.0.0.1/8", "doc": {"a": {"b": "x"}}, "spot": "(13.4,52.5)"},
        {"at": '{["2020-01-01 00:00:00+00","2020-01-02 00:00:00+00"),["2021-01-01 00:00:00+00",infinity)}'},
        {"ages": "[5,)", "net": "::ffff:1.2.3.0/120", "host": "10.0.0.1", "doc": ["x"], "spot": "(0,91)"},
    ]
    by = convert.converters(properties, types)
    assert await bulk(engine, index, [convert.document(json.dumps(row).encode(), by) for row in rows]) == []
    assert await found(engine, index, {"term": {"ages": 4}}) == {"0"}
    assert await found(engine, index, {"term": {"ages": 5}}) == {"2"}
    assert await found(engine, index, {"range": {"at": {"gte": "2020-06-01", "lt": "2020-07-01"}}}) == set()
    assert await found(engine, index, {"term": {"at": "2020-01-01T23:59:59.999Z"}}) == {"1"}
    assert await found(engine, index, {"term": {"at": "2022-01-01"}}) == {"1"}
    assert await found(engine, index, {"term": {"net": "10.9.9.9"}}) == {"0"}
    assert await found(engine, index, {"term": {"net": "1.2.3.4"}}) == {"2"}
    assert await found(engine, index, {"term": {"host": "10.0.0.0/8"}}) == {"2"}
    assert await found(engine, index, {"term": {"host.keyword": "10.0.0.1/8"}}) == {"0"}
    assert await found(engine, index, {"term": {"doc.a.b": "x"}}) == {"0"}
    assert await found(engine, index, {"term": {"doc.value": "x"}}) == {"2"}
    near = {"geo_distance": {"distance": "50km", "spot": {"lat": 52.6, "lon": 13.5}}}
    assert await found(engine, index, near) == {"0"}


async def test_a_document_that_was_built_before_its_field_was_known_is_built_again(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def learnt_meanwhile(self: Sender, ops: list[Operation]) -> list[Item]:
        if not grown and any(b"during" in op.doc for op in ops if isinstance(op, Put)):
            # As if the other bulk on its way had met the new column first.
            grown.append(await self._home.learn([]))
        return await answers(self, ops)

    grown: list[bool] = []
    answers = Sender._answers
    await log.columns({"id": "bigint", "title": "text"})
    await log.put("insert", {"id": 1}, {"id": 1, "title": "a"})
    async with log.reading():
        await log.done()
        monkeypatch.setattr(Sender, "_answers", learnt_meanwhile)
        await log.columns({"id": "bigint", "title": "text", "during": "tsrange"})
        await log.put("insert", {"id": 2}, {"id": 2, "title": "b", "during": '["2020-01-01 00:00:00",)'})
        await log.done()
        found = await log.documents()
    assert grown == [True]
    assert await log.letters() == []
    assert found["2"] == {"id": 2, "title": "b", "during": {"gte": "2020-01-01T00:00:00.000"}}


async def test_a_document_is_built_again_once_who_adds_its_field_has_recorded_it(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One bulk has added the field to the engine's mapping and not recorded it yet, while another one's is refused.
    added, refused = anyio.Event(), anyio.Event()
    answers = Sender._answers

    async def held(*args: Any) -> Any:
        found = await grow(*args)
        if found is not None:
            added.set()
            await refused.wait()
        return found

    async def meanwhile(self: Sender, ops: list[Operation]) -> list[Item]:
        if added.is_set() or not any(b"during" in op.doc for op in ops if isinstance(op, Put)):
            return await answers(self, ops)
        tasks.start_soon(self._home.learn, [])
        await added.wait()
        found = await answers(self, ops)
        assert [item.error is None for item in found] == [False]
        tasks.start_soon(later)
        return found

    async def later() -> None:
        await anyio.wait_all_tasks_blocked()
        refused.set()

    await log.columns({"id": "bigint", "title": "text"})
    await log.put("insert", {"id": 1}, {"id": 1, "title": "a"})
    async with anyio.create_task_group() as tasks, log.reading():
        await log.done()
        monkeypatch.setattr(feed, "grow", held)
        monkeypatch.setattr(Sender, "_answers", meanwhile)
        await log.columns({"id": "bigint", "title": "text", "during": "tsrange"})
        await log.put("insert", {"id": 2}, {"id": 2, "title": "b", "during": '["2020-01-01 00:00:00",)'})
        await log.done()
        found = await log.documents()
    assert refused.is_set()
    assert await log.letters() == []
    assert found["2"] == {"id": 2, "title": "b", "during": {"gte": "2020-01-01T00:00:00.000"}}


async def test_events_become_documents_with_what_their_fields_take(log: Log) -> None:
    log.with_index(rename={"ages": "years"})
    await log.columns({"id": "bigint", "title": "text", "ages": "int4range", "doc": "json", "body": "text"})
    after = '{"id":1,"title":"a","ages":"[1,5)","doc":{"a" :\n1, "a":2},"body":"b"}'
    await log.put("insert", {"id": 1}, after)
    async with log.reading():
        await log.done()
        await log.put("update", {"id": 1}, {"id": 1, "title": "c", "doc": None}, unchanged=["body", "ages"])
        await log.done()
        assert await log.documents() == {
            "1": {"id": 1, "title": "c", "years": {"gte": 1, "lt": 5}, "doc": None, "body": "b"}
        }
        columns = {"id": "bigint", "title": "text", "ages": "int4range", "during": "tsrange"}
        await log.columns(columns)
        await log.put("insert", {"id": 2}, {"id": 2, "title": "d", "ages": "empty", "during": "[2020-01-01,)"})
        await log.put("insert", {"id": 3}, {"id": 3, "title": "e", "during": '["2020-01-01 00:00:00",)'})
        await log.done()
        found = await log.documents()
    assert await log.letters() == []
    assert found["2"]["years"] is None
    assert found["3"]["during"] == {"gte": "2020-01-01T00:00:00.000"}


# What others say of an index: templates, settings, whole mappings


@asynccontextmanager
async def templated(log: Log) -> AsyncIterator[None]:
    """An index template for the indexes of `log`."""
    body = {
        "index_patterns": [f"{log.name}-*"],
        "template": {
            "settings": {
                "refresh_interval": "7s", "number_of_replicas": 0, "gc_deletes": "1s",
                "analysis": {"analyzer": {"loud": {"type": "standard"}}},
            },
            "mappings": {"dynamic": True, "_meta": {"team": "x"}, "properties": {"title": {"type": "keyword"}}},
        },
    }  # fmt: skip
    await log.engine.json("PUT", f"/_index_template/{log.name}", body)
    try:
        yield
    finally:
        await log.engine.json("DELETE", f"/_index_template/{log.name}")


async def made(log: Log) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings with dotted names, and mappings, of the live generation."""
    physical = (await log.record()).physical
    settings = await log.engine.json("GET", f"/{physical}/_settings?flat_settings=true")
    mappings = await log.engine.json("GET", f"/{physical}/_mapping")
    return settings[physical]["settings"], mappings[physical]["mappings"]


async def test_a_templates_settings_count_and_the_bridges_own_survive_it(log: Log) -> None:
    own = {
        "index": {"number_of_routing_shards": 4, "number_of_shards": 2},
        "analysis": {"analyzer": {"quiet": {"type": "standard", "stopwords": ["two"]}}},
    }
    log.with_index(settings=own, fields={"body": {"type": "text", "analyzer": "quiet"}})
    await log.put("insert", {"id": 1}, {"id": 1, "title": "Two words", "body": "Two, words", "price": 1})
    async with templated(log):
        await log.rebuild()
    settings, mappings = await made(log)
    assert settings["index.refresh_interval"] == "7s"
    assert settings["index.number_of_replicas"] == "0"
    assert settings["index.gc_deletes"] == "1h"
    assert settings["index.number_of_shards"] == "2"
    # Elasticsearch takes it and does not show it.
    assert settings.get("index.number_of_routing_shards", "4") == "4"
    assert settings["index.analysis.analyzer.loud.type"] == "standard"
    assert mappings["dynamic"] == "strict"
    assert mappings["properties"]["title"]["type"] == "text"
    assert mappings["properties"]["_bridge"]["properties"]["version"] == {"type": "long"}
    assert mappings["_meta"]["generation"] == 1
    assert list(await log.engine.indexes(f"{log.name}-000001-w")) == [f"{log.name}-000001"]
    assert await found(log.engine, log.name, {"match": {"body": "words"}}) == {"1"}
    assert await found(log.engine, log.name, {"match": {"body": "Two"}}) == set()


@pytest.mark.parametrize("dynamic", [False, "strict"])
async def test_the_bridges_own_survive_a_whole_mapping(log: Log, tmp_path: Path, dynamic: Any) -> None:
    file = tmp_path / "mapping.json"
    own = {
        "dynamic": dynamic,
        "_meta": {"team": "x"},
        "properties": {"id": {"type": "long"}, "title": {"type": "text"}},
    }
    file.write_text(json.dumps({"settings": {"refresh_interval": "9s"}, "mappings": own}))
    log.with_index(mapping=str(file), columns=["id", "title"] if dynamic == "strict" else [])
    await log.put("insert", {"id": 1}, {"id": 1, "title": "a", "body": "b", "price": 1})
    await log.rebuild()
    settings, mappings = await made(log)
    assert settings["index.refresh_interval"] == "9s"
    assert str(mappings["dynamic"]).lower() == str(dynamic).lower()
    assert mappings["_meta"]["team"] == "x"
    assert mappings["_meta"]["generation"] == 1
    assert mappings["properties"]["_bridge"]["properties"]["version"] == {"type": "long"}
    assert await log.letters() == []
    assert await found(log.engine, log.name, {"range": {"_bridge.version": {"gt": 1}}}) == {"1"}


async def test_what_the_other_engine_alone_knows_is_refused_by_name(engine: Engine) -> None:
    product = await engine.product()
    other = (
        "index.lifecycle.name" if product.distribution == "opensearch" else "plugins.index_state_management.policy_id"
    )
    with pytest.raises(ConfigError, match=re.escape(other)):
        await design(engine, Index(table="a.b", settings={other: "x"}), None, "any")


# Columns that come later


async def test_a_new_column_gets_its_field_by_what_the_generation_was_built_with(quick: Log) -> None:
    quick.with_index(json="flat", numeric="double")
    await quick.put("insert", {"id": 1}, {"id": 1, "title": "a", "body": "b", "price": 1})
    await quick.rebuild()
    quick.with_index(json="stored", numeric="exact")
    with capture_logs() as logs:
        async with quick.reading():
            await quick.columns({**COLUMNS, "title": "integer", "doc": "jsonb", "cost": "numeric(8,2)"})
            after = {"id": 2, "title": "a", "body": "b", "price": 1, "doc": {"a": 1}, "cost": 2}
            await quick.put("insert", {"id": 2}, after)
            await quick.put("insert", {"id": 3}, {**after, "id": 3, "more": 1})
            await quick.done()
    _, mappings = await made(quick)
    assert mappings["properties"]["doc"]["type"] == "flat_object"
    assert mappings["properties"]["cost"]["type"] == "double"
    changed = [entry for entry in logs if entry["event"] == "columns changed their type"]
    assert [entry["columns"] for entry in changed] == [{"title": "text is integer now"}]
    assert "reindex" in changed[0]["next"]
    differs = [entry for entry in logs if entry["event"] == "configuration differs"]
    assert differs[0]["keys"] == ["json", "numeric"]


# --show-mapping


async def test_what_a_rebuild_would_make_is_shown_and_nothing_made(log: Log) -> None:
    log.with_index(fields={"title": {"type": "keyword"}}, json="flat")
    await log.columns({**COLUMNS, "doc": "jsonb"})
    shown = await preview(log.config, log.name, log.servers)
    product = await log.engine.product()
    assert shown.engine == str(product)
    properties = shown.body["mappings"]["properties"]
    assert properties["title"] == {"type": "keyword", "ignore_above": 8191}
    assert properties["doc"]["type"] == ("flattened" if product.distribution == "elasticsearch" else "flat_object")
    assert shown.body["settings"]["index.gc_deletes"] == "1h"
    assert await log.engine.indexes(f"{log.name}*") == {}
    await log.engine.create(f"{log.name}-shown", json.loads(shown.text))


async def test_what_is_needed_to_show_a_mapping_is_named_and_not_waited_for(quick: Log) -> None:
    with pytest.raises(ServerMissing, match="NATS"):
        await preview(quick.config, quick.name, ["nats://127.0.0.1:1"])
    away = quick.with_index(url=["http://127.0.0.1:1"])
    with pytest.raises(ServerMissing, match="search engine"):
        await preview(away, quick.name, quick.servers)
    other = msgspec.structs.replace(quick.config, state=State(bucket="nobody"))
    with pytest.raises(ServerRefused, match=r"public\.posts is not recorded"):
        await preview(other, quick.name, quick.servers)
    assert await quick.broker.stream("KV_nobody") is None
