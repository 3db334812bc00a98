"""The one thing that travels: a change of one row as JSON in a NATS message, and its position. Pure.

`Event` is what a reader decodes. The writer does not build `Event` objects: it joins the bytes that PostgreSQL gave
(`encode_row` below) so that numbers keep every digit. Both sides of that contract are in this module.

    {"op":"update","source":"main","schema":"public","table":"messages","key":{"id":1},
     "before":{…},"after":{…},"unchanged":["body"],"partition":"public.messages_2026",
     "lsn":"0/16B3748","commit_lsn":"0/16B3790","txid":725,"committed_at":"2026-01-01T00:00:00.000000Z"}

`key`, `before` and `after` stay raw JSON in `Event`: decode them with `msgspec.json.decode` where they are needed.
`before` is there only when the key changed (the old key) or with REPLICA IDENTITY FULL (the old row).
`unchanged` names TOASTed columns that PostgreSQL did not send: they keep the value that they had, they are not NULL.
For `read` (a snapshot row) `lsn` and `commit_lsn` are the consistent point, `txid` and `committed_at` null.
A `snapshot` event marks a complete read's begin and end ("phase"): at the end, rows that were last written before the
begin are gone from the table, and a reader removes them. In a compacted log the end carries the begin's sequence
("begin_seq"), since a later begin may have taken its place.
A `message` is what pg_logical_emit_message was given, `{"op":"message","source":"main","prefix":"app.orders",
"transactional":true,"content":"…", …}`; where it is not transactional `commit_lsn` is its own, `txid` and
`committed_at` are null.
A `schema` event stands before the first event whose row has other columns, or another key, than those before it:
`columns` and `key_columns` are what follows, `old_columns` and `old_key_columns` what was; `txid` and the LSNs are
those of the change that shows it. A column has "name", "type" as `format_type` prints it, the type's "oid", and of a
domain "base", the type that it is of.
`origin` names where a transaction was replicated from, where it did not begin in this database.
The event of a row that is larger than the server's largest message has a claim check in place of `before` and `after`,
`"ref":{"bucket":…,"name":…,"size":…,"digest":…}`: the whole event is that object (`bridge.stream.claims`). Beside it
`before` is there only where the key changed, and is the old key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

Op = Literal["insert", "update", "delete", "truncate", "read", "schema", "snapshot", "message"]

HEADER_OP = "Bridge-Op"
HEADER_POSITION = "Bridge-Position"
HEADER_EPOCH = "Bridge-Epoch"
HEADER_VERSION = "Bridge-V"
HEADER_LAST = "Bridge-Last"
FORMAT = "1"

_POSITION = re.compile("([0-9a-f]{8})-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{8})-([0-9a-f]{8})")


class Position(NamedTuple):
    """Where an event stands in its source's history; tuple order is stream order.

    timeline: of the commit record; end: the END of the commit record; lsn: the change's own;
    k: counts records with that same lsn within the transaction, before any filtering;
    sub: 0 for what comes from the WAL, else counts on from the last streamed event (snapshot rows, markers).

    Of what stands between transactions `lsn` is 0 (an initial snapshot) or the highest one. A `schema` event within a
    transaction stands just before the change that shows it: before its LSN, or after the record that shares it.
    """

    timeline: int
    end: int
    lsn: int
    k: int
    sub: int

    def __str__(self) -> str:
        return f"{self.timeline:08x}-{self.end:016x}-{self.lsn:016x}-{self.k:08x}-{self.sub:08x}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """The position that `str` made `text` from; ValueError if it is none."""
        found = _POSITION.fullmatch(text)
        if found is None:
            raise ValueError(f"not a position: {text!r}")
        return cls(*(int(field, 16) for field in found.groups()))


_OUTSIDE = ("0" * 16, "f" * 16)


def is_between(position: str) -> bool:
    """Whether what has this position stands between transactions."""
    return position[26:42] in _OUTSIDE


class Column(msgspec.Struct, frozen=True, omit_defaults=True):
    """A column's name, and its type as `format_type` prints it with the type's oid; `base` is the type without domains
    where there are some."""

    name: str
    type: str
    oid: int
    base: str = ""


class Ref(msgspec.Struct, frozen=True):
    """A claim check: the object that holds the whole event. `size` in bytes, `digest` as the object store has it."""

    bucket: str
    name: str
    size: int
    digest: str


class Event(msgspec.Struct, frozen=True):
    """One decoded event; `key`, `before` and `after` are raw JSON, empty bytes where absent."""

    op: Op
    source: str
    schema: str = ""
    table: str = ""
    key: msgspec.Raw = msgspec.Raw()
    before: msgspec.Raw = msgspec.Raw()
    after: msgspec.Raw = msgspec.Raw()
    unchanged: tuple[str, ...] = ()
    partition: str | None = None
    phase: Literal["begin", "end"] | None = None
    begin_seq: int | None = None
    lsn: str = ""
    commit_lsn: str = ""
    txid: int | None = None
    committed_at: str | None = None
    origin: str | None = None
    prefix: str | None = None
    content: str | None = None
    transactional: bool | None = None
    columns: tuple[Column, ...] = ()
    key_columns: tuple[str, ...] = ()
    old_columns: tuple[Column, ...] = ()
    old_key_columns: tuple[str, ...] = ()
    ref: Ref | None = None


_decoder = msgspec.json.Decoder(Event)


def decode(data: bytes) -> Event:
    """The event in a message's payload; msgspec.DecodeError where it is none."""
    try:
        return _decoder.decode(data)
    except UnicodeDecodeError:
        raise msgspec.DecodeError("not valid UTF-8") from None
    except RecursionError:
        raise msgspec.DecodeError("nested too deeply") from None


_columns = msgspec.json.Decoder(dict[str, msgspec.Raw] | None)
_REF = b',"ref":{"bucket":'
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\],]', re.DOTALL)


def ref_of(data: bytes) -> Ref | None:
    """The claim check in a message's payload, None where the event is whole. Costs next to nothing where it is."""
    if _REF not in data:
        return None
    try:
        return decode(data).ref
    except msgspec.DecodeError:
        return None


def referred(payload: bytes, ref: Ref) -> bytes:
    """The event that stands for the whole one in `payload`; of the old row it keeps the key, where that changed."""
    claim = b',"ref":' + msgspec.json.encode(ref)
    try:
        found = _decoder.decode(payload)
        key, before = (_columns.decode(raw) if bytes(raw) else None for raw in (found.key, found.before))
    except RecursionError:
        return _without_row(payload, claim)
    if found.op == "message":
        closing = transaction(found.commit_lsn, found.txid, found.committed_at, found.origin)
        head_of = message_head(found.source, found.prefix or "", transactional=bool(found.transactional))
        return b'%s%s,"lsn":%s%s' % (head_of, claim, quote(found.lsn), closing)
    if found.op == "schema":
        closing = transaction(found.commit_lsn, found.txid, found.committed_at, found.origin)
        table = head(found.op, found.source, found.schema, found.table)
        return b'%s,"key":null%s,"lsn":%s%s' % (table, claim, quote(found.lsn), closing)
    old = _old_key(
        {quote(n): bytes(v) for n, v in (key or {}).items()}, {quote(n): v for n, v in (before or {}).items()}
    )
    unchanged = b',"unchanged":' + msgspec.json.encode(found.unchanged) if found.unchanged else b""
    return b'%s,"key":%s%s%s%s%s,"lsn":%s%s' % (
        head(found.op, found.source, found.schema, found.table),
        bytes(found.key),
        old,
        claim,
        unchanged,
        tail(found.partition),
        quote(found.lsn),
        transaction(found.commit_lsn, found.txid, found.committed_at, found.origin),
    )


def old_key(found: Event) -> bytes:
    """The key, as JSON, of the row that an event changes, before it did."""
    if not bytes(found.before):
        return bytes(found.key)
    before, key = _columns.decode(found.before) or {}, _columns.decode(found.key)
    if key is None:
        return bytes(found.key)
    return _object({quote(name): bytes(before.get(name, value)) for name, value in key.items()})


class Outline(NamedTuple):
    """What an event says of its row's place: the key, the one before the change, both as JSON, and the columns that it
    leaves out."""

    key: bytes
    old: bytes
    unchanged: tuple[str, ...]


def outline(payload: bytes) -> Outline:
    """The outline of an event, however deep its row is nested."""
    try:
        found = decode(payload)
        return Outline(bytes(found.key), old_key(found), found.unchanged)
    except (msgspec.DecodeError, RecursionError):
        parts = {name: payload[slice(*place)] for name, place in _members(payload).items()}
        key, before = (_values(parts[name]) if name in parts else {} for name in (b'"key"', b'"before"'))
        unchanged = msgspec.json.decode(_value(parts.get(b'"unchanged"', b":[]")), type=tuple[str, ...])
        return Outline(_object(key), _object({name: before.get(name, value) for name, value in key.items()}), unchanged)


def columns_of(payload: bytes) -> dict[str, msgspec.Raw]:
    """The columns of the row that an event writes, however deep they are nested."""
    try:
        return _columns.decode(decode(payload).after) or {}
    except (msgspec.DecodeError, RecursionError):
        columns = _values(payload[slice(*_members(payload)[b'"after"'])])
        return {msgspec.json.decode(name, type=str): msgspec.Raw(value) for name, value in columns.items()}


def filled(payload: bytes, row: Mapping[str, msgspec.Raw]) -> bytes:
    """The event with those of its unchanged columns written out that `row` has."""
    lacking = outline(payload).unchanged
    known = [name for name in lacking if name in row]
    if not known:
        return payload
    rest = [name for name in lacking if name not in row]
    members = _members(payload)
    unchanged = members[b'"unchanged"']
    written = _with_row(payload, {**columns_of(payload), **{name: row[name] for name in known}}, upto=unchanged[0])
    left = b',"unchanged":' + msgspec.json.encode(rest) if rest else b""
    return written + left + payload[unchanged[1] :]


def followed(row: bytes, payload: bytes) -> bytes:
    """The event of a row, still without what it closes with, once the change of it in `payload` has happened."""
    key = _members(row + b"}")[b'"key"']
    moved = row[: key[0]] + b',"key":' + outline(payload).key + row[key[1] :]
    return _with_row(moved + b"}", {**columns_of(row + b"}"), **columns_of(payload)}, upto=len(moved))


def _with_row(payload: bytes, columns: Mapping[str, msgspec.Raw], upto: int) -> bytes:
    """The beginning of an event, with other columns."""
    start, end = _members(payload)[b'"after"']
    after = _object({quote(name): bytes(value) for name, value in columns.items()})
    return payload[:start] + b',"after":' + after + payload[end:upto]


def _object(members: Mapping[bytes, bytes]) -> bytes:
    """A JSON object; the names are in quotes."""
    return b"{%b}" % b",".join([b"%b:%b" % pair for pair in members.items()])


def _old_key(key: Mapping[bytes, bytes], before: Mapping[bytes, bytes | msgspec.Raw]) -> bytes:
    """The member `before` with the old key, nothing where it is the same; names are in quotes."""
    old = {name: bytes(before.get(name, value)) for name, value in key.items()}
    return b"" if old == key else b',"before":' + _object(old)


def _without_row(payload: bytes, claim: bytes) -> bytes:
    """What `referred` gives, for an event that is nested deeper than a decoder goes. Slow."""
    found = _members(payload)
    row = [found[name] for name in (b'"before"', b'"after"') if name in found]
    if not row:
        return payload
    key, before = (_values(payload[slice(*found[name])]) if name in found else {} for name in (b'"key"', b'"before"'))
    return payload[: row[0][0]] + _old_key(key, before) + claim + payload[row[-1][1] :]


def _value(member: bytes) -> bytes:
    """The value of a member `,"name":value`."""
    return member[member.index(b":") + 1 :]


def _values(member: bytes) -> dict[bytes, bytes]:
    """The members of the object that a member `,"name":{…}` holds."""
    value = _value(member)
    return {name: value[start + len(name) + 2 : end] for name, (start, end) in _members(value).items()}


def _members(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Where the members of a JSON object are, by their names in quotes: each with the comma or brace before it."""
    found: dict[bytes, tuple[int, int]] = {}
    depth, start, name = 0, 0, b""
    for token in _TOKENS.finditer(data):
        first = data[token.start()]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1 and first == ord('"') and not name:
            name = token[0]
        if name and depth == (1 if first == ord(",") else 0):
            found[name] = (start, token.start())
            start, name = token.start(), b""
    return found


def quote(text: str) -> bytes:
    """`text` as a JSON string; ValueError for text that is not valid Unicode."""
    return msgspec.json.encode(text)


def head(op: Op, source: str, schema: str, table: str) -> bytes:
    """The opening of every event of one table and kind, up to and without the comma before `key`."""
    return b'{"op":%s,"source":%s,"schema":%s,"table":%s' % (
        quote(op),
        quote(source),
        quote(schema),
        quote(table),
    )


def message_head(source: str, prefix: str, *, transactional: bool) -> bytes:
    """The opening of a logical message's event, up to and without the comma before `content`."""
    return b'{"op":"message","source":%s,"prefix":%s,"transactional":%s' % (
        quote(source),
        quote(prefix),
        b"true" if transactional else b"false",
    )


def altered(
    source: str, schema: str, table: str, now: tuple[Sequence[Column], Sequence[str]],
    before: tuple[Sequence[Column], Sequence[str]], lsn: bytes, closing: bytes,
) -> bytes:  # fmt: skip
    """The event of a change of columns or key.

    Args:
        now, before: the columns, and the names of those that are the key.
        lsn: of the change that shows it, as text; closing: its transaction's.
    """
    parts = (*now, *before)
    return b'%s,"key":null,"columns":%s,"key_columns":%s,"old_columns":%s,"old_key_columns":%s,"lsn":"%s"%s' % (
        head("schema", source, schema, table), *(msgspec.json.encode(part) for part in parts), lsn, closing,
    )  # fmt: skip


def tail(partition: str | None = None) -> bytes:
    """What stands between the row and the transaction of every event of one table."""
    return b"" if partition is None else b',"partition":' + quote(partition)


def transaction(commit_lsn: str, txid: int | None, committed_at: str | None, origin: str | None = None) -> bytes:
    """The closing that all events of one transaction share; `origin` names where it was replicated from, if it was."""
    at = b"null" if committed_at is None else b'"%b"' % committed_at.encode()
    return b',"commit_lsn":"%b","txid":%b,"committed_at":%b%b}' % (
        commit_lsn.encode(), b"null" if txid is None else b"%d" % txid, at,
        b',"origin":' + quote(origin) if origin else b"",
    )  # fmt: skip


def closing(commit_lsn: bytes, txid: bytes, committed_at: bytes) -> bytes:
    """The same where all of it is known, and known to need no quoting: txid in decimal without leading zeros."""
    return b',"commit_lsn":"%b","txid":%b,"committed_at":"%b"}' % (commit_lsn, txid, committed_at)


def headers(op: Op, position: Position, epoch: int, *, last: bool) -> dict[str, str]:
    """The NATS headers of one event."""
    found = {HEADER_OP: op, HEADER_POSITION: str(position), HEADER_EPOCH: str(epoch), HEADER_VERSION: FORMAT}
    if last:
        found[HEADER_LAST] = "1"
    return found
