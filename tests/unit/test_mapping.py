"""PostgreSQL types → mapping: nothing refused, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.config import Index
from bridge.errors import ConfigError
from bridge.index import dialect, mapping
from bridge.index.columns import changed, known_types
from bridge.index.dialect import Product
from bridge.index.document import Shape
from bridge.index.generation import Generation, IndexRecord, differences, origin
from bridge.index.mapping import Choices
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
        ("int4range", "integer_range"),
        ("int8range[]", "long_range"),
        ("numrange", "double_range"),
        ("daterange", "date_range"),
        ("tsmultirange", "date_range"),
        ("cidr", "ip_range"),
        ("point", "keyword"),
        ("box", "keyword"),
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


# Engines


NODE = {"version": "8.19.21", "modules": [{"name": "mapper-extras"}, {"name": "spatial"}, {"name": "x-pack-core"}]}


@pytest.mark.parametrize(
    ("root", "node", "expected"),
    [
        ({}, NODE, "Elasticsearch 8.19"),
        ({"version": {"number": "9.5.3"}, "tagline": "You Know, for Search"}, {}, "Elasticsearch 9.5"),
        ({"version": {"number": "2.19.1", "distribution": "opensearch"}}, {"version": "2.19.1"}, "OpenSearch 2.19"),
        # Set to look like Elasticsearch, for old clients.
        ({"version": {"number": "7.10.2", "distribution": "opensearch"}}, {"version": "1.3.0"}, "OpenSearch 1.3"),
        ({"version": {"number": "3.8.0", "distribution": "opensearch"}}, {"version": "3.8.0"}, "OpenSearch 3.8"),
        ({}, {"version": "2.4.0", "plugins": [{"name": "opensearch-geospatial"}]}, "OpenSearch 2.4"),
        ({"version": {"number": "47.0", "distribution": "opensearch"}}, {}, "OpenSearch 47.0"),
        ({}, {}, "an unknown search engine"),
    ],
)
def test_an_engine_is_known_by_its_answers(root: dict[str, Any], node: dict[str, Any], expected: str) -> None:
    assert str(dialect.recognized(root, {"nodes": {"x": node}} if node else {})) == expected


def chosen(distribution: str, *version: int, parts: list[str] | None = None, **choices: Any) -> Choices:
    return Choices(product=Product(distribution, (version[0], version[1]), parts), **choices)


def test_types_have_the_names_that_the_engine_has_for_them() -> None:
    for engine, flat, point in [
        (("elasticsearch", 7, 2), "object", "keyword"),
        (("elasticsearch", 7, 17), "flattened", "point"),
        (("elasticsearch", 99, 0), "flattened", "point"),
        (("opensearch", 1, 3), "object", "keyword"),
        (("opensearch", 2, 6), "object", "xy_point"),
        (("opensearch", 3, 8), "flat_object", "xy_point"),
        (("", 0, 0), "object", "keyword"),
    ]:
        found = chosen(*engine, json="flat")
        assert mapping.field("jsonb", found)["type"] == flat
        assert mapping.field("point", found)["type"] == point
        assert bool(mapping.lacking(found)) == (flat == "object")


def test_what_a_small_build_lacks_is_not_used() -> None:
    bare = chosen("elasticsearch", 8, 19, parts=["x-pack-core"], numeric="scaled_float:100")
    assert mapping.field("point", bare)["type"] == "keyword"
    assert mapping.field("numeric", bare)["type"] == "double"
    assert "scaled_float" in mapping.lacking(bare)[0]
    whole = chosen("elasticsearch", 8, 19, parts=["spatial", "mapper-extras"], numeric="scaled_float:100")
    assert mapping.field("point", whole)["type"] == "point"
    assert mapping.field("numeric(9,2)[]", whole) == {
        "type": "scaled_float", "scaling_factor": 100.0, "ignore_malformed": True,
    }  # fmt: skip
    assert mapping.lacking(whole) == []


def test_settings_of_the_other_engine_are_named() -> None:
    here, there = Product("opensearch", (2, 19)), Product("elasticsearch", (8, 19))
    assert "index.lifecycle.name" in dialect.foreign(here, ["index.lifecycle.name", "index.codec"])
    assert dialect.foreign(there, ["index.lifecycle.name"]) == ""
    assert "index.plugins" in dialect.foreign(there, ["index.plugins.index_state_management.policy_id"])
    assert dialect.foreign(Product(), ["index.lifecycle.name"]) == ""


# Choices


def test_fields_replace_those_of_their_columns_and_keep_the_guards() -> None:
    own: dict[str, dict[str, Any]] = {"body": {"type": "keyword"}, "score": {"type": "long", "ignore_malformed": False}}
    found = fields(chosen=Choices(fields=own))
    assert found["body"] == {"type": "keyword", "ignore_above": 8191}
    assert found["score"] == {"type": "long", "ignore_malformed": False}
    assert found["secret"]["type"] == "text"


def test_what_is_in_a_guessed_object_takes_most_values() -> None:
    columns = [Column("doc", "jsonb", 0)]
    properties = mapping.fields(columns, keep=[], exclude=[], rename={}, chosen=Choices(json="object"))
    made = mapping.mappings(properties, {})
    assert made["properties"]["doc"] == {"type": "object", "dynamic": True}
    templates = {name: part for entry in made["dynamic_templates"] for name, part in entry.items()}
    assert templates["doc_long"]["mapping"] == {"type": "double", "ignore_malformed": True}
    assert templates["doc_date"]["mapping"]["type"] == "text"
    assert {part["path_match"] for part in templates.values()} == {"doc.*"}
    assert "dynamic_templates" not in mapping.mappings(fields(), {})


@pytest.mark.parametrize("source", [{"enabled": False}, {"excludes": ["body"]}, {"includes": ["id"]}])
def test_a_mapping_that_keeps_documents_from_being_read_is_refused(source: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="_source"):
        mapping.mappings({}, {}, own={"_source": source})


def test_what_templates_say_of_a_replays_settings_is_kept() -> None:
    simulated = {"template": {"settings": {"index": {"refresh_interval": "7s", "codec": "x"}}}}
    assert mapping.inherited(simulated, "a-000001") == {"index.refresh_interval": "7s"}
    older = {
        "b": {"index_patterns": ["a-*"], "order": 2, "settings": {"number_of_replicas": "2"}},
        "a": {"index_patterns": ["*"], "order": 1, "settings": {"number_of_replicas": "1", "refresh_interval": "1s"}},
        "c": {"index_patterns": ["z-*"], "order": 3, "settings": {"number_of_replicas": "9"}},
    }
    assert mapping.inherited(older, "a-000001") == {"index.number_of_replicas": "2", "index.refresh_interval": "1s"}
    assert mapping.inherited({}, "a-000001") == {}


# Generations


def generation(**changes: Any) -> Generation:
    index = Index(table="public.posts")
    return Generation(
        number=1, physical="p-000001", consumer="p-000001", state="live", shapes={"public.posts": Shape()},
        settings={}, mapping={}, stream="s", stream_created="", first=1, seq=0,
        **{"origin": origin(index, None), **changes},
    )  # fmt: skip


def test_a_change_of_type_counts_where_the_field_would_be_another() -> None:
    before = {"a": "integer", "b": "character varying(20)", "c": "numeric", "d": "text", "e": "integer"}
    made = generation(types={"public.posts": before}, choices=Choices(numeric="double", fields={"e": {"type": "long"}}))
    now = {"a": "bigint", "b": "text", "c": "double precision", "d": "jsonb", "e": "text", "new": "text"}
    columns = [Column(name, kind, 0) for name, kind in now.items()]
    assert changed(made, "public.posts", Shape(exclude=["d"]), columns) == {"a": "integer is bigint now"}
    assert changed(generation(), "public.posts", Shape(), columns) == {}
    types = known_types(made, "public.posts", columns)
    assert (types["a"], types["new"]) == ("integer", "text")


def test_what_a_record_from_before_a_key_does_not_say_was_its_default() -> None:
    index = Index(table="public.posts")
    then = {key: value for key, value in origin(index, None).items() if key not in ("numeric", "json", "fields")}
    record = IndexRecord(generation=1, generations=[generation(origin=then)])
    assert differences(index, None, record) == []
    changed_index = Index(table="public.posts", json="flat", fields={"a": {"type": "long"}}, numeric="double")
    assert differences(changed_index, None, record) == ["fields", "json", "numeric"]
