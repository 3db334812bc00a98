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
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Op = Literal["insert", "update", "delete", "truncate", "read", "schema", "snapshot", "message"]

HEADER_OP = "Bridge-Op"
HEADER_POSITION = "Bridge-Position"
HEADER_EPOCH = "Bridge-Epoch"
HEADER_VERSION = "Bridge-V"
HEADER_LAST = "Bridge-Last"
FORMAT = "1"


class Position(NamedTuple):
    """Where an event stands in its source's history; tuple order is stream order.

    timeline: of the commit record; end: the END of the commit record; lsn: the change's own;
    k: counts records with that same lsn within the transaction, before any filtering;
    sub: 0 for what comes from the WAL, else counts on from the last streamed event (snapshot rows, markers).
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
        fields = text.split("-")
        if [len(field) for field in fields] != [8, 16, 16, 8, 8]:
            raise ValueError(f"not a position: {text!r}")
        return cls(*(int(field, 16) for field in fields))


class Event(msgspec.Struct, frozen=True):
    """One decoded event; `key`, `before` and `after` are raw JSON, empty bytes where absent."""

    op: Op
    source: str
    schema: str
    table: str
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


_decoder = msgspec.json.Decoder(Event)


def decode(data: bytes) -> Event:
    """The event in a message's payload; msgspec.DecodeError where it is none."""
    return _decoder.decode(data)


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


def tail(partition: str | None = None) -> bytes:
    """What stands between the row and the transaction of every event of one table."""
    return b"" if partition is None else b',"partition":' + quote(partition)


def transaction(commit_lsn: str, txid: int | None, committed_at: str | None) -> bytes:
    """The closing that all events of one transaction share."""
    at = b"null" if committed_at is None else b'"%b"' % committed_at.encode()
    return b',"commit_lsn":"%b","txid":%b,"committed_at":%b}' % (
        commit_lsn.encode(), b"null" if txid is None else b"%d" % txid, at
    )  # fmt: skip


def headers(op: Op, position: Position, epoch: int, *, last: bool) -> dict[str, str]:
    """The NATS headers of one event."""
    found = {HEADER_OP: op, HEADER_POSITION: str(position), HEADER_EPOCH: str(epoch), HEADER_VERSION: FORMAT}
    if last:
        found[HEADER_LAST] = "1"
    return found
