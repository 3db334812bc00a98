"""What the bridge remembers, in one JetStream KV bucket: checkpoints, snapshots, tables, writers, index generations.

Values are JSON, readable with `nats kv get`. Whoever changes a value names the revision that it read (compare-and-set).
A bucket whose servers elect a leader is asked again for some seconds; a write of ours whose answer was lost meanwhile
is no conflict.

Source: ADR-8 (a key's messages, and the headers of one that is removed).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal, TypeVar

import anyio
import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KeyValue

from bridge import structured
from bridge.errors import Unavailable
from bridge.event import Column as Column
from bridge.stream import answer, refusal
from bridge.stream.server import PATIENCE, Broker
from bridge.waiting import patiently

T = TypeVar("T")

HISTORY = 8
TRY = 2.0
LOOKS = 32
REMOVED = {"KV-Operation", "Nats-Marker-Reason"}
_ERRORS = (nats.errors.Error, nats.js.errors.APIError, TimeoutError)


class Conflict(Unavailable):
    """Somebody else changed the value since it was read; who does not know better reads it again and starts over."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the state of {key} changed meanwhile", "reading it again")


class Full(Unavailable):
    """JetStream has no room for the value: it is kept for later, and whoever can go on without it does."""


class Pair(msgspec.Struct, frozen=True):
    """Everything that PostgreSQL committed up to `lsn` is in the stream at or before `stream_seq`."""

    lsn: str
    stream_seq: int


class Missed(msgspec.Struct, frozen=True):
    """Changes of a table that PostgreSQL has not logged: so many, the last of them before the sequence `seq`."""

    changes: int
    seq: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """`checkpoint.<source>`: what is durable in the stream, and what it was written from.

    `epoch` is its writer's; phase is "snapshot" until the initial snapshot is in the stream; `lsn` is the position up
    to which everything is done: the commit end of the last event, or later where nothing of ours was in between.
    Where an ack can be taken back by a power failure, `confirmed` is what PostgreSQL was told last, and `held` what it
    will be told once that long has passed, oldest first: one of them explains its position however the stream is cut.
    `lost` says which event the stream does not have although it has later ones, until a person has decided. `missed`
    are the changes that PostgreSQL has not logged, by table. `altered` are the last transactions that may have altered
    tables, by their 32 bits, with where their commit records end: the catalogue may be ahead of the log.
    """

    phase: Literal["snapshot", "stream"]
    lsn: str
    position: str
    stream: str
    stream_seq: int
    stream_created: str
    system_id: str
    timeline: int
    database: str
    slot: str
    consistent_point: str
    snapshot_seq: int
    epoch: int = 0
    confirmed: Pair | None = None
    held: list[Pair] = []
    lost: str = ""
    missed: dict[str, Missed] = {}
    altered: dict[int, str] = {}
    at: str


class Writer(msgspec.Struct, frozen=True):
    """One start of a bridge: what it publishes carries `epoch`, from sequence `first_seq` on."""

    epoch: int
    first_seq: int


class Again(msgspec.Struct, frozen=True, kw_only=True):
    """A table is to be read, or is being read, while the stream flows.

    state: "waiting" for what `why` says; "paused" and "failed" until somebody asks again.
    asked: when somebody asked for it, which tells one wish from the next; empty where the bridge itself did.
    part: the oid of the table or partition that is being read; parts: of those that have been; after: the key (its
    columns are `key`), as PostgreSQL's text, of the last row that is in the stream; moved: the keys, as JSON, of rows
    to be read last; last: whether nothing but those is left; seq: up to this sequence of the stream that is all; shape:
    stands for the columns that the table has; where: a condition for a part of the rows; rate in rows a second, eta in
    seconds.
    """

    state: Literal["requested", "running", "waiting", "paused", "failed"]
    asked: str = ""
    why: str = ""
    where: str = ""
    part: int = 0
    parts: list[int] = []
    key: list[str] = []
    after: list[str] = []
    moved: list[str] = []
    last: bool = False
    shape: str = ""
    rows: int = 0
    estimate: int = 0
    rate: float = 0.0
    eta: float | None = None
    first_seq: int = 0
    seq: int = 0
    started_at: str = ""
    at: str = ""

    @property
    def under_way(self) -> bool:
        """Whether the table is being read, or will be: neither paused nor failed."""
        return self.state in ("requested", "running", "waiting")


class SnapshotStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`snapshot.<source>.<schema>.<table>`: how far a table's snapshot is; `complete_from` is its begin marker.

    "incomplete", as `error` says: rows from before the table was published are not in the log; or, where there is a
    `complete_from`, all are, but DDL has changed some since. `again`: it is read once more. `lsn`: the consistent point
    of the slot with which it is, or was, read; rate in rows a second, eta in seconds.
    """

    state: Literal["waiting", "running", "done", "incomplete", "failed"]
    mode: Literal["initial", "incremental"] = "initial"
    rows: int = 0
    estimate: int = 0
    rate: float = 0.0
    eta: float | None = None
    lsn: str = ""
    first_seq: int = 0
    last_seq: int = 0
    complete_from: int = 0
    started_at: str = ""
    finished_at: str = ""
    error: str = ""
    again: Again | None = None


class TableShape(msgspec.Struct, frozen=True):
    """A table's columns and key at one time; `since` is the position of the `schema` event that says so, where the log
    has one."""

    columns: list[Column]
    key: list[str]
    since: str = ""


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """The numbers of a table's columns, by the names that they have in the log from the position `since` on; `oid` is
    the table's, of partitions their root's."""

    since: str
    oid: int
    columns: dict[str, int]


class TableRecord(msgspec.Struct, frozen=True):
    """`table.<source>.<schema>.<table>`: today's shape and the ones before it, oldest first; `hidden` holds what was
    ever excluded of it, `since` of columns that came later the position of the first change that showed them.

    places: of each table that holds rows, by its oid, the numbers of the columns that must not be missed under another
    name. logged: the shapes that the log has had, oldest first, from the first change of shape on; empty while that is
    the recorded one. layouts: which columns the log has had by their numbers, oldest first, the last few. The catalogue
    may be ahead of the log, and `columns` with it.
    """

    columns: list[Column]
    key: list[str]
    history: list[TableShape] = []
    hidden: list[str] = []
    since: dict[str, str] = {}
    logged: list[TableShape] = []
    places: dict[str, dict[str, int]] = {}
    layouts: list[Layout] = []

    @property
    def plain(self) -> list[Column]:
        """The columns with the types that their values are of: a domain's are those of the type that it is of."""
        return [msgspec.structs.replace(column, type=column.base or column.type) for column in self.columns]

    @property
    def former(self) -> set[str]:
        """The columns that it had once and has no more."""
        past = {column.name for shape in self.history for column in shape.columns}
        return past - {column.name for column in self.columns}


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A column of a `Shape`: its place in the table, which it keeps under any name; its type by oid and name."""

    place: int
    name: str
    oid: int
    type: str


class Leaf(msgspec.Struct, frozen=True, array_like=True):
    """A table that holds rows: `name` (schema.table) is that in the log where it is a partition; `file` its
    relfilenode, `link` stands for how it became a partition, `key` are the columns that identify a row."""

    oid: int
    name: str
    file: int
    link: str
    key: list[str]


class Turned(msgspec.Struct, frozen=True, array_like=True):
    """What the log has had otherwise than a `Shape` since that was kept, for the last time at the position `at`.

    columns: those that were not there by their names and types; keys: the tables that hold rows, by oid, of which a row
    had another key; came: those that rows had and the shape has not, by place (0 where that is not known) and name.
    """

    at: str
    columns: list[str]
    keys: list[int]
    came: list[tuple[int, str]] = []


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """`shape.<source>.<schema>.<table>`: what a table was when the log had its rows as they were.

    Where it is another one than the catalogue's, rows may have changed without a change in PostgreSQL's log. named: the
    transaction that named it; former: columns that it had once; gone: there is no such table any more; turned: what the
    log has had otherwise since, be it so again by now.
    """

    oid: int
    named: int
    owner: int
    columns: list[Place]
    leaves: list[Leaf]
    former: list[str] = []
    gone: bool = False
    turned: Turned | None = None


class State:
    """The bucket. Every method raises Unavailable where NATS does not answer."""

    def __init__(self, bucket: KeyValue, name: str, broker: Broker) -> None:
        self._bucket = bucket
        self._name = name
        self._broker = broker

    @classmethod
    async def open(cls, broker: Broker, name: str, replicas: int = 1) -> State:
        """The bucket, made if it is not there."""
        js = broker.nc.jetstream(timeout=TRY)
        try:
            if await broker.stream(f"KV_{name}") is None:
                await js.create_key_value(
                    KeyValueConfig(bucket=name, history=HISTORY, storage=StorageType.FILE, replicas=replicas)
                )
            return cls(await js.key_value(name), name, broker)
        except _ERRORS as error:
            raise Unavailable(f"the KV bucket {name} does not answer ({type(error).__name__})", "waiting") from None

    @contextlib.contextmanager
    def _asking(self, key: str) -> Any:
        try:
            yield
        except nats.js.errors.KeyWrongLastSequenceError:
            raise Conflict(key) from None
        except nats.js.errors.APIError as error:
            if error.err_code == 10071:
                raise Conflict(key) from None
            if error.err_code in refusal.FULL:
                reason = error.description or ""
                what = f"JetStream takes no more into the KV bucket {self._name}: {reason}"
                raise Full(what, refusal.remedy(error.err_code, reason, f"KV_{self._name}")) from None
            raise Unavailable(f"KV key {self._name}/{key}: {error.description}", "waiting") from None
        except _ERRORS as error:
            if self._broker.violation:
                raise self._broker.refusal() from None
            raise Unavailable(f"KV key {self._name}/{key} ({type(error).__name__})", "waiting") from None

    async def _again(self, key: str, action: Callable[[], Awaitable[T]]) -> T:
        async def ask() -> T:
            with self._asking(key):
                return await action()

        return await patiently(
            ask,
            seconds=PATIENCE,
            hopeless=lambda error: isinstance(error, (Conflict, Full)) or self._broker.closed.is_set(),
        )

    async def get(self, key: str, kind: type[T]) -> tuple[T, int] | None:
        """The value and its revision; None where there is none. BadState: something else is there."""
        found = await self._entry(key)
        return None if found is None else (answer.value(found[0], kind, self._where(key)), found[1])

    async def _entry(self, key: str) -> tuple[bytes, int] | None:
        async def ask() -> tuple[bytes, int] | None:
            try:
                entry = await self._bucket.get(key)
            except nats.js.errors.KeyNotFoundError:
                return None
            return entry.value or b"", entry.revision or 0

        return await self._again(key, ask)

    async def put(self, key: str, value: Any, revision: int | None = None) -> int:
        """Store a value: at `revision` (0: only where there is none), or whatever is there (None); the new revision.

        Raises:
            Conflict: somebody else changed it.
        """
        data = msgspec.json.format(msgspec.json.encode(value), indent=0)
        tries = 0

        async def write() -> int:
            nonlocal tries
            tries += 1
            if revision is None:
                return await self._bucket.put(key, data)
            if revision == 0:
                return await self._bucket.create(key, data)
            return await self._bucket.update(key, data, last=revision)

        try:
            return await self._again(key, write)
        except Conflict:
            found = await self._entry(key) if tries > 1 else None
            if found is None or found[0] != data:
                raise
            return found[1]

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Remove a value, whatever it is or only at `revision`; nothing happens where there is none. Whether there
        was one.

        Raises:
            Conflict: somebody else changed it.
        """

        async def remove() -> None:
            with contextlib.suppress(nats.js.errors.KeyNotFoundError):
                await self._bucket.delete(key, last=revision)

        if revision is None and await self._entry(key) is None:
            return False
        await self._again(key, remove)
        return True

    async def keys(self, prefix: str) -> list[str]:
        """The keys that start with `prefix`, which is empty or ends with a dot.

        The leader's own list: that of the client's KeyValue goes by a consumer's count, and is empty at times.
        """
        return sorted(await self._last(prefix))

    async def values(self, prefix: str, kind: type[T]) -> dict[str, T]:
        """The keys that start with `prefix`, as `keys` has them, with their values."""
        return {k: answer.value(data, kind, self._where(k)) for k, data in (await self._last(prefix)).items()}

    async def _last(self, prefix: str) -> dict[str, bytes]:
        listed = await self._broker.subjects(f"KV_{self._name}", f"{self._subject(prefix)}>")
        found: dict[str, bytes] = {}
        limit = anyio.Semaphore(LOOKS)

        async def look(key: str) -> None:
            async with limit:
                last = await self._broker.message(f"KV_{self._name}", last_by_subj=self._subject(key))
            if last is not None and not REMOVED & last.headers.keys():
                found[key] = last.data

        async with structured.group() as group:
            for subject in listed:
                group.start_soon(look, subject.removeprefix(self._subject("")))
        return found

    def _where(self, key: str) -> str:
        return f"the KV key {self._name}/{key}"

    def _subject(self, key: str) -> str:
        return f"$KV.{self._name}.{key}"

    async def changes(self, prefix: str, kind: type[T]) -> AsyncIterator[tuple[str, T | None]]:
        """The keys that start with `prefix`, which ends with a dot, and their values: now, and whenever one changes.
        None where it was removed."""
        with self._asking(prefix):
            watcher: Any = await self._bucket.watch(f"{prefix}>")
        try:
            while True:
                with self._asking(prefix):
                    entry = await watcher.updates(timeout=None)
                if entry is not None:
                    removed = bool(entry.operation)
                    yield entry.key, None if removed else answer.value(entry.value or b"", kind, self._where(entry.key))
        finally:
            with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
                await watcher.stop()
