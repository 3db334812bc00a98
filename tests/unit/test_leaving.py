"""What of a table may leave: which columns, what masks make of values, what of a key is refused."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import event
from bridge.config import Secret, Source, Table
from bridge.configfile import load
from bridge.errors import ConfigError
from bridge.source import rows
from bridge.source.catalog import Relation
from bridge.source.leaving import leaving, mask
from tests.unit.test_rows import CLOSING, CODECS, COLUMNS, FULL_ROW, cells, record

KEY = "a key that nobody knows"


def hashed(text: str) -> str:
    return hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest()


@given(st.text())
def test_a_hash_is_that_of_the_text_however_its_json_is_written(text: str) -> None:
    made = mask("hash", KEY)
    written = msgspec.json.encode(text)
    escaped = b'"' + b"".join(b"\\u%04x" % ord(c) if ord(c) < 0x80 else c.encode() for c in text) + b'"'
    assert made(written) == made(escaped) == msgspec.json.encode(hashed(text))


def test_null_stays_null_and_other_values_are_hashed_as_they_are_written() -> None:
    made = mask("hash", KEY)
    assert made(b"null") == b"null"
    assert made(b'"null"') == msgspec.json.encode(hashed("null"))
    assert made(b"1.10") == msgspec.json.encode(hashed("1.10")) != made(b"1.1")
    assert made(b'[1,"a"]') == msgspec.json.encode(hashed('[1,"a"]'))
    assert mask("hash", KEY + "!")(b"1.10") != made(b"1.10")


def test_a_constant_takes_the_place_of_everything_but_null() -> None:
    made = mask('constant:a "b"\n', "")
    assert (made(b"null"), made(b"1"), made(b'"x"')) == (b"null", *[msgspec.json.encode('a "b"\n')] * 2)
    assert mask("constant:", "")(b"1") == b'""'


def planned(identity: str = "d", **table: Any) -> rows.Plan:
    relation = Relation(1, "public", "t", "r", ("public", "t"), identity, ("id",), COLUMNS)
    source = Source(table={"public.t": Table(**table)}, mask_key=Secret(KEY))
    chosen = leaving(source, relation.root)
    return rows.plan(relation, "main", "cdc.main.public.t", CODECS, chosen=chosen)


MASKED = {"body": "hash", "price": "hash", "secret": "constant:***"}


@pytest.mark.parametrize("identity", ["d", "f"])
def test_stream_and_snapshot_mask_alike(identity: str) -> None:
    plan = planned(identity, mask=MASKED)
    wanted = {"id": 1, "body": hashed('b"\n'), "price": hashed("1.10"), "secret": "***"}
    whole = cells(id="1", body='"b\\"\\n"', price="1.10", secret='"s"')
    read = rows.Reader(plan, CLOSING).payload(b'1\tb"\\n\t1.10\ts\n')
    inserted = rows.change(plan, record("I", whole), CLOSING)
    for payload in (read, inserted):
        assert msgspec.json.decode(event.decode(payload).after) == wanted
    full = identity == "f"
    updated = event.decode(rows.change(plan, record("U", whole, whole if full else cells(id="1")), CLOSING))
    deleted = event.decode(rows.change(plan, record("D", None, whole if full else cells(id="1")), CLOSING))
    assert msgspec.json.decode(updated.after) == wanted
    if full:
        assert msgspec.json.decode(updated.before) == msgspec.json.decode(deleted.before) == wanted
    for payload in (read, inserted, rows.change(plan, record("U", whole, whole), CLOSING) if full else b""):
        assert b'"s"' not in payload


def test_what_is_left_alone_is_named_and_filled_masked() -> None:
    lacking = cells(id="1", price="2", secret='"s"')
    kept = event.decode(rows.change(planned(mask=MASKED), record("U", lacking, cells(id="1")), CLOSING))
    assert kept.unchanged == ("body",)
    filled = event.decode(rows.change(planned("f", mask=MASKED), record("U", lacking, FULL_ROW), CLOSING))
    assert msgspec.json.decode(filled.after)["body"] == hashed("b")


def test_a_column_of_an_older_change_is_masked_by_its_name_and_left_out_where_it_was_not_chosen() -> None:
    old = record("I", [*FULL_ROW, *cells(extra="5")])
    for masks, extra in (({**MASKED, "extra": "hash"}, hashed("5")), (MASKED, 5)):
        found = event.decode(rows.change(planned(mask=masks).adapted(old, CODECS, None), old, CLOSING))
        assert msgspec.json.decode(found.after)["extra"] == extra


def test_only_the_chosen_columns_are_there() -> None:
    plan = planned(columns=["id", "price"])
    found = event.decode(rows.change(plan, record("I", FULL_ROW), CLOSING))
    assert msgspec.json.decode(found.after) == {"id": 1, "price": 1.1}
    assert rows.Reader(plan, CLOSING).columns == '"id", "price"'


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"exclude": ["id"]}, "exclude names id, part of its key"),
        ({"columns": ["body"]}, "columns leaves out id, part of its key"),
        ({"mask": {"id": "hash"}}, "mask names id, part of its key"),
    ],
)
def test_a_key_leaves_as_it_is(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        planned(**table)


def test_operations_that_are_not_chosen_are_dropped() -> None:
    assert planned().dropped == frozenset()
    assert planned(operations=["insert", "update"]).dropped == {"D", "T"}


HASH = 'mask = { email = "hash" }'


@pytest.mark.parametrize(
    ("keys", "file", "finding"),
    [
        (HASH, None, '"hash" needs [source] mask_key_file'),
        (HASH, "short", "the key is shorter than 16 characters"),
        ('mask = { email = "sha1" }', KEY, """'sha1' is neither "hash" nor "constant:" and a text"""),
        (f'exclude = ["email"]\n{HASH}', KEY, "mask.email: the column is left out"),
        (f'columns = ["id"]\n{HASH}', KEY, "mask.email: the column is left out"),
        ('columns = ["id", "a"]\nexclude = ["a"]', None, "columns and exclude both name a"),
        ('operations = ["upsert"]', None, "operations"),
        ('operations = ["insert"]\n[stream]\nmode = "compact"', None, "a compacted log holds rows as they are"),
    ],
)
def test_a_choice_that_cannot_be_is_found(tmp_path: Path, keys: str, file: str | None, finding: str) -> None:
    named = ""
    if file is not None:
        (tmp_path / "key").write_text(file + "\n")
        named = 'mask_key_file = "key"\n'
    (tmp_path / "bridge.toml").write_text(f'[source]\n{named}[source.table."public.users"]\n{keys}\n')
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "bridge.toml", {})
    assert finding in str(caught.value)
    assert KEY not in str(caught.value)


def test_the_key_comes_from_its_file_and_shows_nowhere(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    text = f'[source]\nmask_key_file = "key"\n[source.table."public.users"]\n{HASH}\n'
    (tmp_path / "bridge.toml").write_text(text)
    config = load(tmp_path / "bridge.toml", {})
    assert str(config.source.mask_key) == KEY
    assert KEY not in repr(config)
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError, match=r"mask_key_file: .* cannot be read"):
        load(tmp_path / "bridge.toml", {})
