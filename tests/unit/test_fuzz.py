"""Whatever bytes come in, what comes out is a value or one of the named errors."""

from __future__ import annotations

import contextlib
import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge import event
from bridge.errors import BadRecord
from bridge.event import Position
from bridge.source import frames, lsn, values, wal2json
from bridge.stream import subjects
from bridge.stream.intake import parse_headers

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=63)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        name: JSON | st.sampled_from(["B", "C", "I", "U", "D", "T", "M", "0/1"])
        for name in (
            "action", "xid", "timestamp", "lsn", "nextlsn", "schema", "table", "columns", "identity", "pk",
            "transactional",
        )
    },
)  # fmt: skip


@given(st.binary(max_size=64))
@example(b"")
@example(b"w")
@example(b"k" + bytes(16))
def test_a_message_of_the_replication_stream_is_understood_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadRecord):
        found = frames.parse(memoryview(data))
        assert found == (
            frames.Data(int.from_bytes(data[1:9]), memoryview(data)[25:])
            if data[:1] == b"w"
            else frames.Keepalive(int.from_bytes(data[1:9]), data[17] != 0)
        )


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.booleans())
def test_feedback_has_the_protocols_layout(write: int, flush: int, ask: bool) -> None:
    kind, wrote, flushed, applied, _, reply = struct.unpack("!cQQQqB", frames.status(write, flush, ask=ask))
    assert (kind, wrote, flushed, applied, reply) == (b"r", write, flush, 0, ask)


@given(st.binary(max_size=200) | RECORDS.map(msgspec.json.encode))
@example(b"")
@example(b'{"action":"I","lsn":"0/1","columns":' + b"[" * 5000)
@example(b'{"action":"I","lsn":"0/1","columns":[{"name":"a","typeoid":1,"value":' + b"[" * 5000)
@example(b'{"action":"I","lsn":"0/1","schema":"\xff"}')
def test_a_record_is_understood_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadRecord):
        assert isinstance(wal2json.decode(memoryview(data)), wal2json.Record)


@given(st.binary(max_size=120))
def test_a_refused_record_is_not_quoted(data: bytes) -> None:
    secret = b"planted"
    with pytest.raises(BadRecord) as error:
        wal2json.decode(b'{"action":"I","lsn":"0/1","columns":[{"name":"a","typeoid":1,"value":"' + secret + data)
    assert "planted" not in str(error.value)


@given(st.text(max_size=70))
@example("-".join(["+0000001", "0" * 16, "0" * 16, "0" * 8, "0" * 8]))
@example("-".join(["0x000001", "0" * 16, "0" * 16, "0" * 8, "0" * 8]))
@example("-".join(["0000_001", "0" * 16, "0" * 16, "0" * 8, "0" * 8]))
@example("-".join([" 0000001", "0" * 16, "0" * 16, "0" * 8, "0" * 8]))
def test_a_position_is_one_exactly_as_it_is_written_or_none(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert str(Position.parse(text)) == text


@given(st.builds(Position, *[st.integers(0, 2**bits - 1) for bits in (32, 64, 64, 32, 32)]))
def test_a_position_is_read_back_and_sorts_as_text(position: Position) -> None:
    assert Position.parse(str(position)) == position
    assert (str(position) < str(Position(5, 6, 7, 8, 9))) == (position < (5, 6, 7, 8, 9))


@given(st.text(max_size=20))
@example("0/-1")
@example("+1/0")
@example("1_0/0")
@example(" 1/0")
def test_an_lsn_is_one_or_none(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert lsn.parse(lsn.show(lsn.parse(text))) == lsn.parse(text)
        assert 0 <= lsn.parse(text) < 2**64


@given(st.binary(max_size=200))
@example(b"NATS/1.0\r\nBridge-Epoch: \xff\xfe\r\n\xc3: 1\r\n\r\n")
def test_headers_of_any_message_are_read(block: bytes) -> None:
    assert all(isinstance(part, str) for pair in parse_headers(block).items() for part in pair)


@given(st.binary(max_size=200))
@example(b'{"op":"insert","source":"","schema":"","table":"","after":' + b"[" * 5000)
def test_an_event_is_understood_or_refused(data: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError):
        event.decode(data)


@given(NAMES)
@example("we.ird *>$ tbl")
@example("é" * 31)
@example("")
def test_a_name_is_one_safe_token_and_comes_back(name: str) -> None:
    made = subjects.token(name)
    assert made
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-=")
    assert subjects.untoken(made) == name


@given(NAMES, NAMES, NAMES)
def test_the_longest_names_fit_a_subject_that_the_server_takes(source: str, schema: str, table: str) -> None:
    # PostgreSQL's names have 63 bytes at most, whatever characters they are made of.
    cut = [name.encode()[:63].decode(errors="ignore") for name in (source, schema, table)]
    assert len(subjects.table_subject("cdc", *cut)) < 1000


@given(st.text(max_size=40))
@example("{")
@example('{"')
@example("{a,\\")
@example("}")
def test_what_is_no_array_is_refused_or_text(text: str) -> None:
    with contextlib.suppress(ValueError):
        values.array(text, values.text)


@given(st.text(max_size=40))
@example("0x")
@example("\\x0")
def test_what_is_no_bytea_is_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        values.bytea(text)
