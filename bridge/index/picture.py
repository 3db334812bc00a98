"""What an index's tables hold, as the log says it up to a sequence: one row for each address, in a file of its own.

Feed it the tables' messages in order. Columns that PostgreSQL did not send are merged in; changed keys, deletes,
truncates and the sweep at a complete read's end are followed as the index reader follows them, and so is a message of
an older epoch that comes in late: it counts under the highest epoch seen. A row whose last event cannot be read is
kept with the reason, a column that nothing before an update tells with its name.

The file is SQLite's own temporary one (in the folder that TMPDIR names): it has no name, so that nothing is left of it
however the process ends. Memory stays the same whatever the size. Calls block; a thread may make them, one at a time.
Restricted to some rows (`wanted`), others are not kept; `again` tells whether a second pass is needed.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from bridge.errors import ServerRefused
from bridge.event import Event
from bridge.index.bases import address_of
from bridge.index.document import Builder, read, version
from bridge.index.ground import Incoming
from bridge.index.naming import NO_KEY, UNREADABLE, Rejected, keyed, keyless, outline, row

ROWS = ("insert", "update", "read", "delete")
MOST = 10_000
MOST_BYTES = 8 << 20
CACHE_KIB = 64 << 10
_SCHEMA = """
CREATE TABLE rows (id TEXT PRIMARY KEY, space TEXT, name TEXT, version INTEGER, partition TEXT, key BLOB, data BLOB,
                   missing TEXT, problem TEXT);
CREATE TABLE siblings (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE moves (new TEXT, old TEXT, PRIMARY KEY (new, old)) WITHOUT ROWID;
CREATE TABLE notes (id TEXT PRIMARY KEY, owner TEXT, note TEXT) WITHOUT ROWID;
CREATE INDEX owners ON notes (owner);
"""
_PUT = """
INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
    space = excluded.space, name = excluded.name, version = excluded.version, partition = excluded.partition,
    key = excluded.key, data = excluded.data, missing = excluded.missing, problem = excluded.problem
"""
_CHAIN = """
WITH RECURSIVE chain (id) AS (SELECT old FROM moves WHERE new = ? UNION SELECT old FROM moves JOIN chain ON new = id)
SELECT id FROM chain
"""


_DELETE = """
DELETE FROM rows WHERE version < ? AND space = ? AND name = ? AND (? IS NULL OR partition = ?)
"""
_UNEXPECTED = """
SELECT rowid, * FROM rows WHERE rowid > ? AND NOT EXISTS (SELECT 1 FROM siblings WHERE siblings.id = rows.id)
 ORDER BY rowid LIMIT ?
"""
_KNOWN = "SELECT 1 FROM rows WHERE id = ? UNION ALL SELECT 1 FROM siblings WHERE id = ?"

Table = tuple[str, str]


class Standing(NamedTuple):
    """A row as it stands in the log.

    Args:
        id: its address.
        schema, table: its table, as events name it; empty where the event cannot be read.
        version: of its last write.
        key: raw JSON, as the event had it.
        data: its columns, raw JSON.
        missing: columns whose values the log does not tell.
        problem: why its last event cannot be read; empty where it can.
    """

    id: str
    schema: str
    table: str
    version: int
    partition: str | None
    key: bytes
    data: bytes
    missing: tuple[str, ...] = ()
    problem: str = ""

    def event(self) -> Event:
        """The row as one event that writes it, with `missing` as the columns that it leaves out."""
        return Event(
            op="read", source="", schema=self.schema, table=self.table, key=msgspec.Raw(self.key),
            after=msgspec.Raw(self.data), unchanged=self.missing, partition=self.partition,
        )  # fmt: skip


class Note(NamedTuple):
    """Something about the document at the address `id`, which belongs to the row at the address `owner`."""

    id: str
    owner: str
    note: str


class Change(NamedTuple):
    """What one message changes: `ids` lists the row's address and the one that it had before, none where
    that is unknown; `problem` says why the event cannot be read."""

    event: Event
    ids: tuple[str, ...] = ()
    problem: str = ""


class Picture:
    """The rows. Use it with `with`, which removes the file.

    Args:
        builders: of each table, by (schema, table): they know how its rows are called.
        keys: the columns of a table's key as they are recorded now, for events from before it had one.
        epoch: the highest epoch from before the first message.
        wanted: the only addresses whose rows are kept; None keeps all.

    Attributes:
        seq: the last message's sequence. epoch: the highest epoch so far. events: how many messages were taken.
        lost: how many of them do not tell which row they change. open: the version of a complete read's begin marker
            for each table where its end has not come.
    """

    def __init__(
        self,
        builders: Mapping[Table, Builder],
        keys: Callable[[Table], Sequence[str]],
        *,
        epoch: int = 0,
        wanted: Iterable[str] | None = None,
    ) -> None:
        self._builders = builders
        self._keys = keys
        self._first_epoch = epoch
        self._wanted = set(wanted) if wanted is not None else None
        self._closure: set[str] = set()
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = off", "synchronous = off", f"cache_size = -{CACHE_KIB}", "temp_store = file"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(_SCHEMA)
        self._begin()

    def _begin(self) -> None:
        self._pending: dict[str, Standing | None] = {}
        self._size = 0
        self._began: dict[Table, int] = {}
        self.open: dict[Table, int] = {}
        self.seq, self.epoch, self.events, self.lost = 0, self._first_epoch, 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    # Messages

    def take(self, messages: Sequence[Incoming]) -> None:
        """Take messages, each of a higher sequence than those before it.

        Raises:
            ServerRefused: there is no room for the file.
        """
        for message in messages:
            self._advance(message)
            self._apply(message.data, version(self.epoch, message.seq))
            if len(self._pending) >= MOST or self._size >= MOST_BYTES:
                self._flush()

    def touch(self, messages: Sequence[Incoming]) -> None:
        """Take messages from behind the picture: no row changes, but notes on what they change are forgotten."""
        gone: set[str] = set()
        for message in messages:
            self._advance(message)
            change = self._change(message.data)
            event = change.event
            gone.update(change.ids)
            if event.op == "snapshot":
                self._marker(event, version(self.epoch, message.seq), sweep=False)
            if event.op == "truncate" or event.phase == "end":
                gone.clear()
                self._run("DELETE FROM notes")
        self._many("DELETE FROM notes WHERE owner = ?", [(doc_id,) for doc_id in gone])

    def _advance(self, message: Incoming) -> None:
        self.seq = message.seq
        self.epoch = max(self.epoch, message.epoch)
        self.events += 1

    def _change(self, data: bytes) -> Change:
        """What a message changes, read as the index reader reads it."""
        try:
            event = read(data)
            builder = self._builders.get((event.schema, event.table))
            if builder is None:
                raise Rejected("it is of a table that the index does not hold")
            if event.op not in ROWS:
                return Change(event)
            if keyless(event):
                event = keyed(event, self._keys((event.schema, event.table)))
            doc_id, old = builder.naming.identity(event)
            return Change(event, (doc_id,) if old is None else (doc_id, old))
        except Rejected as error:
            problem = str(error)
        except UNREADABLE as error:
            problem = f"it cannot be read ({type(error).__name__})"
        found, doc_id = outline(data), address_of(data, self._builders)
        unread = Event(op=found.op, source="", schema=found.schema, table=found.table, key=found.key)  # type: ignore[arg-type]
        return Change(unread, (doc_id,) if doc_id else (), problem)

    def _apply(self, data: bytes, at: int) -> None:
        event, ids, problem = self._change(data)
        if problem:
            self._lose(event, ids, problem, at)
        elif event.op == "truncate":
            self._flush()
            self._delete((event.schema, event.table), at, event.partition)
        elif event.op == "snapshot":
            self._marker(event, at, sweep=True)
        elif event.op == "delete":
            self._put(ids[0], None)
        elif ids:
            self._write(event, ids, at)

    def _write(self, event: Event, ids: tuple[str, ...], at: int) -> None:
        doc_id, old = ids[0], ids[-1]
        if self._wanted is not None and old != doc_id and event.unchanged:
            self._run("INSERT OR IGNORE INTO moves VALUES (?, ?)", (doc_id, old))
        after, missing = bytes(event.after), event.unchanged
        if missing and self._keeps(doc_id):
            base = self.get(old)
            columns, known = row(after), row(base.data) if base is not None and base.data else {}
            columns |= {name: known[name] for name in missing if name in known}
            missing = tuple(name for name in missing if name not in known)
            after = msgspec.json.encode(columns)
        if old != doc_id:
            self._put(old, None)
        self._put(
            doc_id,
            Standing(doc_id, event.schema, event.table, at, event.partition, bytes(event.key), after, missing),
        )

    def _lose(self, event: Event, ids: tuple[str, ...], problem: str, at: int) -> None:
        """An event that cannot be read: what it made of its row is not known, but that there is one."""
        if not ids:
            self.lost += 1
            return
        if event.op == "delete":
            self._put(ids[0], None)
            return
        before = self.get(ids[0])
        partition = before.partition if before is not None else None
        key = bytes(event.key or NO_KEY)
        self._put(ids[0], Standing(ids[0], event.schema, event.table, at, partition, key, b"", (), problem))

    def _marker(self, event: Event, at: int, *, sweep: bool) -> None:
        """At a complete read's end, rows last written before its begin are gone."""
        table = (event.schema, event.table)
        if event.phase == "begin":
            self._began[table] = self.open[table] = at
            return
        self.open.pop(table, None)
        # In a compacted log a later begin may have taken the place of this end's own.
        begin = version(self.epoch, event.begin_seq) if event.begin_seq else self._began.get(table, 0)
        if sweep and begin and begin < at:
            self._flush()
            self._delete(table, begin, None)

    # Rows

    def _keeps(self, doc_id: str) -> bool:
        return self._wanted is None or doc_id in self._wanted or doc_id in self._closure

    def _put(self, doc_id: str, standing: Standing | None) -> None:
        if self._keeps(doc_id):
            self._pending[doc_id] = standing
            self._size += len(standing.data) if standing is not None else 0

    def _flush(self) -> None:
        if not self._pending:
            return
        self._many("DELETE FROM rows WHERE id = ?", [(i,) for i, s in self._pending.items() if s is None])
        self._many(_PUT, [_values(s) for s in self._pending.values() if s is not None])
        self._pending.clear()
        self._size = 0

    def _delete(self, table: Table, before: int, partition: str | None) -> None:
        self._run(_DELETE, (before, *table, partition, partition))

    def get(self, doc_id: str) -> Standing | None:
        """The row of an id; None where there is none."""
        if doc_id in self._pending:
            return self._pending[doc_id]
        found = self._run("SELECT * FROM rows WHERE id = ?", (doc_id,)).fetchone()
        return _standing(found) if found is not None else None

    def count(self) -> int:
        """How many rows there are."""
        self._flush()
        return int(self._run("SELECT count(*) FROM rows").fetchone()[0])

    def chunks(self, most: int, most_bytes: int) -> Iterator[list[Standing]]:
        """All rows, in lists of so many or so large at most; a row that is larger comes alone."""
        self._flush()
        chunk, size = list[Standing](), 0
        with contextlib.closing(self._run("SELECT * FROM rows ORDER BY rowid")) as cursor:
            for found in cursor:
                standing = _standing(found)
                if chunk and (len(chunk) >= most or size + len(standing.data) > most_bytes):
                    yield chunk
                    chunk, size = [], 0
                chunk.append(standing)
                size += len(standing.data)
        if chunk:
            yield chunk

    def expect(self, siblings: Iterable[str]) -> None:
        """Rows have these documents beside their own."""
        self._many("INSERT OR IGNORE INTO siblings VALUES (?)", [(address,) for address in siblings])

    def lacks(self, address: str) -> bool:
        """Whether no row has a document there."""
        self._flush()
        return self._run(_KNOWN, (address, address)).fetchone() is None

    def unexpected(self, most: int) -> Iterator[list[Standing]]:
        """The rows that nobody expected, in lists of `most`."""
        self._flush()
        last = 0
        while found := self._run(_UNEXPECTED, (last, most)).fetchall():
            yield [_standing(one[1:]) for one in found]
            last = found[-1][0]

    def again(self) -> bool:
        """Whether another pass from the beginning is needed, because a wanted row had other keys before."""
        if self._wanted is None or self._closure:
            return False
        for doc_id in self._wanted:
            self._closure.update(old for (old,) in self._run(_CHAIN, (doc_id,)))
        self._closure -= self._wanted
        if not self._closure:
            return False
        self._run("DELETE FROM rows")
        self._begin()
        return True

    # Notes

    def note(self, notes: Iterable[Note]) -> None:
        """Write down something of documents, in place of what stood there."""
        self._many("INSERT OR REPLACE INTO notes VALUES (?, ?, ?)", notes)

    def forget(self, addresses: Iterable[str]) -> None:
        """Remove the notes of documents."""
        self._many("DELETE FROM notes WHERE id = ?", [(address,) for address in addresses])

    def noted_as(self, address: str) -> str:
        """The note of a document; empty where there is none."""
        found = self._run("SELECT note FROM notes WHERE id = ?", (address,)).fetchone()
        return str(found[0]) if found is not None else ""

    def noted(self) -> dict[str, int]:
        """How many documents have which note."""
        return dict(self._run("SELECT note, count(*) FROM notes GROUP BY note").fetchall())

    def notes(self, most: int) -> Iterator[list[Note]]:
        """The notes by address, in lists of `most`; notes may be changed between two of them."""
        last = ""
        query = "SELECT * FROM notes WHERE id >= ? AND (id > ? OR ? = 0) ORDER BY id LIMIT ?"
        started = 0
        while found := self._run(query, (last, last, started, most)).fetchall():
            yield [Note(*one) for one in found]
            last, started = found[-1][0], 1

    # SQLite

    def _run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        with _room():
            return self._db.execute(statement, values)

    def _many(self, statement: str, values: Iterable[Sequence[object]]) -> None:
        with _room():
            self._db.execute("BEGIN")  # a transaction for each row takes ten times as long
            self._db.executemany(statement, values)
            self._db.execute("COMMIT")


def _standing(found: tuple[str, str, str, int, str | None, bytes, bytes, str, str]) -> Standing:
    return Standing(*found[:7], tuple(msgspec.json.decode(found[7])) if found[7] else (), found[8])


def _values(standing: Standing) -> tuple[object, ...]:
    missing = msgspec.json.encode(standing.missing).decode() if standing.missing else ""
    return (*standing[:7], missing, standing.problem)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ServerRefused(
            f"the temporary file of the comparison cannot be written ({error.sqlite_errorname})",
            "point TMPDIR to a folder with room for the tables' rows",
        ) from None
