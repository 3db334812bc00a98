"""Addresses of documents: different rows of an index never share one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import event
from bridge.index.naming import LONGEST_ID, Naming, Rejected, Template, address, opening, parts, sibling


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value).encode())


def row(**columns: Any) -> dict[str, msgspec.Raw]:
    return {name: raw(value) for name, value in columns.items()}


def an_event(op: event.Op, key: Any, after: Any = None, before: Any = None, **more: Any) -> event.Event:
    parts: dict[str, Any] = {
        name: raw(value) for name, value in (("after", after), ("before", before)) if value is not None
    }
    return event.Event(op=op, source="main", schema="s", table="t", key=raw(key), **parts, **more)


texts = st.text(alphabet=st.sampled_from("ab-|%'\\#1"), max_size=4)


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_a_template_gives_different_keys_different_ids(one: tuple[str, str], other: tuple[str, str]) -> None:
    made = Template("x-{a}-{b}")
    ids = [made.id(row(a=a, b=b)) for a, b in (one, other)]
    assert (ids[0] == ids[1]) == (one == other)


@given(texts, texts, st.integers(1, 3))
def test_a_further_document_has_the_id_of_no_row(one: str, other: str, number: int) -> None:
    for naming in (Naming(), Naming("{a}"), Naming(prefix="s.t|")):
        assert sibling(naming.id(row(a=one)), number) != naming.id(row(a=other))


def test_templates_read_as_they_look() -> None:
    assert Template("post-{id}").id(row(id=42)) == "post-42"
    assert Template("{name}").id(row(name="a-b|c%")) == "a-b%7Cc%25"
    assert Template("{{{a}}}").id(row(a=1)) == "{1}"
    assert Template("{a}").id(row(a="")) == "'"
    assert len(Template("{a}").id(row(a="é" * 600))) == 65
    with pytest.raises(Rejected, match="no column id"):
        Template("{id}").id(row(a=1))


def test_tables_of_one_index_begin_differently() -> None:
    assert opening("", "public", "posts") == "public.posts|"
    assert opening("", "a.b", "c") != opening("", "a", "b.c")
    assert opening("post-{id}", "public", "posts") == "post-"
    assert Naming(prefix="public.posts|").id(row(id=42)) == "public.posts|42"


def test_addresses_come_apart_again() -> None:
    assert parts(address("42", "eu|1")) == ("42", "eu|1")
    assert parts(address("42", "")) == ("42", "")
    assert parts(sibling(address("42", "eu"), 3)) == ("42||3", "eu")
    assert len(parts(sibling("x" * LONGEST_ID, 1))[0]) == 65


def test_routing_by_a_column_of_the_key() -> None:
    made = Naming(routing="tenant")
    key = {"tenant": "eu", "id": 1}
    assert made.identity(an_event("insert", key, {**key, "a": 1})) == (address("eu|1", "eu"), None)
    assert made.identity(an_event("update", key, {**key, "a": 2})) == (address("eu|1", "eu"), None)
    assert made.identity(an_event("delete", key)) == (address("eu|1", "eu"), None)
    moved = an_event("update", {"tenant": "us", "id": 1}, {"tenant": "us", "id": 1}, before=key)
    assert made.identity(moved) == (address("us|1", "us"), address("eu|1", "eu"))


def test_routing_by_another_column_needs_the_old_row() -> None:
    made = Naming(routing="tenant")
    new, old = {"id": 1, "tenant": "us"}, {"id": 1, "tenant": "eu"}
    assert made.identity(an_event("insert", {"id": 1}, new)) == (address("1", "us"), None)
    assert made.identity(an_event("update", {"id": 1}, new, before=old)) == (address("1", "us"), address("1", "eu"))
    assert made.identity(an_event("update", {"id": 1}, new, before=new)) == (address("1", "us"), None)
    assert made.identity(an_event("delete", {"id": 1}, before=old)) == (address("1", "eu"), None)
    assert made.identity(an_event("insert", {"id": 1}, {"id": 1, "tenant": None})) == ("1", None)
    kept = an_event("update", {"id": 1}, {"id": 1}, before=old, unchanged=("tenant",))
    assert made.identity(kept) == (address("1", "eu"), None)
    for blind in (an_event("update", {"id": 1}, new), an_event("delete", {"id": 1})):
        with pytest.raises(Rejected, match="REPLICA IDENTITY FULL"):
            made.identity(blind)
