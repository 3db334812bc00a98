"""No part of a row leaves through the reason of a refusal: planted values against mappings that refuse them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bridge.index.engine import EngineError
from tests.integration.feeding import Log

pytestmark = pytest.mark.anyio

NUMBER = 73910284655
STRICT = {"type": "object", "dynamic": "strict", "properties": {"a": {"type": "long"}}}
FIELDS: dict[str, dict[str, Any]] = {
    "id": {"type": "long"},
    "n": {"type": "integer"},
    "b": {"type": "boolean"},
    "day": {"type": "date", "format": "strict_date"},
    "host": {"type": "ip"},
    "span": {"type": "date_range"},
    "size": {"type": "integer_range"},
    "hosts": {"type": "ip_range"},
    "place": {"type": "geo_point"},
    "area": {"type": "geo_shape"},
    "blob": {"type": "binary"},
    "word": {"type": "keyword"},
    "doc": STRICT,
    "list": {**STRICT, "type": "nested"},
    "free": {"type": "object", "dynamic": True},
    "done": {"type": "completion"},
}
WORDS = [
    "PLANTED-plain",
    "field [PLANTED-b] of type [PLANTED-c] in document with id 'PLANTED-d'",
    "mapper [PLANTED-m] cannot be changed from type [long] to [PLANTED-t]",
    "] introduction of [PLANTED-x] within [PLANTED-y] \" ' \\ \n\t\r [[PLANTED-z]]",
    "PLANTED-" + "long " * 8_000,
    '{"type":"PLANTED-kind","reason":"PLANTED-reason"}',
    "type [PLANTED]: field [PLANTED]",
]
WRONG: list[Any] = [
    *WORDS,
    NUMBER * 1_000_000_000_000,
    {"PLANTED-key": 1},
    {"a": {"PLANTED-key": "PLANTED-value"}},
    {"a": "PLANTED-a", "PLANTED.dotted.key": {"PLANTED-b": 1}},
    {"doc": {"PLANTED-key": {"a": 1}}},
    {"gte": "PLANTED-from", "lte": "PLANTED-to"},
    {"gte": NUMBER, "lte": 1, "PLANTED-bound": 2},
    {"lat": "PLANTED-lat", "lon": NUMBER},
    {"type": "PLANTED-shape", "coordinates": ["PLANTED-c"]},
    {"": "PLANTED-empty", " ": "PLANTED-blank", "field [PLANTED]": 1},
    [["PLANTED-inner"], {"PLANTED-k": 1}],
    [{"a": 1}, {"a": "PLANTED-second"}, {"PLANTED-third": 1}],
]


def documents() -> list[dict[str, Any]]:
    """One wrong value each, and some that are wrong as a whole."""
    found: list[dict[str, Any]] = [{field: value} for field in FIELDS if field != "id" for value in WRONG]
    deep: Any = "PLANTED-deep"
    for _ in range(60):
        deep = {"PLANTED-level": deep}
    found += [
        {"PLANTED column": 1},
        {"free": deep},
        {"free": {f"PLANTED-{number}": 1 for number in range(1_500)}},
        {"free": {"PLANTED-a": 1}},
        {"free": {"PLANTED-a": {"PLANTED-b": 1}}},
        {"free": {"PLANTED-a": "PLANTED-text"}},
        {"free": {"": 1}},
        {"free": {"PLANTED..two": 1}},
        {"word": "PLANTED" * 6_000},
        {"_id": "PLANTED-meta"},
        {"_routing": "PLANTED-meta", "_source": "PLANTED-meta"},
    ]
    return found


async def supported(log: Log, fields: dict[str, dict[str, Any]], *doubtful: str) -> dict[str, dict[str, Any]]:
    """The fields whose types this engine has."""
    found, probe = dict(fields), f"{log.name}-probe"
    for name in doubtful:
        try:
            await log.engine.create(probe, {"mappings": {"properties": {name: fields[name]}}})
        except EngineError:
            del found[name]
        await log.engine.delete(probe)
    return found


def planted(text: str) -> list[str]:
    """What of the planted values a text shows."""
    low = text.lower()
    return [low[max(0, at - 80) : at + 40] for word in ("planted", str(NUMBER)) if (at := low.find(word)) >= 0]


async def test_no_value_and_no_name_inside_a_value_is_shown(
    log: Log, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mapping.json"
    fields = await supported(log, FIELDS, "area", "done", "place")
    file.write_text(json.dumps({"mappings": {"dynamic": "strict", "properties": fields}}))
    log.with_index(mapping=str(file), reject_limit=1.0)
    await log.columns(dict.fromkeys(FIELDS, "text"))
    found = documents()
    for number, document in enumerate(found):
        await log.publish("insert", log.wire("insert", {"id": number}, {"id": number, **document}))
    async with log.reading():
        await log.done(seconds=120)
    letters = await log.letters()
    assert len(letters) > len(found) / 4
    reasons = {letter["reason"] for letter in letters}
    assert len(reasons) > 10
    assert any("[doc]" in reason for reason in reasons)
    assert any("[n, integer]" in reason for reason in reasons)
    for letter in letters:
        assert planted(json.dumps({name: part for name, part in letter.items() if name not in ("key", "id")})) == []
    output = capfd.readouterr()
    assert "dead letter" in output.out
    assert planted(output.out + output.err) == []
    assert planted(msgspec.json.encode(await log.record()).decode()) == []


async def test_ids_and_routing_that_an_engine_refuses_are_not_shown(
    log: Log, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mapping.json"
    join = {"type": "join", "relations": {"question": "answer"}}
    fields = await supported(log, {"id": {"type": "text"}, "tree": join}, "tree")
    file.write_text(json.dumps({"mappings": {"properties": fields}}))
    log.with_index(mapping=str(file), reject_limit=1.0)
    await log.columns({"id": "text", "tree": "jsonb"})
    rows: list[dict[str, Any]] = [
        {"id": "PLANTED-1", "tree": {"name": "answer", "parent": "PLANTED-parent"}},
        {"id": "PLANTED-2", "tree": {"name": "PLANTED-relation"}},
        {"id": "PLANTED-3", "tree": {"name": "answer"}},
        {"id": "PLANTED-4", "tree": "PLANTED-nobody"},
        {"id": "PLANTED-" + "5" * 2_000, "tree": "question"},
        {"id": "PLANTED-6 [field [x]] \n ' \"", "tree": 5},
    ]
    for one in rows:
        await log.publish("insert", log.wire("insert", {"id": one["id"]}, one))
    async with log.reading():
        await log.done()
    for letter in await log.letters():
        assert planted(json.dumps({name: part for name, part in letter.items() if name not in ("key", "id")})) == []
    output = capfd.readouterr()
    assert planted(output.out + output.err) == []
    assert planted(msgspec.json.encode(await log.record()).decode()) == []
