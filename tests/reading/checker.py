"""Whether a stream with snapshots in it ever goes back in time, and what a reader has who begins at the last one.

Every write gives a row a higher `v` than any row of its key has had. So on each key the values of `v` may only grow,
whatever was deleted and came again, and a row that is read is one that was not newer before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import psycopg

from bridge.event import Event
from bridge.stream.reader import Message

_columns = msgspec.json.Decoder(dict[str, Any])


class Last(NamedTuple):
    v: int
    alive: bool
    partition: str | None = None


def _hits(truncate: Event, partition: str | None) -> bool:
    """Whether a truncate empties the partition."""
    return truncate.partition is None or truncate.partition == partition


def never_back(found: list[tuple[Message, Event]], table: str) -> int:
    """Assert that no key of a table goes back; how many rows were read with a snapshot."""
    keys: dict[bytes, Last] = {}
    reads = 0
    for message, one in found:
        if one.table != table or one.op in ("snapshot", "schema"):
            continue
        where = f"sequence {message.seq}: {one.op} of {bytes(one.key).decode()}"
        if one.op == "truncate":
            keys = {k: last._replace(alive=last.alive and not _hits(one, last.partition)) for k, last in keys.items()}
            continue
        key = bytes(one.key)
        if one.op == "delete":
            keys[key] = keys.get(key, Last(0, False))._replace(alive=False)
            continue
        if bytes(one.before):
            old = bytes(one.before)
            keys[old] = keys.get(old, Last(0, False))._replace(alive=False)
        v, last = _columns.decode(one.after)["v"], keys.get(key)
        if one.op == "read":
            reads += 1
            assert last is None or v > last.v or (v == last.v and last.alive), f"{where} goes back from {last} to {v}"
        elif last is not None:
            assert v > last.v, f"{where} goes back from {last} to {v}"
        keys[key] = Last(v, True, one.partition)
    return reads


def from_last_begin(found: list[tuple[Message, Event]], table: str) -> tuple[int, dict[bytes, dict[str, Any]]]:
    """What a reader has of a table who begins at its last complete snapshot: where that began, and the rows by key.

    An update that leaves columns out may come before its row is read: it is kept as it is until then.
    """
    mine = [(message, one) for message, one in found if one.table == table]
    ends = [n for n, (_, one) in enumerate(mine) if one.phase == "end"]
    assert ends, "no snapshot has been completed"
    begin = next(n for n in range(ends[-1], -1, -1) if mine[n][1].phase == "begin")
    rows: dict[bytes, dict[str, Any]] = {}
    parts: dict[bytes, str | None] = {}
    for number, (message, one) in enumerate(mine[begin:], begin):
        key = bytes(one.key)
        if one.op == "truncate":
            rows = {k: row for k, row in rows.items() if not _hits(one, parts[k])}
        elif one.op == "delete":
            rows.pop(key, None)
        elif one.op in ("insert", "update", "read"):
            old = rows.pop(bytes(one.before) or key, {})
            kept = {name: old[name] for name in one.unchanged if name in old}
            rows[key], parts[key] = {**kept, **_columns.decode(one.after)}, one.partition
            lacking = set(one.unchanged) - kept.keys()
            known = number < ends[-1] or not lacking
            assert known, f"sequence {message.seq}: nobody knows {sorted(lacking)} of {key!r}"
        if number == ends[-1]:
            halves = [key for key, row in rows.items() if "body" not in row]
            assert not halves, f"rows without all columns at the snapshot's end, {message.seq}: {halves[:5]}"
    return mine[begin][0].seq, rows


async def same(dsn: str, table: str, rows: dict[bytes, dict[str, Any]]) -> int:
    """Assert that a reader has what the table has; how many rows."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        cursor = await connection.execute(f"SELECT row_to_json(t)::text FROM {table} t")
        there = [_columns.decode(row[0]) async for row in cursor]
    wanted = {tuple(sorted(row.items())) for row in there}
    has = {tuple(sorted(row.items())) for row in rows.values()}
    assert len(has) == len(rows)
    some = sorted(str(row)[:100] for row in has ^ wanted)[:2]
    assert has == wanted, f"{len(wanted - has)} rows missing, {len(has - wanted)} extra, such as {some}"
    return len(there)
