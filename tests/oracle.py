"""Replays a stream into tables and compares them with PostgreSQL's own, its changes with PostgreSQL's decoding.

`Replay` takes events strictly: an insert of a row that is there, an update or delete of one that is not, is an error of
the stream; but for tables whose rows DDL has changed meanwhile, of which the log hears later. Values stay raw JSON
until PostgreSQL itself reads them (`json_populate_record`) and prints them as text.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec
import psycopg
from psycopg import sql

from bridge.config import Config
from bridge.event import Column, Event, Position, is_between
from bridge.pipeline.messages import Messages
from bridge.source import lsn
from bridge.source.catalog import Filter
from bridge.stream.reader import Message
from bridge.stream.state import Writer
from tests.running import checkpoint, messages, writers

Raw = dict[str, bytes]
ACTIONS = {"I": "insert", "U": "update", "D": "delete", "T": "truncate"}
_row = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Row(NamedTuple):
    values: Raw
    seq: int
    partition: str | None


def parsed(raw: msgspec.Raw) -> Raw:
    """A row's columns, each as its raw JSON."""
    return {name: bytes(value) for name, value in _row.decode(raw).items()}


class Table:
    """One table's rows: by key, or in a list where there is none. `part`: until its first complete read has ended,
    changes come of rows that are not there. `columns`, `key`: what the log has told of them last."""

    def __init__(self, *, part: bool = False, strict: bool = True) -> None:
        self.strict = strict
        self.keyed: dict[str, Row] = {}
        self.keyless: list[Row] = []
        self.began = 0
        self.part = part
        self.columns: tuple[Column, ...] = ()
        self.key: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Raw]:
        return [row.values for row in (*self.keyed.values(), *self.keyless)]

    def apply(self, found: Event, seq: int) -> None:
        """Take one event."""
        key = b"" if bytes(found.key) in (b"", b"null") else bytes(found.key)
        if found.op == "schema":
            self._altered(found, seq)
            return
        self._fits(found, seq)
        if found.op == "snapshot":
            self._marker(found, seq)
        elif found.op == "truncate":
            self._keep(lambda row: found.partition is not None and row.partition != found.partition)
        elif found.op in ("insert", "read"):
            self._new(key, Row(parsed(found.after), seq, found.partition), strict=found.op == "insert")
        else:
            self._old(found, key, seq)

    def _altered(self, found: Event, seq: int) -> None:
        before = (found.old_columns, sorted(found.old_key_columns))
        assert not self.columns or before == (self.columns, sorted(self.key)), f"sequence {seq}: it was otherwise"
        assert (found.columns, sorted(found.key_columns)) != before, f"sequence {seq}: nothing has changed"
        self.columns, self.key = found.columns, found.key_columns

    def _fits(self, found: Event, seq: int) -> None:
        """Asserts that an event has the columns that were told of last."""
        names = {column.name for column in self.columns}
        if names and found.op in ("insert", "read", "update") and bytes(found.after):
            there = parsed(found.after).keys() | set(found.unchanged)
            assert there == names, f"sequence {seq}: {found.op} has {there}, not {names}"
        if self.key and found.partition is None and bytes(found.key) not in (b"", b"null"):
            keys = parsed(found.key).keys()
            assert keys == set(self.key), f"sequence {seq}: the key is {keys}, not {self.key}"

    def _marker(self, found: Event, seq: int) -> None:
        if found.phase == "begin":
            self.began = seq
        else:
            self.part = False
            self._keep(lambda row: row.seq >= self.began)

    def _keep(self, stays: Callable[[Row], bool]) -> None:
        self.keyed = {key: row for key, row in self.keyed.items() if stays(row)}
        self.keyless = [row for row in self.keyless if stays(row)]

    def _new(self, key: bytes, row: Row, *, strict: bool) -> None:
        if not key:
            self.keyless.append(row)
            return
        name = _canonical(parsed(msgspec.Raw(key)))
        assert not (strict and self.strict) or name not in self.keyed, (
            f"sequence {row.seq}: a row with this key is there already"
        )
        self.keyed[name] = row

    def _old(self, found: Event, key: bytes, seq: int) -> None:
        before = parsed(found.before) if bytes(found.before) else {}
        if key:
            names = parsed(msgspec.Raw(key))
            old = {name: before.get(name, value) for name, value in names.items()}
            past = self.keyed.pop(_canonical(old), None if self.strict else Row({}, 0, None))
            assert past is not None or self.part, f"sequence {seq}: {found.op} of a row that is not there"
        else:
            [index] = [i for i, row in enumerate(self.keyless) if row.values == before][:1] or [-1]
            assert index >= 0, f"sequence {seq}: {found.op} of a row that is not there"
            past = self.keyless.pop(index)
        if found.op == "update":
            values = parsed(found.after)
            assert not values.keys() & set(found.unchanged)
            if past is not None:
                values |= {name: past.values[name] for name in found.unchanged if name in past.values}
            self._new(key, Row(values, seq, found.partition), strict=True)


def _canonical(key: Raw) -> str:
    return json.dumps(sorted((name, value.decode()) for name, value in key.items()))


class Replay:
    """All tables that a stream tells of; `parts`: those that an interrupted initial snapshot has left."""

    def __init__(self, parts: Collection[tuple[str, str]] = (), rewritten: Collection[str] = ()) -> None:
        self.parts = parts
        self.rewritten = rewritten
        self.tables: dict[tuple[str, str], Table] = {}

    def apply(self, message: Message, found: Event) -> None:
        """Take one event."""
        if found.op == "message":
            return
        name = (found.schema, found.table)
        if name not in self.tables:
            self.tables[name] = Table(part=name in self.parts, strict=found.table not in self.rewritten)
        self.tables[name].apply(found, message.seq)


def left(found: list[tuple[Message, Event]]) -> set[tuple[str, str]]:
    """The tables that no initial snapshot has read to the end, and one beside the stream has."""
    initial, later = set[tuple[str, str]](), set[tuple[str, str]]()
    for message, one in found:
        if one.phase == "end":
            (initial if Position.parse(message.position).lsn == 0 else later).add((one.schema, one.table))
    return later - initial


async def agrees(
    config: Config,
    slot: str | None = None,
    *,
    strict: bool = True,
    interrupted: bool = False,
    rewritten: Collection[str] = (),
) -> list[tuple[Message, Event]]:
    """Asserts that the stream is whole and gives PostgreSQL's tables; the messages.

    Args:
        slot: a logical slot made with wal2json before the bridge started: what it gives must be in the stream.
        strict: compare all published tables, also those that the stream says nothing of.
        interrupted: the initial snapshot may have been, or have met tables that were rewritten.
        rewritten: tables of which DDL has changed rows.
    """
    found = await messages(config)
    is_whole(found)
    _written_by(found, await writers(config))
    replay = Replay(left(found) if interrupted else (), rewritten)
    for message, one in found:
        replay.apply(message, one)
    async with await psycopg.AsyncConnection.connect(
        str(config.source.dsn), autocommit=True, client_encoding="utf8"
    ) as connection:
        for schema, table in await published(connection, config.source.tables):
            if strict or (schema, table) in replay.tables:
                rows = replay.tables.get((schema, table), Table()).rows
                hidden = [
                    c for name, t in config.source.table.items() if name == f"{schema}.{table}" for c in t.exclude
                ]
                await same_rows(connection, schema, table, rows, hidden)
        if slot is not None:
            kept = await checkpoint(config)
            assert kept is not None
            await _same_changes(connection, config, slot, lsn.parse(kept.consistent_point), found)
    return found


def is_whole(found: list[tuple[Message, Event]]) -> None:
    """Asserts what holds for every stream: no hole, one order, one last event in each transaction."""
    sequences = [message.seq for message, _ in found]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences))) if sequences else True
    positions = [Position.parse(message.position) for message, _ in found]
    for (message, one), before, here in zip(found[1:], positions, positions[1:], strict=False):
        assert before < here, f"sequence {message.seq} ({one.op}) is not after the one before it"
    assert all(message.epoch for message, _ in found)
    following: Position | None = None
    for (message, one), here in zip(reversed(found), reversed(positions), strict=True):
        assert message.op == one.op
        streamed = not is_between(message.position)
        if streamed:
            assert lsn.parse(one.commit_lsn) == here.end
            # A change of columns stands just before the change that shows it.
            assert lsn.parse(one.lsn) - here.lsn in ((0, 1) if one.op == "schema" else (0,))
        # What stands between transactions is in none.
        closes = streamed and (following is None or following.end != here.end)
        assert message.last == closes, f"sequence {message.seq}: Bridge-Last is {message.last}"
        following = here if streamed else following


def _written_by(found: list[tuple[Message, Event]], known: list[Writer]) -> None:
    """Asserts that nobody wrote before the sequence that he recorded as his first, and everybody did from there on.

    What a killed bridge had sent may come in behind its successor's first messages, in order: then the older epoch
    stands at a sequence of the newer one's.
    """
    for message, _ in found:
        mine = [writer for writer in known if writer.epoch == message.epoch]
        assert all(writer.first_seq <= message.seq for writer in mine), f"sequence {message.seq}"
    epochs = [writer.epoch for writer in sorted(known, key=lambda writer: writer.first_seq)]
    assert epochs == sorted(set(epochs))


async def published(connection: psycopg.AsyncConnection[Any], patterns: list[str]) -> list[tuple[str, str]]:
    cursor = await connection.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname !~ '^(pg_|information_schema$|oracle$)'"
    )
    chosen = Filter(patterns)
    return [(schema, table) for schema, table in await cursor.fetchall() if chosen.matches(schema, table)]


_COLUMNS = """
WITH RECURSIVE base AS (
    SELECT a.attnum, a.attname, a.atttypid AS type FROM pg_attribute a
     WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT base.attnum, base.attname, CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.typelem END
      FROM base JOIN pg_type t ON t.oid = base.type WHERE t.typtype = 'd' OR t.typcategory = 'A'
)
SELECT attname::text, array_agg(format_type(type, NULL)) FROM base GROUP BY attnum, attname ORDER BY attnum
"""


_NULLS_ALLOWED = """
DO $$ DECLARE c text; BEGIN
FOR c IN SELECT attname FROM pg_attribute WHERE attrelid = 'oracle.copy'::regclass AND attnum > 0 AND attnotnull LOOP
    EXECUTE format('ALTER TABLE oracle.copy ALTER %I DROP NOT NULL', c);
END LOOP; END $$
"""


async def same_rows(
    connection: psycopg.AsyncConnection[Any], schema: str, table: str, rows: list[Raw], hidden: list[str]
) -> None:
    """Asserts that the rows, read back by PostgreSQL, print the same text as the table's, as often as there."""
    original, copy = sql.Identifier(schema, table), sql.Identifier("oracle", "copy")
    await connection.execute("CREATE SCHEMA IF NOT EXISTS oracle")
    await connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(copy))
    await connection.execute(sql.SQL("CREATE TABLE {} (LIKE {})").format(copy, original))
    await connection.execute(_NULLS_ALLOWED)
    cursor = await connection.execute(_COLUMNS, [original.as_string(connection)])
    types = dict(await cursor.fetchall())
    lines = [written(row, types) for row in rows]
    for start in range(0, len(lines), 5000):
        # No JSON has this character, be it stored with line breaks; an array costs much more to send.
        await connection.execute(
            sql.SQL(
                "INSERT INTO {0} SELECT r.* FROM unnest(string_to_array(%s::text, chr(1))) x"
                " CROSS JOIN LATERAL json_populate_record(NULL::{0}, x::json) r"
            ).format(copy),
            ["\x01".join(lines[start : start + 5000])],
        )
    shown = sql.SQL("SELECT ROW({})::text FROM {}")
    columns = sql.SQL(", ").join(sql.Identifier(name) for name in types if name not in hidden)
    kind = await connection.execute("SELECT relkind FROM pg_class WHERE oid = %s::regclass", [original.as_string()])
    # Of a table that others inherit from its own rows alone; a partitioned one has none.
    whose = original if await kind.fetchone() == ("p",) else sql.SQL("ONLY {}").format(original)
    ours, theirs = shown.format(columns, copy), shown.format(columns, whose)
    for first, second, what in ((ours, theirs, "only in the stream"), (theirs, ours, "only in PostgreSQL")):
        difference = await connection.execute(sql.SQL("{} EXCEPT ALL {}").format(first, second))
        found = await difference.fetchall()
        assert not found, f"{schema}.{table}: {len(found)} rows are {what}, such as {found[0][0][:500]}"


def written(row: Raw, types: dict[str, list[str]]) -> str:
    """A row as json_populate_record reads it: bytea in hexadecimal, dates in PostgreSQL's own notation."""
    parts = []
    for name, value in row.items():
        if name not in types:
            continue  # a column that was dropped since
        kinds = set(types[name])
        if "bytea" in kinds:
            value = _strings(value, _bytea)
        elif kinds & {"date", "timestamp without time zone", "timestamp with time zone"}:
            value = _strings(value, _moment)
        parts.append(f"{json.dumps(name)}:{value.decode()}")
    return "{" + ",".join(parts) + "}"


def _strings(value: bytes, change: Callable[[str], str]) -> bytes:
    def walk(part: Any) -> Any:
        if isinstance(part, list):
            return [walk(one) for one in part]
        return change(part) if isinstance(part, str) else part

    return json.dumps(walk(json.loads(value))).encode()


def _bytea(text: str) -> str:
    return text if text.startswith(("[", "\\x")) else "\\x" + base64.b64decode(text, validate=True).hex()


def _moment(text: str) -> str:
    match = re.fullmatch(r"([+-]?)(\d{4,})(-\d\d-\d\d.*)", text)
    if match is None:
        return text
    sign, year, rest = match.groups()
    if sign == "-" or year == "0000":
        return f"{int(year) + 1:04d}{rest} BC"
    return year + rest


def _leaf(found: Event) -> str:
    return found.partition or f"{found.schema}.{found.table}"


class _Change(msgspec.Struct):
    """What counts of a line of wal2json here."""

    action: str
    lsn: str = ""
    nextlsn: str = ""
    schema: str = ""
    table: str = ""
    transactional: bool = True
    prefix: str = ""
    content: str = ""


_change = msgspec.json.Decoder(_Change).decode


async def _same_changes(
    connection: psycopg.AsyncConnection[Any],
    config: Config,
    slot: str,
    consistent_point: int,
    found: list[tuple[Message, Event]],
) -> None:
    """Asserts that the stream has what the slot gives after the bridge's own beginning, each change once, in order."""
    chosen = Filter(config.source.tables)
    roots = await connection.execute(
        "SELECT c.oid::regclass::text, n.nspname, r.relname FROM pg_class c"
        " JOIN pg_class r ON r.oid = pg_partition_root(c.oid) JOIN pg_namespace n ON n.oid = r.relnamespace"
    )
    root_of = {name: (schema, table) for name, schema, table in await roots.fetchall()}
    cursor = await connection.execute(
        "SELECT data FROM pg_logical_slot_get_changes(%s, NULL, NULL, 'format-version', '2', 'include-lsn', '1')"
        # A logical message that is not published need not be valid text.
        f""" WHERE data NOT LIKE '{{"action":"M"%%' OR {bool(config.source.messages)}""",
        [slot],
    )
    emitted = Messages(config.stream.prefix, config.source.name, config.source.messages)
    wanted: list[tuple[str, str, str, str | None]] = []
    end = ""
    matching: dict[str, bool] = {}
    async for (line,) in cursor:
        record = _change(line)
        if record.action == "B":
            end = record.nextlsn
        if record.action == "M" and emitted.subject(record.prefix):
            at = end if record.transactional else record.lsn
            if lsn.parse(at) > consistent_point:
                wanted.append((at, record.lsn, "message", record.content))
        if record.action not in ACTIONS or lsn.parse(end) <= consistent_point:
            continue
        name = f"{record.schema}.{record.table}"
        if name not in matching:
            root = root_of.get(name.removeprefix("public."), (record.schema, record.table))
            matching[name] = chosen.matches(*root)
        if matching[name]:
            wanted.append((end, record.lsn, ACTIONS[record.action], name))
    streamed = [
        (one.commit_lsn, one.lsn, one.op, one.content if one.op == "message" else _leaf(one))
        for _, one in found
        if one.op in ACTIONS.values() or one.op == "message"
    ]
    for index, (ours, theirs) in enumerate(zip(streamed, wanted, strict=False)):
        assert ours == theirs, f"change {index}: the stream has {ours}, PostgreSQL {theirs}"
    assert len(streamed) == len(wanted)
