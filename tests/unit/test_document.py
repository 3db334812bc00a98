"""Events → documents: ids that never collide, bytes that never change, columns that are never lost."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import event
from bridge.errors import ConfigError
from bridge.index import document, naming
from bridge.index.bases import address_of
from bridge.index.convert import converter
from bridge.index.document import Builder, Put, Remove, Shape, version
from bridge.index.naming import Naming, Rejected, identify
from bridge.index.reason import Problem, scrub
from bridge.index.unchanged import Reconstruction

pytestmark = pytest.mark.anyio


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value).encode())


def an_event(op: event.Op, key: Any, after: Any = None, **more: Any) -> event.Event:
    parts: dict[str, Any] = {name: raw(more.pop(name)) for name in ("before",) if name in more}
    if after is not None:
        parts["after"] = msgspec.Raw(after.encode()) if isinstance(after, str) else raw(after)
    return event.Event(op=op, source="main", schema="public", table="t", key=raw(key), **parts, **more)


def builder(**shape: Any) -> Builder:
    return Builder(Shape(**shape), "public.t", Naming(), lambda column: column != "id")


async def built(made: Builder, at: event.Event, *, seq: int = 5, base: Any = None) -> Any:
    columns = None if base is None else {name: raw(value) for name, value in base.items()}
    doc_id, _ = Naming().identity(at)
    ops = await made.build(at, doc_id, version(1, seq), columns)
    return ops[0] if len(ops) == 1 else ops


def shown(op: Any) -> dict[str, Any]:
    assert isinstance(op, Put)
    found = json.loads(op.doc)
    found.pop("_bridge")
    return dict(found)


# Ids


def an_id(**key: Any) -> str:
    return identify({name: raw(value) for name, value in key.items()})


def test_ids_are_readable() -> None:
    assert an_id(id=42) == "42"
    assert an_id(name="alice") == "alice"
    assert an_id(a=1, b="x") == "1|x"
    assert an_id(id="0b3c1a7e-0000-4000-8000-000000000000") == "0b3c1a7e-0000-4000-8000-000000000000"


scalars = st.one_of(
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(),
    st.sampled_from(["1", "true", "'1", "a|b", "\\", "", "#", "[1]"]),
)


@given(st.lists(scalars, min_size=1, max_size=3), st.lists(scalars, min_size=1, max_size=3))
def test_different_keys_have_different_ids(one: list[Any], other: list[Any]) -> None:
    ids = [an_id(**{f"c{n}": value for n, value in enumerate(key)}) for key in (one, other)]
    assert (ids[0] == ids[1]) == (json.dumps(one) == json.dumps(other))


@given(st.text(min_size=0, max_size=3_000))
def test_ids_are_never_empty_and_fit_the_engine(text: str) -> None:
    assert 1 <= len(an_id(name=text).encode()) <= 512


def test_long_ids_differ_by_their_hash() -> None:
    one, other = an_id(name="é" * 300 + "a"), an_id(name="é" * 300 + "b")
    assert one.startswith("#")
    assert one != other
    assert an_id(name=one) != one


def test_a_changed_key_gives_the_old_id() -> None:
    assert Naming().identity(an_event("update", {"id": 2}, {"id": 2}, before={"id": 1})) == ("2", "1")
    assert Naming().identity(an_event("update", {"id": 2}, {"id": 2}, before={"x": 5, "id": 2})) == ("2", None)
    assert Naming().identity(an_event("update", {"id": 2}, {"id": 2})) == ("2", None)
    assert Naming().identity(an_event("delete", {"id": 2}, before={"id": 1})) == ("2", None)


def test_a_table_without_a_key_is_named_with_the_remedy() -> None:
    keyless = event.Event(op="insert", source="main", schema="shop", table="log", after=raw({"a": 1}))
    for one in (keyless, msgspec.structs.replace(keyless, key=raw(None))):
        with pytest.raises(Rejected, match="no key"):
            Naming().identity(one)


def test_a_key_that_came_later_is_taken_from_the_row_digit_by_digit() -> None:
    row = an_event("insert", None, '{"b":"x","a":12345678901234567890.10}')
    assert bytes(naming.keyed(row, ["a", "b"]).key) == b'{"a":12345678901234567890.10,"b":"x"}'
    assert Naming().identity(naming.keyed(row, ["b", "a"]))[0] == "x|12345678901234567890.10"
    for names in (["c"], ["a", "n"], []):
        with pytest.raises(Rejected, match="no key"):
            naming.keyed(row, names)
    with pytest.raises(Rejected, match="no key"):
        naming.keyed(an_event("insert", None, {"a": None}), ["a"])


# Events that cannot be read


def wire(value: bytes) -> bytes:
    opening = event.head("insert", "main", "public", "t")
    return (
        opening
        + b',"key":{"a":"q\\"}","n":-1.50},"after":{"a":1,"j":'
        + value
        + b"}"
        + event.transaction("0/1", 1, None)
    )


@pytest.mark.parametrize(
    "value", [b"[" * 3000 + b"]" * 3000, b'{"a":' * 600 + b"1" + b"}" * 600, b'"\\ud800"', b"nonsense"]
)
def test_what_cannot_be_read_still_names_its_key(value: bytes) -> None:
    with pytest.raises(Rejected):
        document.read(wire(value))
    found = naming.outline(wire(value))
    assert (found.op, found.schema, found.table) == ("insert", "public", "t")
    assert bytes(found.key) == b'{"a":"q\\"}","n":-1.50}'
    assert address_of(wire(value), {("public", "t"): builder()}) == 'q"}|-1.50'


def test_an_outline_holds_nothing_that_is_no_json() -> None:
    for data in (b"", b"not json", b'{"op":"insert","source":"m","schema":"s","table":"t","key":{"a":"\\ud800"},'):
        assert bytes(naming.outline(data).key) == b"null"
        assert address_of(data, {("s", "t"): builder()}) == ""


def test_many_brackets_are_not_deep() -> None:
    value = b"[" + b",".join([b'[1,"[[["]'] * 2_000) + b"]"
    assert document.read(wire(value)).op == "insert"


# Versions


def test_a_newer_epoch_wins_over_any_sequence_of_an_older_one() -> None:
    assert version(2, 1) > version(1, (1 << 42) - 1)
    assert version(1, 6) > version(1, 5)
    assert version((1 << 21) - 1, (1 << 42) - 1) < 1 << 63


# Documents


async def test_a_plain_row_keeps_its_bytes() -> None:
    after = '{"id": 1, "n":1.10,"big":123456789012345678901234567890.5, "s":"\\u00e9"}'
    op = await built(builder(), an_event("insert", {"id": 1}, after, partition="public.t_1"))
    assert op.doc.startswith(after[:-1].encode())
    assert json.loads(op.doc)["_bridge"] == {
        "version": version(1, 5),
        "table": "public.t",
        "key": {"id": 1},
        "partition": "public.t_1",
    }
    assert shown(await built(builder(), an_event("insert", {"id": 1}, "{}"))) == {}


async def test_shaped_rows_keep_their_digits() -> None:
    made = builder(columns=["id", "n"], rename={"n": "price"})
    op = await built(made, an_event("insert", {"id": 1}, '{"id":1,"n":1.10,"x":"secret"}'))
    assert b'"price":1.10' in op.doc
    assert shown(op) == {"id": 1, "price": 1.1}


async def test_bulk_lines_carry_the_version() -> None:
    op = await built(builder(), an_event("insert", {"id": "a\nb"}, {"id": "a\nb"}))
    action, doc, end = op.line().split(b"\n")
    assert json.loads(action) == {"index": {"_id": "a\nb", "version": version(1, 5), "version_type": "external"}}
    assert (json.loads(doc)["id"], end) == ("a\nb", b"")
    assert json.loads(Remove("x", 7, again=True).line()) == {
        "delete": {"_id": "x", "version": 7, "version_type": "external_gte"}
    }


async def test_unchanged_columns_are_merged_and_never_null() -> None:
    update = an_event("update", {"id": 1}, {"id": 1}, unchanged=("body",))
    assert shown(await built(builder(), update, base={"body": "kept", "other": 1})) == {"id": 1, "body": "kept"}
    for base in (None, {"other": 1}):
        with pytest.raises(Rejected, match="body"):
            await built(builder(), update, base=base)
    assert shown(await built(builder(exclude=["body"]), update)) == {"id": 1}


@pytest.mark.parametrize("shape", [{}, {"rename": {"body": "text"}}, {"transform": "tests.unit.test_document:double"}])
async def test_a_written_document_gives_its_unchanged_columns_back(shape: dict[str, Any]) -> None:
    made = builder(**shape)
    first = await built(made, an_event("insert", {"id": 1}, '{"id":1,"body":"long","n":1.10}'))
    base = made.base(first.doc)
    assert bytes(base["body"]) == b'"long"'
    assert bytes(base["n"]) == b"1.10"


# Transforms


def double(row: dict[str, Any]) -> dict[str, Any]:
    return {"twice": str(row["id"]) * 2, "n": row.get("n")}


async def later(row: dict[str, Any]) -> dict[str, Any]:
    return {"later": row["id"]}


def nothing(_: dict[str, Any]) -> None:
    return None


def failing(row: dict[str, Any]) -> dict[str, Any]:
    raise KeyError(row["secret"])


def words(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"word": word} for word in row["words"].split()]


def numbers(_: dict[str, Any]) -> list[int]:
    return [7]


def number(_: dict[str, Any]) -> int:
    return 7


def unencodable(_: dict[str, Any]) -> dict[str, Any]:
    return {"a": object()}


def leaving(_: dict[str, Any]) -> None:
    sys.exit(3)


def generating(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield row


async def generating_later(row: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield row


def of_two(row: dict[str, Any], more: int) -> dict[str, Any]:
    return row | {"more": more}


def of_none() -> dict[str, Any]:
    return {}


def with_more(row: dict[str, Any], more: int = 1, *, most: int = 2, **others: Any) -> dict[str, Any]:
    return row | {"more": more, "most": most} | others


def transformed(name: str) -> Builder:
    return builder(transform=f"tests.unit.test_document:{name}")


async def test_a_transform_makes_the_document_with_exact_numbers() -> None:
    row = an_event("insert", {"id": 1}, '{"id":1,"n":1.12345678901234567890}')
    op = await built(transformed("double"), row)
    assert b'"n":1.12345678901234567890' in op.doc
    assert json.loads(op.doc)["twice"] == "11"
    assert shown(await built(transformed("later"), row)) == {"later": 1}


async def test_a_transform_that_gives_nothing_removes_the_document() -> None:
    op = await built(transformed("nothing"), an_event("insert", {"id": 1}, {"id": 1}))
    assert op == Remove("1", version(1, 5))


@pytest.mark.parametrize("name", ["failing", "number", "unencodable", "leaving"])
async def test_a_transform_that_fails_rejects_one_row_without_quoting_it(name: str) -> None:
    with pytest.raises(Rejected) as caught:
        await built(transformed(name), an_event("insert", {"id": 1}, {"id": 1, "secret": "planted"}))
    assert "planted" not in str(caught.value)


async def test_a_list_makes_several_documents_and_one_that_shrinks_deletes_the_rest() -> None:
    made = transformed("words")
    row = an_event("update", {"id": 1}, {"id": 1, "words": "a b"})
    head, second, *gone = await made.build(row, "1", version(1, 5), None, 4)
    assert [(shown(op), op.id) for op in (head, second)] == [({"word": "a"}, "1"), ({"word": "b"}, "1||1")]
    assert gone == [Remove("1||2", version(1, 5)), Remove("1||3", version(1, 5))]
    # Not fewer than there may have been: the deletes may have to be sent again.
    assert [document.count_of(op.doc) for op in (head, second) if isinstance(op, Put)] == [4, 1]
    empty = await made.build(an_event("update", {"id": 1}, {"id": 1, "words": ""}), "1", version(1, 6), None, 2)
    assert empty == [Remove("1", version(1, 6)), Remove("1||1", version(1, 6))]


async def test_a_list_of_other_things_is_rejected() -> None:
    with pytest.raises(Rejected, match="returned int"):
        await built(transformed("numbers"), an_event("insert", {"id": 1}, {"id": 1}))


# Constants, soft deletes, converted columns


async def test_constants_stand_in_every_document_and_win() -> None:
    made = builder(constants={"kind": "post", "n": 1.5})
    op = await built(made, an_event("insert", {"id": 1}, '{"id":1,"n":2,"body":"b"}'))
    assert shown(op) == {"id": 1, "n": 1.5, "body": "b", "kind": "post"}
    assert made.base(op.doc).keys() == {"id", "body"}
    # What a constant hides is not needed.
    assert not made.needs(an_event("update", {"id": 1}, {"id": 1}, unchanged=("n",)))
    made = builder(transform="tests.unit.test_document:double", constants={"twice": "x"})
    assert shown(await built(made, an_event("insert", {"id": 1}, {"id": 1})))["twice"] == "x"


@pytest.mark.parametrize(("value", "gone"), [(None, False), (False, False), (True, True), ("2026-01-01", True)])
async def test_a_soft_deleted_row_has_no_document(value: Any, gone: bool) -> None:
    made = builder(soft_delete="deleted", exclude=["deleted"])
    op = await built(made, an_event("insert", {"id": 1}, {"id": 1, "deleted": value}))
    assert op == Remove("1", version(1, 5)) if gone else shown(op) == {"id": 1}
    # What is gone needs no values; what is not, does.
    update = an_event("update", {"id": 1}, {"id": 1, "deleted": value}, unchanged=("body",))
    assert made.needs(update) is not gone


async def test_a_soft_delete_that_was_not_sent_is_taken_from_the_base() -> None:
    made = builder(soft_delete="deleted", exclude=["deleted"])
    first = await built(made, an_event("insert", {"id": 1}, {"id": 1, "deleted": None}))
    update = an_event("update", {"id": 1}, {"id": 1}, unchanged=("deleted",))
    assert made.needs(update)
    assert isinstance((await made.build(update, "1", 6, made.base(first.doc)))[0], Put)
    assert isinstance((await built(made, update, base={"deleted": "now"})), Remove)


async def test_a_converted_value_stands_in_for_its_columns() -> None:
    made = builder(rename={"span": "years"})
    made.converters["span"] = converter({"type": "integer_range"}, "int4range") or bytes
    op = await built(made, an_event("insert", {"id": 1}, {"id": 1, "span": "[1,)"}))
    assert shown(op) == {"id": 1, "years": {"gte": 1}}
    update = an_event("update", {"id": 1}, {"id": 1}, unchanged=("span",))
    assert shown(*await made.build(update, "1", 6, made.base(op.doc))) == {"id": 1, "years": {"gte": 1}}
    assert made.converted(b'{"years":"[2,3)"}') == b'{"years":{"gte":2,"lt":3}}'


async def test_documents_are_what_engines_can_read() -> None:
    long = "9" * 1_001
    for made in (builder(), builder(exclude=["x"])):
        event = an_event("insert", {"id": 1}, {"id": 1})
        event = msgspec.structs.replace(event, after=msgspec.Raw(b'{"id":1,"doc":{"a" :\n%b}}' % long.encode()))
        op = await built(made, event)
        assert b"\n" not in op.doc
        assert shown(op)["doc"] == {"a": long}


@pytest.mark.parametrize(
    ("name", "why"),
    [("generating", "is a generator"), ("generating_later", "is a generator"),
     ("of_two", "cannot be called with one row"), ("of_none", "cannot be called with one row")],
)  # fmt: skip
def test_a_function_that_can_be_no_transform_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        document.load(f"tests.unit.test_document:{name}")


@pytest.mark.parametrize("name", ["tests.unit.test_document:with_more", "copy:copy", "builtins:dict"])
def test_what_can_be_called_with_a_row_may_be_a_transform(name: str) -> None:
    assert callable(document.load(name))


def test_a_module_that_ends_the_process_when_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="leaves_at_once:f cannot be loaded"):
        document.load("leaves_at_once:f")


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "json:decoder"])
def test_a_transform_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        document.load(name)


# Rows rebuilt from the log


def replayed(wanted: dict[str, int], events: list[event.Event]) -> dict[str, Any]:
    rebuilding = Reconstruction(wanted.items())
    for _ in range(2):
        for seq, one in enumerate(events, 1):
            rebuilding.see(seq, one, Naming())
        if not rebuilding.again():
            break
    assert not rebuilding.again()
    return {i: {n: json.loads(bytes(v)) for n, v in r.items()} for (i, _), r in rebuilding.found.items()}


def test_a_row_is_rebuilt_as_it_stood_before_the_event_that_asks() -> None:
    events = [
        an_event("insert", {"id": 1}, {"id": 1, "a": 1, "body": "first"}),
        an_event("update", {"id": 1}, {"id": 1, "a": 2}, unchanged=("body",)),
        an_event("update", {"id": 1}, {"id": 1, "a": 3}, unchanged=("body",)),
        an_event("update", {"id": 1}, {"id": 1, "a": 4, "body": "later"}),
    ]
    assert replayed({"1": 3}, events) == {"1": {"id": 1, "a": 2, "body": "first"}}


def test_a_row_is_followed_through_changes_of_its_key() -> None:
    events = [
        an_event("insert", {"id": 1}, {"id": 1, "body": "kept"}),
        an_event("update", {"id": 2}, {"id": 2}, before={"id": 1}, unchanged=("body",)),
        an_event("update", {"id": 3}, {"id": 3}, before={"id": 2}, unchanged=("body",)),
        an_event("update", {"id": 3}, {"id": 3}, unchanged=("body",)),
    ]
    assert replayed({"3": 4}, events) == {"3": {"id": 3, "body": "kept"}}


def test_long_chains_of_keys_take_two_passes() -> None:
    events = [an_event("insert", {"id": 0}, {"id": 0, "body": "kept"})]
    events += [
        an_event("update", {"id": n}, {"id": n}, before={"id": n - 1}, unchanged=("body",)) for n in range(1, 200)
    ]
    assert replayed({"198": 200, "5": 7}, events) == {
        "198": {"id": 198, "body": "kept"},
        "5": {"id": 5, "body": "kept"},
    }


def test_a_row_is_not_known_behind_an_event_that_cannot_be_read() -> None:
    rebuilding = Reconstruction([("1", 2), ("1", 3)])
    rebuilding.see(1, an_event("insert", {"id": 1}, {"id": 1, "body": "old"}), Naming())
    rebuilding.lose(2, "1")
    rebuilding.see(3, an_event("update", {"id": 1}, {"id": 1}, unchanged=("body",)), Naming())
    assert list(rebuilding.found) == [("1", 2)]


def test_deleted_and_truncated_rows_are_not_rebuilt() -> None:
    row = {"id": 1, "body": "x"}
    update = an_event("update", {"id": 1}, {"id": 1}, unchanged=("body",))
    truncate = event.Event(op="truncate", source="main", schema="public", table="t")
    other = event.Event(op="truncate", source="main", schema="public", table="t", partition="public.p2")
    inserted = an_event("insert", {"id": 1}, row, partition="public.p1")
    assert replayed({"1": 3}, [inserted, an_event("delete", {"id": 1}), update]) == {}
    assert replayed({"1": 3}, [inserted, truncate, update]) == {}
    assert replayed({"1": 3}, [inserted, other, update]) == {"1": row}


# Reasons


def test_reasons_keep_kind_and_field_and_lose_the_value() -> None:
    reason = (
        "failed to parse field [age] of type [long] in document with id 'alice'. Preview of field's value: 'planted'"
    )
    problem = Problem("mapper_parsing_exception", reason, Problem("illegal_argument_exception", 'For input "planted"'))
    assert scrub(problem, {"age"}) == "mapper_parsing_exception [age, long]: illegal_argument_exception"
