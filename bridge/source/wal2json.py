"""wal2json's format-version 2: one JSON object per begin, change, message and commit. Pure.

    {"action":"B","xid":725,"timestamp":"…","lsn":"0/1526B30","nextlsn":"0/1526B60"}
    {"action":"I","xid":725,"lsn":"0/15269D8","schema":"public","table":"t","columns":[{"name":"id","typeoid":23,"value":1}],
     "pk":[{"name":"id","typeoid":23}]}

B and C carry the commit record's start as `lsn` and its end as `nextlsn`. I, U, D and T carry their WAL record's start,
M the end of its record.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Literal, NamedTuple

import msgspec

from bridge import event
from bridge.errors import BadRecord

OPTIONS = {
    "format-version": "2",
    "include-lsn": "1",
    "include-xids": "1",
    "include-timestamp": "1",
    "include-types": "0",
    "include-type-oids": "1",
    "include-pk": "1",
    "include-origin": "1",
}
BEGIN, COMMIT = b'{"action":"B",', b'{"action":"C",'
NUMERIC_AS_STRING = "numeric-data-types-as-string"

Action = Literal["B", "C", "I", "U", "D", "T", "M"]
# What gets into events as it is.
_lsn = re.compile("[0-9A-F]{1,8}/[0-9A-F]{1,8}").fullmatch
_time = re.compile(r"[0-9]{4,6}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?\+00").fullmatch
# The usual one, which has each microsecond's digit.
LONGEST = len("2026-01-01 00:00:00.000000+00")
_CLOCK = len("00:00:00.000000")
_begin = re.compile(
    rb'\{"action":"B","xid":(0|[1-9][0-9]{0,9}),"timestamp":"([0-9]{4}-[0-9]{2}-[0-9]{2}) '
    rb'([0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{1,6})\+00","origin":0,'
    rb'"lsn":"([0-9A-F]{1,8})/([0-9A-F]{1,8})","nextlsn":"(([0-9A-F]{1,8})/([0-9A-F]{1,8}))"\}'
).fullmatch


class Begin(NamedTuple):
    """A transaction of this server's own: its commit record begins at `start` and ends at `end`; `committed_at` as
    `timestamp` has it; `closing` is what its events share."""

    xid: int
    start: int
    end: int
    committed_at: str
    closing: bytes


class Cell(msgspec.Struct, gc=False):
    """One column of a change; `value` is raw JSON."""

    name: str
    typeoid: int
    value: msgspec.Raw = msgspec.Raw(b"null")


class Named(msgspec.Struct, gc=False):
    """A column of the primary key."""

    name: str


class Record(msgspec.Struct, gc=False):
    """One of wal2json's objects; `columns`: the new row; `identity`: the old key, with FULL identity the old row; `pk`:
    the primary key as it was when the change was made, none where it is deferrable; `prefix`, `content`: a message's;
    `origin`: of what was replicated into the database, by its number there."""

    action: Action
    lsn: str
    nextlsn: str = ""
    xid: int | None = None
    timestamp: str | None = None
    schema: str = ""
    table: str = ""
    transactional: bool = True
    columns: list[Cell] = []
    identity: list[Cell] = []
    pk: list[Named] = []
    prefix: str = ""
    content: msgspec.Raw = msgspec.Raw()
    origin: int | None = None


_decoder = msgspec.json.Decoder(Record)


def decode(data: bytes | memoryview | str) -> Record:
    """The record in one message of the stream.

    Raises:
        BadRecord: it is no record of format-version 2; the message names the place, never the content.
    """
    try:
        record = _decoder.decode(data)
        time = record.timestamp
        if (
            not _lsn(record.lsn)
            or (record.nextlsn and not _lsn(record.nextlsn))
            or (time is not None and not _is_time(time))
        ):
            raise msgspec.ValidationError("an LSN or a time of another form")
        return record
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRecord(
            f"wal2json sent a record of {len(data)} bytes that cannot be read: {_place(error)}",
            "upgrade wal2json; if it stays, report the table's column types",
        ) from None


def begin(data: bytes) -> Begin | None:
    """What the usual begin of a transaction says, without decoding it; None for any other record, and where anything in
    it may not be what `decode` lets pass."""
    found = _begin(data)
    if found is None:
        return None
    xid, day, clock, start_high, start_low, commit_lsn, high, low = found.groups()
    at = b"%bT%bZ" % (day, clock.ljust(_CLOCK, b"0"))
    committed_at = at.decode()
    try:
        datetime.fromisoformat(committed_at)
    except ValueError:
        return None
    start, end = int(start_high, 16) << 32 | int(start_low, 16), int(high, 16) << 32 | int(low, 16)
    return Begin(int(xid), start, end, committed_at, event.closing(commit_lsn, xid, at))


def _is_time(text: str) -> bool:
    if len(text) == LONGEST and text[10] == " " and text.endswith("+00"):
        # Each transaction has one, and this is faster than the expression.
        try:
            datetime.fromisoformat(text)
        except ValueError:
            return False
        return True
    return _time(text) is not None


def weight(record: Record) -> int:
    """The bytes of a change's values; what is made of them is at most four times as long."""
    return sum(len(bytes(cell.value)) for cells in (record.columns, record.identity) for cell in cells)


def _place(error: Exception) -> str:
    found = re.search(r"at `(\$[^`]*)`|byte (\d+)", str(error))
    return f"{type(error).__name__} at {found[1] or 'byte ' + found[2]}" if found else type(error).__name__


_IDENTITY = re.compile(r'no tuple identifier for (\w+) in table "(.*)"\."(.*)"', re.DOTALL)


def missing_identity(notice: str) -> tuple[str, str, str] | None:
    """(UPDATE or DELETE, schema, table) if a server's notice says that wal2json dropped a change for want of a key."""
    found = _IDENTITY.search(notice)
    return (found[1], found[2], found[3]) if found else None


def timestamp(value: str | None) -> str | None:
    """wal2json's time of commit as ISO 8601 in UTC with six digits: "2026-01-01T00:00:00.000000Z"."""
    if value is None:
        return None
    if len(value) == 29 and value.endswith("+00"):
        return f"{value[:10]}T{value[11:26]}Z"
    day, _, time = value.partition(" ")
    clock, _, fraction = time.removesuffix("+00").partition(".")
    return f"{day}T{clock}.{fraction:0<6}Z"
