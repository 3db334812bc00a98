"""What cannot be had as it is configured is refused before anything is made; what comes later is left out, and said."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from bridge.config import Index, Part
from bridge.errors import ConfigError
from bridge.index.engine import Engine, EngineError, opened
from bridge.index.fieldnames import around, unfit
from bridge.index.indexer import run_index
from bridge.index.mapping import hidden
from bridge.index.place import site
from bridge.index.plan import Options, plan
from bridge.index.preview import preview
from bridge.index.verify import verify
from bridge.stream.state import Column, TableRecord, TableShape
from bridge.stream.subjects import table_key
from tests.integration.feeding import COLUMNS, SCHEMA, TABLE, Log

pytestmark = pytest.mark.anyio

PAGES = {"id": "bigint", "headline": "text"}
NAMES = [
    "_id", "_index", "_source", "_routing", "_seq_no", "_version", "_primary_term", "_field_names", "_ignored",
    "_doc_count", "_nested_path", "_data_stream_timestamp", "_ignored_source", "_tier", "_feature", "_id.x", "x._id",
    "_type", "_meta", "_size", "_tsid", "_parent", "_all", "_score", "_own", "_bridge2", ".a", "a..b", ".", "..", "",
    " ", "\t", "\u3000", "\xa0", "\x85", "a. .b", "a. ", " .b", "\xa0.b", "a.b", "a.b.c", " a", "a ", "a*b", '"', "\n",
    "a.", "a.b.",
]  # fmt: skip


async def refused(log: Log, *words: str) -> str:
    """Refused by all who would make the index or show it, with these words; nothing is made."""
    said = set()
    for ask in (
        lambda: plan(site(log.config, log.name), log.servers, Options()),
        lambda: preview(log.config, log.name, log.servers),
        log.rebuild,
        lambda: run_index(log.config, [log.name], log.servers),
    ):
        with pytest.raises(ConfigError) as error:
            await ask()
        said.add(str(error.value))
    assert len(said) == 1, said
    [text] = said
    assert all(word in text for word in words), text
    assert await log.engine.indexes(f"{log.name}*") == {}
    assert (await log.record()).generations == []
    return text


# Names of columns


@pytest.mark.parametrize(
    ("key", "value"),
    [("soft_delete", "titel"), ("exclude", ["titel"]), ("columns", ["id", "titel"]), ("routing", "titel"),
     ("rename", {"titel": "x"}), ("fields", {"titel": {"type": "keyword"}})],
)  # fmt: skip
async def test_a_column_that_no_table_has_is_refused_with_a_near_one(quick: Log, key: str, value: Any) -> None:
    quick.with_index(**{key: value})
    await refused(quick, f"index.{quick.name}.{key}", "titel", "public.posts", "did you mean title?", "id, title, body")


async def test_a_template_of_another_column_is_refused_everywhere(quick: Log) -> None:
    quick.with_index(id="post-{nr}")
    await refused(quick, "post-{nr}", "public.posts", "must hold all columns of its key", "id")


async def test_what_counts_for_one_of_several_tables_must_be_there(quick: Log) -> None:
    await quick.columns(PAGES, table="pages")
    both: dict[str, Any] = {"table": "", "tables": ["public.posts", "public.pages"]}
    fine = {**both, "exclude": ["price"], "rename": {"headline": "title"}, "soft_delete": "body",
            "fields": {"kind": {"type": "keyword"}}, "constants": {"kind": "x"}}  # fmt: skip
    quick.with_index(**fine)
    assert (await preview(quick.config, quick.name, quick.servers)).body["mappings"]["properties"].keys() == {
        "id", "title", "body", "kind", "_bridge"
    }  # fmt: skip
    quick.with_index(**fine, of={"public.pages": Part(exclude=["price"])})
    await refused(quick, f'index.{quick.name}.of."public.pages".exclude', "price", "public.pages does not have")
    quick.with_index(**fine, routing="body", of={})
    await refused(quick, f"index.{quick.name}.routing", "body", "public.pages does not have")
    quick.with_index(**{**fine, "exclude": ["nothing"]}, routing="")
    await refused(quick, "none of public.posts, public.pages has")


async def test_columns_of_old_may_be_excluded_and_renamed(quick: Log) -> None:
    columns = [Column(name, kind, 0) for name, kind in COLUMNS.items()]
    past = TableShape([*columns, Column("old", "text", 0)], ["id"])
    record = TableRecord(columns, ["id"], [past], hidden=["secret"])
    await quick.state.put(table_key(quick.config.source.name, SCHEMA, TABLE), record)
    quick.with_index(exclude=["old", "secret"])
    await preview(quick.config, quick.name, quick.servers)
    quick.with_index(exclude=[], rename={"old": "older"})
    await preview(quick.config, quick.name, quick.servers)
    quick.with_index(rename={}, soft_delete="old")
    await refused(quick, "soft_delete names the column old")
    quick.with_index(soft_delete="secret")
    await refused(quick, "secret", "exclude` keeps it out")


async def test_fields_may_be_a_transforms_and_parts_of_json(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.with_index(transform="tests.crash_index.transforms:missing")
    await refused(quick, "the transform tests.crash_index.transforms:missing cannot be loaded")
    quick.with_index(transform="tests.unit.test_document:shout", fields={"loud": {"type": "keyword"}})
    monkeypatch.setattr("tests.unit.test_document.shout", lambda row: row, raising=False)
    await preview(quick.config, quick.name, quick.servers)
    monkeypatch.setattr("tests.unit.test_document.shout", "no function", raising=False)
    await refused(quick, "is no function")
    await quick.columns({**COLUMNS, "doc": "jsonb"})
    quick.with_index(transform="", json="object", fields={"doc.a": {"type": "keyword"}})
    await preview(quick.config, quick.name, quick.servers)
    quick.with_index(json="stored")
    await refused(quick, "`fields.doc.a`", "inside of doc", "see `json`")


async def test_a_dropped_column_stops_no_reader(quick: Log) -> None:
    quick.with_index(soft_delete="body", exclude=["price"], rename={"title": "name"})
    await quick.put("insert", {"id": 1}, {"id": 1, "title": "a", "body": None, "price": 1})
    async with quick.reading():
        await quick.done()
        await quick.columns({"id": "bigint"})
        await quick.put("insert", {"id": 2}, {"id": 2})
        await quick.done()
        assert await quick.documents() == {"1": {"id": 1, "name": "a", "body": None}, "2": {"id": 2}}
    with capture_logs() as logs:
        async with quick.reading():
            await quick.put("insert", {"id": 3}, {"id": 3})
            await quick.done()
    gone = [entry for entry in logs if entry["event"] == "columns are gone"]
    assert [entry["columns"] for entry in gone] == [["body", "title"]]
    assert gone[0]["next"] == f"bridge reindex {quick.name}"


# Names of fields


@pytest.mark.parametrize("name", ["_bridge", "_id", "_source", ".a", "a.", "a..b", "_bridge.version"])
async def test_a_field_that_cannot_be_is_refused(quick: Log, name: str) -> None:
    await quick.columns({**COLUMNS, name: "text"})
    await refused(quick, f"the column {name} of public.posts", "rename = {", "exclude = [")
    await quick.columns(COLUMNS)
    quick.with_index(rename={"title": name})
    await refused(quick, f"the column title of public.posts cannot be the field {name!r}")
    quick.with_index(rename={}, constants={name: 1})
    await refused(quick, f"the constant {name} of public.posts")
    quick.with_index(constants={}, exclude=[name], columns=[])
    await quick.columns({**COLUMNS, name: "text"})
    await preview(quick.config, quick.name, quick.servers)


async def test_a_field_inside_of_one_that_is_no_object_is_refused(quick: Log) -> None:
    await quick.columns({**COLUMNS, "title.en": "text"})
    await refused(quick, "the column title.en of public.posts", "inside of title", "the column title of public.posts")
    quick.with_index(rename={"body": "a", "price": "a.b", "title.en": "english"})
    await refused(quick, "the column price of public.posts would be the field a.b", "the column body of public.posts")


@pytest.fixture
async def engine(engine_url: str) -> AsyncIterator[Engine]:
    async with opened(Index(table="a.b", url=[engine_url])) as found:
        yield found


async def taken(engine: Engine, name: str, kind: dict[str, Any], beside: dict[str, Any]) -> bool:
    """Whether an engine has the field: takes it and a document with it, and finds that by it."""
    index = f"names{secrets.token_hex(4)}"
    properties = {"id": {"type": "long"}, **beside, name: kind, "_bridge": hidden()}
    try:
        await engine.create(index, {"mappings": {"dynamic": "strict", "properties": properties}})
        await engine.json("PUT", f"/{index}/_doc/1?refresh=true", {"id": 1, name: "v", "_bridge": {"version": 1}})
        found = await engine.json("POST", f"/{index}/_search", {"query": {"term": {name: "v"}}})
        return bool(found["hits"]["hits"])
    except EngineError:
        return False
    finally:
        if await engine.indexes(index):
            await engine.delete(index)


@pytest.mark.parametrize("engine_url", ["opensearch", "elasticsearch"], indirect=True)
async def test_exactly_what_an_engine_cannot_have_is_unfit(engine: Engine) -> None:
    product = await engine.product()
    assert [
        name for name in NAMES if await taken(engine, name, {"type": "keyword"}, {}) != (unfit(name, product) == "")
    ] == []
    outer: list[dict[str, Any]] = [
        {"type": "keyword"}, {"type": "text"}, {"type": "object", "enabled": False}, {"type": "object"},
        {"type": "object", "dynamic": True}, {"type": "nested"}, {"type": "geo_point"}, {"properties": {}},
    ]  # fmt: skip
    for kind in outer:
        beside = {"a": kind}
        assert await taken(engine, "a.b", {"type": "keyword"}, beside) == (around("a.b", beside) == ""), kind


async def test_dotted_names_make_the_round(log: Log) -> None:
    await log.columns({**COLUMNS, "a.b": "text", "a.c.d": "numeric(8,2)", "x y": "jsonb"})
    row = {"id": 1, "title": "t", "body": "b", "price": 1, "a.b": "one", "a.c.d": 2.5, "x y": {"n": 1}}
    await log.put("insert", {"id": 1}, row)
    await log.rebuild()
    async with log.reading():
        await log.put("update", {"id": 1}, {**{k: v for k, v in row.items() if k != "a.b"}, "title": "u"},
                      unchanged=["a.b"])  # fmt: skip
        await log.done()
        assert await log.documents() == {"1": {**row, "title": "u"}}
        assert [r.same for r in await verify(log.config, log.name, log.servers)] == [True]


async def test_a_column_that_comes_later_and_cannot_be_a_field_is_left_out(
    log: Log, request: pytest.FixtureRequest
) -> None:
    # osmem takes a field inside of a text: there it is left out only from the reader's next start on.
    inside = [] if request.node.callspec.params["engine_url"] == "osmem" else ["title.en"]
    bad = ["_id", "_bridge", *inside, ".a", "a."]
    await log.put("insert", {"id": 1}, {"id": 1, "title": "t"})
    with capture_logs() as logs:
        async with log.reading():
            await log.done()
            for number, name in enumerate(bad, 2):
                await log.columns({**COLUMNS, **dict.fromkeys(bad[: number - 1], "text"), "new": "bigint"})
                for offset in (0, 10):
                    key = number + offset
                    await log.put("insert", {"id": key}, {"id": key, name: "x", "title": "t", "new": 1})
                await log.done()
            assert [r.same for r in await verify(log.config, log.name, log.servers)] == [True]
        async with log.reading():
            await log.put("insert", {"id": 30}, json.dumps({"id": 30, **dict.fromkeys(bad, "x")}))
            await log.done()
            found = await log.documents()
    assert await log.letters() == []
    assert len(found) == 2 + 2 * len(bad)
    assert found.pop("30") == {"id": 30}
    assert all(doc.keys() <= {"id", "title", "new"} for doc in found.values())
    first = [entry for entry in logs if entry["event"] == "column left out"][: len(bad)]
    assert [entry["field"] for entry in first] == bad
    assert all("exclude" in entry["next"] and entry["table"] == "public.posts" for entry in first)
