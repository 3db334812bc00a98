"""Columns that the catalogue has and the log not yet."""

from __future__ import annotations

import msgspec

from bridge.pipeline.layout import young
from bridge.source.catalog import Column, Relation
from bridge.source.wal2json import Action, Cell, Record
from bridge.stream.state import Column as Kept
from bridge.stream.state import TableRecord


def relation(*names: str) -> Relation:
    columns = tuple(Column(name, 25, "text", toast=True, virtual=False) for name in names)
    return Relation(
        oid=1, schema="public", table="t", kind="r", root=("public", "t"), identity="d", key=("id",), columns=columns
    )


def kept(*names: str, since: dict[str, str] | None = None) -> TableRecord:
    return TableRecord([Kept(name, "text", 25) for name in names], ["id"], since=since or {})


def change(action: Action, *names: str) -> Record:
    cells = [Cell(name, 25) for name in names]
    return Record(action=action, lsn="0/0", columns=cells)


def test_a_column_isyoung_until_a_change_shows_it() -> None:
    today = relation("id", "a", "b")
    assert young(today, kept("id", "a"), set(), change("U", "id", "a"), "5") == {"b"}
    assert young(today, kept("id", "a"), set(), change("U", "id", "b"), "5") == set()
    assert young(today, kept("id", "a"), {"b"}, change("U", "id"), "5") == set()
    assert young(today, msgspec.structs.replace(kept("id", "a"), hidden=["b"]), set(), None, "5") == set()


def test_until_the_change_that_showed_it_comes_once_more_it_isyoung_again() -> None:
    today, record = relation("id", "a", "b"), kept("id", "a", "b", since={"b": "5"})
    assert young(today, record, set(), change("U", "id", "a"), "4") == {"b"}
    assert young(today, record, set(), change("U", "id", "a", "b"), "5") == set()
    assert young(today, record, set(), change("U", "id", "a"), "6") == set()


def test_a_column_that_may_be_another_one_renamed_is_there() -> None:
    assert young(relation("id", "b"), kept("id", "a"), set(), change("U", "id"), "5") == set()


def test_of_a_table_that_nobody_knows_only_an_insert_tells() -> None:
    today = relation("id", "a", "b")
    assert young(today, None, set(), change("I", "id", "a"), "5") == {"b"}
    assert young(today, None, set(), change("U", "id"), "5") == set()
    assert young(today, None, set(), None, "5") == set()
