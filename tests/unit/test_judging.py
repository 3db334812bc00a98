"""Which differences of a table's catalogue have changed its rows behind the log's back."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from bridge.pipeline.altering import MOST, Altering
from bridge.pipeline.judging import Verdict, begun_since, judge, marked, shape, told, turned
from bridge.source import catalog
from bridge.source.altering import Snapshot
from bridge.source.rows import Plan, field, plan
from bridge.source.shapes import Column, Part, Today
from bridge.source.values import Codec
from bridge.stream.state import Again, SnapshotStatus, Turned

CODEC = Codec(str.encode, raw=True)
PLAIN = Part(10, "public", "t", 10, 700, "", True, ["id"], [], True)
FIRST = Part(20, "public", "p1", 20, 700, "700 ", True, ["id"], [], True)
SECOND = Part(21, "public", "p2", 21, 700, "700 ", True, ["id"], [], True)
COLUMNS = [Column(1, "id", 23, "integer"), Column(2, "body", 25, "text"), Column(3, "n", 23, "integer")]
T = Today("public", "t", 10, 700, 1, COLUMNS, [PLAIN], True)
P = Today("public", "p", 11, 700, 1, COLUMNS, [FIRST, SECOND], True)


def seen(before: Today, now: Today, **more: Any) -> Verdict:
    return judge(shape(before), now, more.pop("truncated", lambda _: False), **more)


def columns(*found: Column) -> Today:
    return replace(T, columns=list(found))


HARMLESS = {
    "nothing": T,
    "may be null": replace(T, columns=[*COLUMNS, Column(4, "new", 23, "integer")]),
    "dropped": columns(*COLUMNS[:2]),
    "another length": columns(COLUMNS[0], Column(2, "body", 25, "text(5)"), COLUMNS[2]),
    "text that is called otherwise": columns(COLUMNS[0], Column(2, "body", 1043, "character varying"), COLUMNS[2]),
    "another owner": replace(T, owner=2, named=800),
    "written in pg_class": replace(T, parts=[replace(PLAIN, by=800)]),
}


@pytest.mark.parametrize("now", HARMLESS.values(), ids=HARMLESS)
def test_no_row_is_changed(now: Today) -> None:
    assert seen(T, now) == Verdict([], [], [])


REWRITTEN = [
    (replace(T, oid=12, parts=[replace(PLAIN, oid=12, file=12)]), "another table has its name now"),
    (replace(T, named=800), "it had another name for a time"),
    (
        replace(T, columns=[*COLUMNS, Column(4, "x", 23, "integer")], parts=[replace(PLAIN, missing=["x"])]),
        "x added with",
    ),
    (columns(COLUMNS[0], Column(2, "text", 25, "text"), COLUMNS[2]), "column body renamed to text"),
    (columns(COLUMNS[0], COLUMNS[2], Column(4, "body", 25, "text")), "column body dropped and made again"),
    (columns(COLUMNS[0], COLUMNS[1], Column(3, "n", 20, "bigint")), "type of n: integer → bigint"),
    (replace(T, parts=[replace(PLAIN, file=99)]), "all rows written anew"),
    (replace(T, parts=[replace(PLAIN, key=["n"])]), "key (id) is (n) now"),
    (replace(T, parts=[replace(PLAIN, key=[])]), "key (id) is () now"),
    (replace(P, parts=[FIRST, replace(SECOND, file=99)]), "partition public.p2: all rows written anew"),
    (replace(P, parts=[FIRST, replace(SECOND, key=["n"])]), "partition public.p2: key (id) is (n) now"),
    (replace(P, parts=[FIRST, replace(SECOND, table="old")]), "partition public.p2 renamed to public.old"),
    (replace(P, parts=[replace(FIRST, table="p2")]), "another partition is called public.p2 now"),
]


@pytest.mark.parametrize(("now", "what"), REWRITTEN, ids=[what for _, what in REWRITTEN])
def test_rows_are_changed(now: Today, what: str) -> None:
    assert what in told(seen(T if now.table == "t" else P, now).seen)


def test_a_column_that_was_dropped_is_remembered_until_the_table_is_read() -> None:
    without, again = columns(*COLUMNS[:2]), columns(*COLUMNS[:2], Column(4, "n", 23, "integer"))
    kept = shape(without, shape(T))
    assert kept.former == ["n"]
    assert judge(kept, again, lambda _: False).seen == ["column n dropped and made again"]
    assert shape(again, kept).former == []
    assert not judge(shape(without), again, lambda _: False).seen


def test_a_table_that_comes_back_was_away() -> None:
    assert judge(replace(shape(T), gone=True), T, lambda _: False).seen == ["it was not there for a time"]


def test_a_new_file_is_no_rewrite_where_a_truncate_made_it() -> None:
    now = replace(T, parts=[replace(PLAIN, file=99)])
    assert seen(T, now, truncated=lambda part: part.file == 99) == Verdict([], [], [])
    assert "column body renamed" in told(
        seen(T, replace(now, columns=[COLUMNS[0], Column(2, "b", 25, "text")]), truncated=lambda _: True).seen
    )


def test_what_is_hidden_does_not_count() -> None:
    now = replace(T, columns=[*COLUMNS, Column(4, "x", 23, "integer")], parts=[replace(PLAIN, missing=["x"])])
    assert seen(T, now, hidden={"x"}).seen == []
    other = columns(COLUMNS[0], COLUMNS[1], Column(3, "n", 20, "bigint"))
    assert seen(T, other, hidden={"n"}).seen == []
    renamed = columns(COLUMNS[0], COLUMNS[1], Column(3, "m", 23, "integer"))
    assert seen(T, renamed, hidden={"n"}).seen == ["column n renamed to m"]


def test_partitions_come_and_go() -> None:
    third = Part(22, "public", "p3", 22, 800, "800 ", True, ["id"], [], True)
    assert seen(P, replace(P, parts=[FIRST, SECOND, third])) == Verdict([], [], [])
    anew = replace(third, file=99)
    assert seen(P, replace(P, parts=[FIRST, SECOND, anew])).attached == [anew]
    assert seen(P, replace(P, parts=[FIRST, SECOND, anew]), truncated=lambda _: True).attached == []
    loose = replace(third, inplace=False)
    assert seen(P, replace(P, parts=[FIRST, SECOND, loose])).attached == [loose]
    back = replace(FIRST, link="900 ")
    assert seen(P, replace(P, parts=[back, SECOND])) == Verdict([], [], [back])
    assert seen(P, replace(P, parts=[FIRST])) == Verdict([], ["public.p2"], [])
    assert seen(P, P, met={(22, "public.p3"), (20, "public.p1")}) == Verdict([], ["public.p3"], [])
    assert seen(P, P, met={(20, "public.x")}).seen == ["partition public.x renamed to public.p1"]
    renamed = seen(P, replace(P, parts=[FIRST]), met={(21, "public.x")})
    assert renamed == Verdict([], ["public.p2", "public.x"], [])


def test_what_was_seen_is_told_in_one_line() -> None:
    assert told(["a", "b", "a"]) == "a; b"
    assert told([str(n) for n in range(1500)]) == "0; 1; 2; 3 and 1,496 more"


def altering(*xids: int, truncates: tuple[int, ...] = ()) -> Altering:
    """Of transactions that committed in this order."""
    found = Altering()
    for start, xid in enumerate(xids):
        found.began(xid, start)
    for xid in truncates:
        found.truncate("public", "t", xid)
    return found


@pytest.mark.parametrize(
    ("xids", "truncates", "by", "expected"),
    [
        ([700], [700], 700, True),
        ([700], [], 700, False),
        ([700, 710], [700], 710, False),
        ([700, 710], [700], 700, True),
        ([700, 710], [700, 710], 710, True),
        # Subtransactions.
        ([700], [700], 701, True),
        ([700, 690], [700], 701, False),
        ([690, 700], [700], 701, True),
        ([700, 690], [700, 690], 701, True),
        ([700, 690, 710], [700, 710], 711, True),
        ([700, 690, 710], [700, 710], 701, False),
        ([700, 710], [700], 705, True),
        ([710], [710], 705, False),
        # The circle of 32 bits.
        ([0xFFFFFFFF], [0xFFFFFFFF], 3, True),
        ([5], [5], 0xFFFFFFFF, False),
    ],
)
def test_a_truncate_explains_a_file(xids: list[int], truncates: list[int], by: int, expected: bool) -> None:
    found, everything = altering(*xids, truncates=tuple(truncates)), Snapshot(1000, frozenset())
    assert found.truncated(replace(PLAIN, by=by), everything) is expected
    assert not found.truncated(replace(PLAIN, by=by, schema="other"), everything)


def test_a_truncate_that_was_not_to_be_seen_yet_explains_nothing() -> None:
    found, earlier = altering(700, 690, truncates=(690,)), Snapshot(1000, frozenset({690}))
    assert not found.truncated(replace(PLAIN, by=701), earlier)
    found = altering(700, 690, truncates=(700,))
    assert found.truncated(replace(PLAIN, by=701), earlier)


def test_what_was_looked_at_is_forgotten() -> None:
    found = altering(700, 710, 720, truncates=(700, 720))
    assert found.news.is_set()
    found.seen(Snapshot(720, frozenset({710})))
    assert set(found.xids) == {710, 720}
    later = Snapshot(721, frozenset())
    assert not found.truncated(replace(PLAIN, by=700), later)
    assert found.truncated(replace(PLAIN, by=720), later)


def test_memory_is_bounded_where_nobody_looks() -> None:
    found = altering(*range(MOST + 5), truncates=(MOST + 1,))
    assert set(found.xids) == set(range(MOST, MOST + 5))


DONE = SnapshotStatus(state="done", first_seq=3, complete_from=3)


def again(state: Any, **more: Any) -> SnapshotStatus:
    return replace(DONE, again=Again(state=state, **more))


@pytest.mark.parametrize(
    ("before", "reads", "expected"),
    [
        (DONE, True, Again(state="requested", asked="now")),
        (DONE, False, None),
        (again("running", first_seq=9, after=["1"], where="x"), True, Again(state="requested", asked="now")),
        (again("waiting", first_seq=9), False, Again(state="requested", asked="now")),
        (again("paused", first_seq=9, after=["1"]), True, Again(state="paused", why="what", asked="now")),
        (again("failed", first_seq=9, why="no right"), False, Again(state="failed", why="no right", asked="now")),
    ],
)
def test_a_table_is_marked_and_asked_for(before: SnapshotStatus, reads: bool, expected: Again | None) -> None:
    found = marked(before, "what", "now", reads=reads)
    assert (found.state, found.error, found.complete_from, found.again) == ("incomplete", "what", 3, expected)


@pytest.mark.parametrize(
    ("state", "reads", "expected"),
    [("failed", True, "requested"), ("failed", False, "failed"), ("paused", True, "paused")],
)
def test_why_a_reading_of_another_table_failed_is_past(state: str, reads: bool, expected: str) -> None:
    found = marked(again(state, why="dropped"), "what", "now", reads=reads, another=True).again
    assert found is not None
    assert found.state == expected
    assert found.why == {"requested": "", "failed": "what", "paused": "dropped"}[expected]


def test_what_was_never_complete_stays_so() -> None:
    never = SnapshotStatus(state="incomplete", error="rows are missing")
    assert marked(never, "what", "now", reads=True) == replace(never, again=Again(state="requested", asked="now"))
    once = replace(DONE, state="incomplete", error="before")
    assert marked(once, "what", "now", reads=False).error == "what"
    under_way = SnapshotStatus(state="running", first_seq=5)
    assert marked(under_way, "what", "now", reads=True).state == "running"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (replace(DONE, mode="incremental", first_seq=10), True),
        (replace(DONE, mode="incremental", first_seq=9), False),
        (replace(DONE, first_seq=10), False),
        (replace(DONE, mode="incremental", first_seq=10, state="incomplete"), False),
        (again("running", first_seq=10), True),
        (again("running", first_seq=9), False),
        (again("requested"), False),
        (again("paused", first_seq=10), False),
    ],
)
def test_a_reading_that_began_since_heals(status: SnapshotStatus, expected: bool) -> None:
    assert begun_since(status, 10) is expected


def written(
    now: Today, *names: str, key: tuple[str, ...] = ("id",), oid: int = 10, large: tuple[str, ...] = ()
) -> Plan:
    """A plan of today's table that was adapted to a change with these columns."""
    there = tuple(catalog.Column(c.name, c.oid, c.type, toast=c.oid == 25, virtual=False) for c in now.columns)
    table = ("public", now.table)
    relation = catalog.Relation(oid, *table, kind="r", root=table, identity="d", key=("id",), columns=there)
    oids = {c.name: c.oid for c in now.columns}
    made = plan(relation, "main", "cdc.main", {c.oid: CODEC for c in now.columns})
    fields = {name: field(name, oids.get(name, 25), CODEC, name in key) for name in (*names, *large)}
    return replace(made, fields=fields, key=key)


BACK = "had another name or type for a time"
ALL = ("id", "body", "n")
TURNS = {
    "nothing": (written(T, *ALL), None, []),
    "another name": (written(T, "id", "text", "n"), None, [f"column body {BACK}"]),
    "a large value left out": (written(T, "id", "n", large=("body",)), {"id", "n"}, []),
    "a large value that may have another name": (
        written(T, "id", "text", "n", large=("body",)), {"id", "text", "n"}, [f"column body {BACK}"]
    ),
    "a column that came and went": (written(T, *ALL, "new"), set(ALL) | {"new"}, []),
    "another key": (written(T, *ALL, key=("n",)), None, ["it had another key for a time"]),
    "another table": (written(T, "id", oid=99), None, []),
}  # fmt: skip


@pytest.mark.parametrize(("found", "shown", "expected"), TURNS.values(), ids=TURNS)
def test_what_the_log_had_otherwise_meanwhile(found: Plan, shown: set[str] | None, expected: list[str]) -> None:
    kept = shape(T)
    kept = replace(kept, turned=turned(kept, found, "1", shown=shown))
    assert judge(kept, T, lambda _: False).seen == expected
    # It is judged once: the shape that is kept then has nothing of it.
    assert judge(shape(T, kept), T, lambda _: False).seen == []


def test_a_column_that_is_gone_was_only_dropped() -> None:
    kept, now = shape(T), columns(*COLUMNS[:2])
    kept = replace(kept, turned=turned(kept, written(now, "id", "body"), "1"))
    assert judge(kept, now, lambda _: False).seen == []


def test_a_delete_shows_a_key_alone_and_what_was_noted_adds_up() -> None:
    kept = shape(T)
    assert turned(kept, written(T, "id"), "1", row=False) is None
    kept = replace(kept, turned=turned(kept, written(T, "n", key=("n",)), "1", row=False))
    assert kept.turned == Turned("1", [], [10])
    assert turned(kept, written(T, "id", "text", "n"), "2") == Turned("2", ["body"], [10], [(0, "text")])


def test_a_column_that_came_later_was_never_otherwise() -> None:
    assert turned(shape(T), written(T, "id", "n"), "1") is None


NEW, OTHER = Column(4, "new", 23, "integer"), Column(5, "other", 23, "integer")
CAME = {
    "and is there": (columns(*COLUMNS, NEW), 4, []),
    "and went": (T, 4, []),
    "and has another name": (columns(*COLUMNS, replace(NEW, name="x")), 4, ["column new renamed to x"]),
    "and another has its name": (columns(*COLUMNS, replace(OTHER, name="new")), 4, [
        "column new dropped and made again"
    ]),
    "nobody knows where, and is there": (columns(*COLUMNS, NEW), 0, []),
    "nobody knows where, and went": (T, 0, []),
    "nobody knows where, and may have another name": (columns(*COLUMNS, OTHER), 0, ["column new may be other now"]),
}  # fmt: skip


@pytest.mark.parametrize(("now", "place", "expected"), CAME.values(), ids=CAME)
def test_what_became_of_a_column_that_came_since(now: Today, place: int, expected: list[str]) -> None:
    event = replace(written(now, *ALL, "new"), numbers={"new": place} if place else {})
    kept = replace(shape(T), turned=turned(shape(T), event, "1"))
    assert judge(kept, now, lambda _: False).seen == expected
    assert judge(kept, now, lambda _: False, hidden={"x"}).seen == [one for one in expected if "to x" not in one]
    # It is noted once, and known for good where it went.
    assert turned(kept, event, "2") is None
    if "new" not in {column.name for column in now.columns}:
        later = columns(*now.columns, Column(9, "new", 23, "integer"))
        assert judge(shape(now, kept), later, lambda _: False).seen == ["column new dropped and made again"]


def test_an_update_that_leaves_a_large_value_out_shows_no_column() -> None:
    assert turned(shape(T), written(T, *ALL, large=("new",)), "1", shown=set(ALL)) is None


def test_the_key_of_a_partition_counts() -> None:
    kept = shape(P)
    kept = replace(kept, turned=turned(kept, written(P, *ALL, key=("n",), oid=21), "1"))
    assert judge(kept, P, lambda _: False).seen == ["partition public.p2: it had another key for a time"]
