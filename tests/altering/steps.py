"""What the writer does with his table: DDL and DML in transactions, and the truth that he notes of what he commits.

He is alone, and chooses from what he finds: the same seed does the same, but for where the bridge is meanwhile.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any, NamedTuple

import psycopg

EXCLUDED = "s"
HIDDEN = "SECRET"
OTHER = "other"
NAMES = ["a", "b", "c", "d", "e"]
KEYS = ["id", "idd"]
PARTS = ["t_1", "t_2", "t_3"]
LARGE = 4000
# From here on a key is of the last partition, in which it may be changed: a row that moves is deleted and inserted.
LAST = 100

Values = dict[str, Any]
Text = Callable[[random.Random], str]


def _text(choose: random.Random) -> str:
    if choose.random() < 0.7:
        return f"v{choose.randrange(1000)}"
    return "".join(choose.choices(string.ascii_letters + string.digits, k=LARGE))


def _digit(choose: random.Random) -> str:
    return str(choose.randrange(10))


# Those whose values have one length: they are in every update.
FIXED = {"integer", "bigint", "boolean", "dom", "en"}
TYPES: dict[str, Text] = {
    "integer": lambda choose: str(choose.randrange(100)),
    "bigint": lambda choose: str(choose.randrange(10**15)),
    "text": _text,
    "numeric(9,2)": lambda choose: f"{choose.randrange(100)}.50",
    "boolean": lambda choose: choose.choice(["true", "false"]),
    "character varying(20)": _digit,
    "character varying(30)": _digit,
    "jsonb": lambda choose: f'{{"k": {choose.randrange(10)}}}',
    "integer[]": lambda choose: f"{{{choose.randrange(100)},2}}",
    "dom": _digit,
    "en": lambda choose: choose.choice("uvw"),
}

_COLUMNS = """
SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
 WHERE attrelid = 't'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_PARTED = [
    "CREATE TABLE t (id int, a int, b text, s text, PRIMARY KEY (id)) PARTITION BY RANGE (id)",
    "CREATE TABLE t_1 (junk int, b text, s text, id int NOT NULL, a int, PRIMARY KEY (id))",
    "ALTER TABLE t_1 DROP junk",
    "ALTER TABLE t ATTACH PARTITION t_1 FOR VALUES FROM (0) TO (50)",
    f"CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM (50) TO ({LAST})",
    "CREATE TABLE t_3 PARTITION OF t DEFAULT",
]


class Shape(NamedTuple):
    """The table: partitioned or not; its replica identity the whole row or the key; its column `s` excluded or not; and
    whether others take its place now and then."""

    parted: bool
    full: bool
    excluded: bool
    again: bool = False

    @property
    def hidden(self) -> set[str]:
        """The columns that must not be in the log."""
        return {EXCLUDED} if self.excluded else set()


class Catalogue(NamedTuple):
    """The table's columns at one time, by name the type as `format_type` has it; and the one that is its key."""

    columns: dict[str, str]
    key: str

    def free_to_change(self) -> list[str]:
        """The columns that are neither the key nor the one that may be excluded."""
        return [name for name in self.columns if name not in (self.key, EXCLUDED)]


class Change(NamedTuple):
    """A change that must be in the log: the row before and after, and the catalogue of its moment.

    around: every catalogue that its transaction has had, before it and after; replaced: how often the table had been
    replaced before.
    """

    op: str
    old: Values | None
    new: Values | None
    there: Catalogue
    around: list[Catalogue]
    replaced: int = 0


def made(shape: Shape) -> list[str]:
    """The statements that make the table, and what it needs."""
    return [
        "CREATE DOMAIN dom AS int",
        "CREATE TYPE en AS ENUM ('u', 'v', 'w')",
        *_table(shape),
        f"INSERT INTO t VALUES (1, 1, 'x', '{HIDDEN}'), (60, 2, 'y', '{HIDDEN}')",
    ]


def _table(shape: Shape) -> list[str]:
    plain = ["CREATE TABLE t (id int, a int, b text, s text, PRIMARY KEY (id))"]
    full = ["t", *(PARTS if shape.parted else [])] if shape.full else []
    return [*(_PARTED if shape.parted else plain), *(f"ALTER TABLE {name} REPLICA IDENTITY FULL" for name in full)]


def decoded(text: str | bytes) -> Any:
    """JSON with each number as it is written."""
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def short(text: str) -> str:
    """A text without most of its large values."""
    return re.sub(r"\w{100,}", lambda found: f"{found[0][:20]}…({len(found[0])})", text)


class Writer:
    """truth: what is committed; ever: every catalogue that was; said: every statement, for who looks into a failure;
    done: how often each was; replaced: how often another table took the name."""

    def __init__(self, shape: Shape, choose: random.Random, *, savepoints: bool) -> None:
        self.truth: list[Change] = []
        self.ever: list[Catalogue] = []
        self.said: list[str] = []
        self.done: Counter[str] = Counter()
        self.replaced = 0
        self._replacing = 0
        self._shape = shape
        self._choose = choose
        self._savepoints = savepoints
        self._number = 1000
        self._pending: list[Change] = []
        self._around: list[Catalogue] = []
        self._sql: psycopg.AsyncConnection[Any]

    @asynccontextmanager
    async def connected(self, dsn: str) -> AsyncIterator[None]:
        """Work is done within. A prepared plan would not survive DDL."""
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=None) as self._sql:
            yield

    async def catalogue(self) -> Catalogue:
        """The table as it is now."""
        columns = dict(await self._rows(_COLUMNS))
        return Catalogue(columns, next(name for name in KEYS if name in columns))

    async def work(self, transactions: int) -> None:
        """Commit so many transactions, or roll them back: some by choice, and what PostgreSQL refuses."""
        for _ in range(transactions):
            self._pending, self._around, self._replacing = [], [], self.replaced
            await self._do("BEGIN")
            try:
                await self._transaction()
            except (
                psycopg.DataError,
                psycopg.IntegrityError,
                psycopg.ProgrammingError,
                psycopg.NotSupportedError,
            ) as e:
                self.said.append(f"-- {e}")
                self.done["refused"] += 1
                await self._do("ROLLBACK")
                continue
            self._around.append(await self.catalogue())
            if self._choose.random() < 0.1:
                await self._do("ROLLBACK")
                continue
            await self._do("COMMIT")
            self.truth += self._pending
            self.replaced = self._replacing
            self.ever += self._around
            self.done["transaction"] += 1

    async def _transaction(self) -> None:
        choose = self._choose
        for _ in range(choose.choice([1, 1, 1, 1, *range(1, 7)])):
            if not self._savepoints or choose.random() < 0.5:
                await self._step(0.5)
                continue
            before = len(self._pending)
            await self._do("SAVEPOINT s")
            for _ in range(choose.randint(1, 3)):
                await self._step(0.4)
            if choose.random() < 0.3:
                del self._pending[before:]
                await self._do("ROLLBACK TO s")
            await self._do("RELEASE s")

    async def _step(self, ddl: float) -> None:
        """One statement, or the few that a swap takes, as far as the table allows it."""
        there = await self.catalogue()
        self._around.append(there)
        if self._choose.random() < ddl:
            again = {self._again: 8} if self._shape.again else {}
            ways: dict[Callable[[random.Random, Catalogue], list[str]], int] = {**_DDL, **again}
            [alter] = self._choose.choices(list(ways), list(ways.values()))
            if statements := alter(self._choose, there):
                await self._do(*statements)
                self.done["altered"] += 1
            return
        changes = {self._insert: 45, self._update: 35, self._delete: 13, self._truncate: 7}
        [change] = self._choose.choices(list(changes), list(changes.values()))
        await change(there)

    def _again(self, choose: random.Random, there: Catalogue) -> list[str]:
        """Another table has the name: a new one, or one that was filled before it came there."""
        self._replacing += 1
        if self._shape.parted or choose.random() < 0.5:
            return ["DROP TABLE t", *_table(self._shape)]
        columns = [f"{name} {type_}" for name, type_ in there.columns.items()]
        columns += ["z text"]
        choose.shuffle(columns)
        return [
            f"CREATE TABLE {OTHER} ({', '.join(columns)}, PRIMARY KEY ({there.key}))",
            f"INSERT INTO {OTHER} ({', '.join(there.columns)}) SELECT * FROM t",
            "DROP TABLE t",
            f"ALTER TABLE {OTHER} RENAME TO t",
            *(["ALTER TABLE t REPLICA IDENTITY FULL"] if self._shape.full else []),
            *(["ALTER TABLE t DROP z"] if choose.random() < 0.5 else []),
        ]

    async def _insert(self, there: Catalogue) -> None:
        self._number += 1
        key = self._choose.choice([self._number % 50, 50 + self._number % 50, self._number])
        if await self._rows(f"SELECT FROM t WHERE {there.key} = {key}"):
            return
        values = {name: self._value(type_) for name, type_ in there.columns.items()}
        values |= {there.key: f"'{key}'"} | ({EXCLUDED: f"'{HIDDEN}'"} if EXCLUDED in values else {})
        new = await self._row(f"INSERT INTO t ({', '.join(values)}) VALUES ({', '.join(values.values())})")
        self._note(Change("insert", None, new, there, self._around))

    def _value(self, type_: str) -> str:
        return f"'{TYPES[type_](self._choose)}'" if self._choose.random() < 0.8 else "NULL"

    async def _update(self, there: Catalogue) -> None:
        old, names = await self._any(there), there.free_to_change()
        if old is None or not names:
            return
        name = self._choose.choice(names)
        sets = f"{name} = '{TYPES[there.columns[name]](self._choose)}'"
        if old[there.key] >= LAST and self._choose.random() < 0.15:
            self._number += 1
            sets += f", {there.key} = {self._number}"
        new = await self._row(f"UPDATE t SET {sets} WHERE {there.key} = {old[there.key]}")
        self._note(Change("update", old, new, there, self._around))

    async def _delete(self, there: Catalogue) -> None:
        if (old := await self._any(there)) is not None:
            await self._do(f"DELETE FROM t WHERE {there.key} = {old[there.key]}")
            self._note(Change("delete", old, None, there, self._around))

    async def _truncate(self, there: Catalogue) -> None:
        part = self._shape.parted and self._choose.random() < 0.6
        await self._do(f"TRUNCATE {self._choose.choice(PARTS[:2]) if part else 't'}")
        # The log has it of the table, and of each of its partitions.
        for _ in range(1 + len(PARTS) if self._shape.parted and not part else 1):
            self._note(Change("truncate", None, None, there, self._around))

    def _note(self, change: Change) -> None:
        self._pending.append(change._replace(replaced=self._replacing))
        self.done[change.op] += 1

    async def _any(self, there: Catalogue) -> Values | None:
        rows = await self._rows(f"SELECT to_json(t)::text FROM t ORDER BY {there.key}")
        return decoded(self._choose.choice(rows)[0]) if rows else None

    async def _row(self, change: str) -> Values:
        """The row that a statement leaves."""
        self.said.append(short(change))
        [(row,)] = await self._rows(f"{change} RETURNING to_json(t)::text")
        found: Values = decoded(row)
        return found

    async def _rows(self, query: str) -> list[tuple[Any, ...]]:
        return await (await self._sql.execute(query.encode())).fetchall()

    async def _do(self, *statements: str) -> None:
        for statement in statements:
            self.said.append(short(statement))
            await self._sql.execute(statement.encode())


def _add(choose: random.Random, there: Catalogue) -> list[str]:
    free, type_ = [name for name in NAMES if name not in there.columns], choose.choice(list(TYPES))
    default = f" DEFAULT '{TYPES[type_](choose)}'" if choose.random() < 0.4 else ""
    return [f"ALTER TABLE t ADD {choose.choice(free)} {type_}{default}"] if free else []


def _drop(choose: random.Random, there: Catalogue) -> list[str]:
    names = there.free_to_change()
    return [f"ALTER TABLE t DROP {choose.choice(names)}"] if names else []


def _rename(choose: random.Random, there: Catalogue) -> list[str]:
    names, free = there.free_to_change(), [name for name in NAMES if name not in there.columns]
    return [f"ALTER TABLE t RENAME {choose.choice(names)} TO {choose.choice(free)}"] if names and free else []


def _swap(choose: random.Random, there: Catalogue) -> list[str]:
    names = there.free_to_change()
    if len(names) < 2:
        return []
    one, other = choose.sample(names, 2)
    return [f"ALTER TABLE t RENAME {a} TO {b}" for a, b in ((one, "between"), (other, one), ("between", other))]


def _retype(choose: random.Random, there: Catalogue) -> list[str]:
    names, type_ = there.free_to_change(), choose.choice(list(TYPES))
    value = TYPES[type_](choose)
    return [f"ALTER TABLE t ALTER {choose.choice(names)} TYPE {type_} USING '{value}'::{type_}"] if names else []


def _key(_: random.Random, there: Catalogue) -> list[str]:
    return [f"ALTER TABLE t RENAME {there.key} TO {next(name for name in KEYS if name != there.key)}"]


def _secret(choose: random.Random, there: Catalogue) -> list[str]:
    if EXCLUDED not in there.columns:
        return [f"ALTER TABLE t ADD {EXCLUDED} text DEFAULT '{HIDDEN}'"]
    return [f"ALTER TABLE t DROP {EXCLUDED}"] if choose.random() < 0.5 else []


_DDL = {_add: 25, _drop: 15, _rename: 15, _swap: 15, _retype: 15, _key: 7, _secret: 8}
