"""PostgreSQL types → mapping: nothing refused, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.index import mapping
from bridge.stream.state import Column


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("text", "text"),
        ("character varying(20)", "text"),
        ("character(3)", "text"),
        ("integer", "integer"),
        ("smallint", "integer"),
        ("bigint", "long"),
        ("real", "float"),
        ("double precision", "double"),
        ("numeric(10,2)", "keyword"),
        ("boolean", "boolean"),
        ("date", "date"),
        ("timestamp(3) with time zone", "date"),
        ("timestamp without time zone", "date"),
        ("time without time zone", "keyword"),
        ("uuid", "keyword"),
        ("inet", "ip"),
        ("bytea", "binary"),
        ("text[]", "text"),
        ("bigint[]", "long"),
        ('shop."Mood"', "keyword"),
        ("int4range", "keyword"),
    ],
)
def test_a_type_has_its_field(kind: str, expected: str) -> None:
    assert mapping.field(kind)["type"] == expected


def test_values_that_the_engine_cannot_index_are_kept_and_not_refused() -> None:
    for kind in ("real", "double precision", "date", "timestamp with time zone", "inet"):
        assert mapping.field(kind)["ignore_malformed"] is True
    number = mapping.field("numeric")
    assert number["ignore_above"] <= 32_766 // 4
    assert number["fields"]["number"] == {"type": "double", "ignore_malformed": True}
    assert mapping.field("jsonb") == {"type": "object", "enabled": False}
    assert mapping.field("text")["fields"]["keyword"]["ignore_above"] == 256


@pytest.mark.parametrize("kind", ["text", "jsonb", "bytea", "numeric(9,3)", "integer[]", "public.composed", "", "xml"])
def test_what_postgres_may_store_out_of_line(kind: str) -> None:
    assert mapping.toastable(kind)


@pytest.mark.parametrize("kind", ["integer", "timestamp(6) with time zone", "uuid", "boolean", '"char"'])
def test_what_postgres_never_stores_out_of_line(kind: str) -> None:
    assert not mapping.toastable(kind)


def fields(**options: Any) -> dict[str, Any]:
    columns = [Column("id", "bigint", 20), Column("body", "text", 25), Column("secret", "text", 25)]
    options = {"keep": [], "exclude": [], "rename": {}, **options}
    found = mapping.fields(columns, **options)
    assert isinstance(found, dict)
    return found


def test_fields_follow_columns_exclude_and_rename() -> None:
    assert list(fields()) == ["id", "body", "secret"]
    assert list(fields(exclude=["secret"], rename={"body": "text"})) == ["id", "text"]
    assert list(fields(keep=["id"])) == ["id"]


def test_our_field_and_meta_are_in_every_mapping() -> None:
    own = {"dynamic": False, "properties": {"a": {"type": "keyword"}}, "_meta": {"team": "x"}}
    for given in (None, own, {"mappings": own}):
        made = mapping.mappings(fields(), {"generation": 3}, own=given)
        assert made["properties"]["_bridge"]["dynamic"] is False
        assert made["properties"]["_bridge"]["properties"]["version"] == {"type": "long"}
        assert made["_meta"]["generation"] == 3
        if given is not None:
            assert list(made["properties"]) == ["a", "_bridge"]
            assert made["_meta"]["team"] == "x"
    assert own["properties"] == {"a": {"type": "keyword"}}


def test_unknown_columns_are_refused_by_the_engine_unless_a_transform_makes_the_documents() -> None:
    assert mapping.mappings(fields(), {})["dynamic"] == "strict"
    assert mapping.mappings({}, {}, guessed=True)["dynamic"] is True


def test_settings_of_a_replay_are_restored_to_the_users_or_the_engines_own() -> None:
    own = {"index": {"refresh_interval": "5s"}, "number_of_shards": 3, "index.codec": "best_compression"}
    assert mapping.settings(own, replaying=True) == {
        "index.gc_deletes": "1h",
        "index.mapping.total_fields.limit": 1_000,
        "index.refresh_interval": "-1",
        "index.number_of_replicas": 0,
        "index.number_of_shards": 3,
        "index.codec": "best_compression",
    }
    assert mapping.restored(own) == {"index.refresh_interval": "5s", "index.number_of_replicas": None}
    expanding = {"auto_expand_replicas": "0-1"}
    assert "index.auto_expand_replicas" not in mapping.settings(expanding, replaying=True)
    assert mapping.restored(expanding) == {"index.refresh_interval": None, "index.auto_expand_replicas": "0-1"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, "boolean"), (1, "long"), (1.5, "double"), ("x", "text"), ([1], "object"), ({}, "object")],
)
def test_a_field_without_a_column_is_guessed_from_its_value(value: Any, expected: str) -> None:
    assert mapping.guess(value)["type"] == expected


def test_the_limit_of_fields_follows_the_columns() -> None:
    limit = "index.mapping.total_fields.limit"
    columns = [Column(f"c{n}", "text", 0) for n in range(1_200)]
    fields = mapping.mappings(mapping.fields(columns, keep=[], exclude=[], rename={}), {})
    assert mapping.count(fields) == 2 * 1_200 + 4
    assert mapping.settings({}, replaying=True, fields=mapping.count(fields))[limit] == 4_808
    own = {"mapping": {"total_fields": {"limit": 9}}}
    assert mapping.settings(own, replaying=True, fields=2_000)[limit] == 9
