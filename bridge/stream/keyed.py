"""An event of the log as the messages of a compacted log, which keeps the last message of each subject. Pure.

    insert, update, read    the row's own subject, `{table}.{key}`; a partition's rows `{table}.{partition}.{key}`
    delete                  the same subject: a tombstone, which goes after some time
    a changed key           a tombstone under the old key, then the whole row as an insert under the new one
    truncate, snapshot      `{table}.@truncate` (or the partition's), `{table}.@begin`, `{table}.@end`

Every row's message must hold all of the row, since nothing before it is kept: an update that leaves out a TOASTed
column, or a change that does not say which row it is of, cannot be held.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from bridge import event
from bridge.errors import NotCompactable
from bridge.stream import subjects


class _Change(msgspec.Struct):
    """An event with all that is copied left as raw JSON; `ref` stands for the row where it is stored elsewhere."""

    op: event.Op
    source: str
    schema: str
    table: str
    key: msgspec.Raw = msgspec.Raw()
    before: msgspec.Raw = msgspec.Raw()
    after: msgspec.Raw = msgspec.Raw()
    ref: msgspec.Raw = msgspec.Raw()
    unchanged: tuple[str, ...] = ()
    partition: str | None = None
    phase: str = ""
    lsn: str = ""
    commit_lsn: str = ""
    txid: int | None = None
    committed_at: str | None = None
    origin: str | None = None


_change = msgspec.json.Decoder(_Change)
_columns = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NONE = b"null"
_END = b'"phase":"end"'


class Keyed(NamedTuple):
    """One message; `tombstone` says that it only tells of a row that is gone."""

    subject: bytes
    op: bytes
    position: bytes
    payload: bytes
    tombstone: bool = False


def spread(subject: bytes, position: bytes, payload: bytes, began: int) -> list[Keyed]:
    """The messages of one event: one, or the two of a changed key, which no reader may see apart.

    Args:
        subject: the table's.
        began: the sequence of the table's last begin marker, for its end marker.

    Raises:
        NotCompactable: the event does not tell the whole row, or which one it is.
    """
    try:
        found = _change.decode(payload)
    except RecursionError:
        raise NotCompactable(
            f"the row at {position.decode()} on {subject.decode()} holds a value nested too deep to find its key",
            'make it less deep, take the table out of [source] tables, or choose [stream] mode = "log"',
        ) from None
    if found.op in ("insert", "update", "read", "delete"):
        return _row(subject, position, payload, found)
    if found.op == "snapshot" and found.phase == "end":
        payload = payload.replace(_END, b'%s,"begin_seq":%d' % (_END, began), 1)
    return [Keyed(last_token(subject, found), found.op.encode(), position, payload)]


def located(subject: bytes, position: str, payload: bytes) -> bytes:
    """The subject of the row that an event leaves, from its table's; it raises what `spread` does."""
    return spread(subject, position.encode(), payload, 0)[-1].subject


def last_token(subject: bytes, found: _Change) -> bytes:
    """The subject of an event without a key."""
    last = {
        "truncate": subjects.TRUNCATE,
        "schema": subjects.SCHEMA,
        "snapshot": subjects.END if found.phase == "end" else subjects.BEGIN,
    }.get(found.op)
    return _below(subject, found.partition, last) if last else subject


def _below(subject: bytes, partition: str | None, last: str) -> bytes:
    middle = f".{subjects.token(partition)}" if partition is not None else ""
    return subject + f"{middle}.{last}".encode()


def _row(subject: bytes, position: bytes, payload: bytes, found: _Change) -> list[Keyed]:
    if bytes(found.key) in (b"", _NONE):
        raise NotCompactable(
            f"a change of {found.schema}.{found.table} at {position.decode()} does not say which row it is of",
            f"a compacted log holds only tables with a key: give {found.schema}.{found.table} a primary key and start "
            'anew (`bridge drop --stream --state`), take it out of [source] tables, or choose [stream] mode = "log"',
        )
    key = _columns.decode(found.key)
    here = _below(subject, found.partition, subjects.key_token(key.values()))
    if found.op == "delete":
        return [Keyed(here, b"delete", position, payload, tombstone=True)]
    left_out = [name for name in found.unchanged if name not in key]
    if left_out:
        raise _not_whole(found, position, left_out)
    # What stands elsewhere has the key beside it, too.
    filled = bool(found.unchanged) and not bytes(found.ref)
    after = _filled(found, key) if filled else bytes(found.after)
    before = _columns.decode(found.before) if bytes(found.before) else {}
    old = [before.get(name, value) for name, value in key.items()]
    there = _below(subject, found.partition, subjects.key_token(old)) if before else here
    if there == here:
        if filled:
            payload = _payload(found, found.op, found.key, found.before, after)
        return [Keyed(here, found.op.encode(), position, payload)]
    old_key = msgspec.json.encode(dict(zip(key, old, strict=True)))
    old_row = found.before if len(before) > len(key) else msgspec.Raw()
    return [
        Keyed(there, b"delete", position, _payload(found, "delete", old_key, old_row, b""), tombstone=True),
        Keyed(here, b"insert", _next(position), _payload(found, "insert", found.key, b"", after)),
    ]


def _filled(found: _Change, key: dict[str, msgspec.Raw]) -> bytes:
    """The row with the columns of the key that were left out of an update."""
    return msgspec.json.encode(_columns.decode(found.after) | {name: key[name] for name in found.unchanged})


def _not_whole(found: _Change, position: bytes, left_out: list[str]) -> NotCompactable:
    table = f"{found.schema}.{found.table}"
    return NotCompactable(
        f"an update of {table} at {position.decode()} leaves out {', '.join(left_out)}, TOASTed values that did not "
        "change: a compacted log keeps nothing to take them from",
        f"ALTER TABLE {found.partition or table} REPLICA IDENTITY FULL, then start anew (`bridge drop --stream "
        '--state`, `bridge run`); or choose [stream] mode = "log"',
    )


def _payload(
    found: _Change, op: event.Op, key: bytes | msgspec.Raw, before: bytes | msgspec.Raw, after: bytes | msgspec.Raw
) -> bytes:
    ref = found.ref if op != "delete" else b""
    row = b"".join(
        b',"%s":%s' % (name, bytes(value))
        for name, value in ((b"key", key), (b"before", before), (b"after", after), (b"ref", ref))
        if bytes(value)
    )
    return b"".join(
        (
            event.head(op, found.source, found.schema, found.table),
            row,
            event.tail(found.partition),
            b',"lsn":' + event.quote(found.lsn),
            event.transaction(found.commit_lsn, found.txid, found.committed_at, found.origin),
        )
    )


def _next(position: bytes) -> bytes:
    return b"%b%08x" % (position[:-8], int(position[-8:], 16) + 1)
