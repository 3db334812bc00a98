"""A table's columns come, go and change names while nobody reads its changes: what the log says of each change is what
was true when it was made, whatever the catalogue says by then."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer
from bridge.stream.state import TableRecord
from bridge.stream.subjects import table_key
from tests.oracle import agrees
from tests.running import MARK, Process, bridge, execute, messages, settled, source, state_of, toml

pytestmark = pytest.mark.anyio

LAYOUT = {"id": "integer", "body": "character varying(20)", "a": "text", "b": "text"}
COLUMNS = "id int PRIMARY KEY, body varchar(20), a text, b text"
PLAIN = [f"CREATE TABLE t ({COLUMNS})"]
PARTED = [
    f"CREATE TABLE t ({COLUMNS}) PARTITION BY RANGE (id)",
    "CREATE TABLE part_of_t (b text, gone int, a text, body varchar(20), id int PRIMARY KEY)",
    "ALTER TABLE part_of_t DROP gone", "ALTER TABLE t ATTACH PARTITION part_of_t FOR VALUES FROM (0) TO (9)",
]  # fmt: skip
TOUCH = "UPDATE t SET body = 'touched'"
BACK = "ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME x TO b"

# Between any two of these a row is touched, but not after those with "!": a name that no change shows before it is gone
# was never in the log. "+c" adds a column c whose large values stand out of line, "c" fills it.
SCENARIOS: dict[str, list[str]] = {
    "one goes, one comes": ["DROP a", "+c", "c"],
    "one comes, one goes": ["+c", "c", "DROP a", "c"],
    "two go": ["DROP a", "DROP b"],
    "renamed": ["RENAME a TO z", "b", "RENAME b TO y"],
    "renamed, then dropped": ["!RENAME a TO z", "z", "DROP z", "+c", "c"],
    "renamed, and the name taken": ["!RENAME a TO z", "z", "!+a", "UPDATE t SET b = NULL", "a", "DROP z"],
    "renamed, and the name kept": ["RENAME a TO z", "+a", "a", "z"],
    "dropped and made again": ["DROP a", "+a", "a"],
    "names swapped": [BACK, "UPDATE t SET a = 'small'"],
    "names swapped and back": [BACK, "UPDATE t SET a = 'small'", BACK],
    "come and gone": ["+c", "c", "DROP c", "+d", "d"],
    "come, renamed and gone": ["+c", "c", "!RENAME c TO d", "d", "DROP d", "+e"],
    "two come, one goes": ["+c", "+d", "c", "d", "DROP c", "d"],
    "a longer one": ["ALTER body TYPE varchar(40)", "DROP a", "+c"],
    "another type": ["ALTER a TYPE varchar", "DROP b", "+c"],
    "come, left alone and gone": ["+c", "!c", "DROP c"],
    "the key renamed for a time": ["!RENAME id TO i", "b", "RENAME i TO id"],
    "the key renamed": ["RENAME id TO i", "DROP a", "RENAME i TO id"],
}

COLUMNS_NOW = (
    "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute"
    " WHERE attrelid = 't'::regclass AND attnum > 0 AND NOT attisdropped"
)

# A savepoint's transaction has an id that the log does not name: who looks at the catalogue meanwhile knows it.
RUNNING = {"in a savepoint": ["SAVE DROP a", "SAVE RENAME b TO z", "+c", "c", "SAVE DROP c"]}


class Told(NamedTuple):
    """A change: its columns with their types, and those of them that it left alone where they are out of line."""

    op: str
    columns: dict[str, str]
    unchanged: set[str]


def statement(step: str) -> str:
    if step[0] == "+":
        return f"ALTER TABLE t ADD {step[1:]} text; ALTER TABLE part_of_t ALTER {step[1:]} SET STORAGE EXTERNAL"
    if step.startswith("SAVE "):
        return f"BEGIN; SAVEPOINT s; ALTER TABLE t {step.removeprefix('SAVE ')}; RELEASE s; COMMIT"
    if step.islower():
        return f"UPDATE t SET {step} = repeat('{step}', 3000)"
    return step if step.startswith(("ALTER TABLE", "UPDATE")) else f"ALTER TABLE t {step}"


def steps(scenario: list[str]) -> list[str]:
    found = [TOUCH]
    for step in scenario:
        found += [statement(step.lstrip("!")), *([] if step.startswith("!") else [TOUCH])]
    return [*found, TOUCH]


class Story:
    """One table's steps, and what the log has to tell of them."""

    def __init__(self, sql: psycopg.AsyncConnection[Any], table: str, scenario: list[str], parted: bool) -> None:
        self._sql = sql
        self._table = table
        self._part = f"part_of_{table}" if parted else table
        self._rekeyed = any("RENAME id" in step for step in scenario)
        self.made = PARTED if parted else PLAIN
        self.left = steps(scenario)
        self.true: list[Told] = []

    async def do(self, *statements: str) -> None:
        for text in statements:
            await self._rows(text.replace("part_of_t", self._part))

    async def _rows(self, text: str) -> list[tuple[Any, ...]]:
        cursor = await self._sql.execute(re.sub(r"\bt\b", self._table, text).encode())
        return await cursor.fetchall() if cursor.description else []

    async def begin(self) -> None:
        await self.do(*self.made, *(f"ALTER TABLE part_of_t ALTER {name} SET STORAGE EXTERNAL" for name in "ab"))
        await self.do("INSERT INTO t VALUES (1, 'first', repeat('a', 3000), repeat('b', 3000))")

    async def next(self) -> None:
        """Does a step; of an update, what is there just before it is what has to be told."""
        step = self.left.pop(0)
        if step.startswith("UPDATE"):
            columns: dict[str, str] = dict(await self._rows(COLUMNS_NOW))
            rest = [name for name in columns if name != step.split()[3]]
            large = f"SELECT {', '.join(f'coalesce(length({name}::text) > 2000, false)' for name in rest)} FROM t"
            found = await self._rows(large)
            self.true.append(Told("update", columns, {n for n, out in zip(rest, found[0], strict=True) if out}))
        await self.do(step)

    async def write(self) -> None:
        """Gives every column a new value."""
        names = [name for name, _ in await self._rows(COLUMNS_NOW)]
        if self._rekeyed:
            await self.do("TRUNCATE t", f"INSERT INTO t ({', '.join(names)}) VALUES ({', '.join('7' for _ in names)})")
        await self.do(f"UPDATE t SET {', '.join(f'{name} = 8' for name in names)}")

    async def told(self, config: Config) -> list[Told]:
        """What the log tells of each update, by the columns that were announced last."""
        found, columns = [], LAYOUT
        for _, event in await messages(config):
            if event.table == self._table and event.op == "schema":
                columns = {column.name: column.type for column in event.columns}
            elif event.table == self._table and event.op == "update":
                assert set(msgspec.json.decode(event.after)) | set(event.unchanged) == set(columns)
                found.append(Told("update", columns, set(event.unchanged)))
        return found


async def each(stories: Iterable[Story]) -> bool:
    """Does a step of each story that has one left; whether one had."""
    left = [story for story in stories if story.left]
    for story in left:
        await story.next()
    return bool(left)


@pytest.mark.parametrize(
    ("how", "parted"),
    [("running", False), ("stopped", False), ("stopped", True), ("now and then", False), ("killed", True)],
)
async def test_what_is_told_of_a_change_is_what_was_true_when_it_was_made(
    pg_db: str, nats: NatsServer, tmp_path: Path, how: str, parted: bool
) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn", tables=["public.t?*", "public.mark"])
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True, client_encoding="utf8") as sql:
        scenarios = SCENARIOS | (RUNNING if how == "running" else {})
        names = {scenario: f"t{number}" for number, scenario in enumerate(scenarios)}
        stories = {scenario: Story(sql, name, scenarios[scenario], parted) for scenario, name in names.items()}
        await execute(pg_db, MARK)
        for story in stories.values():
            await story.begin()
        async with bridge(config):
            await settled(config)
            while how == "running" and await each(stories.values()):
                await settled(config)
        turn = 0
        while await each(stories.values()):
            turn += 1
            if how == "now and then" and turn % 3 == 0:
                async with bridge(config):
                    await settled(config)
        process = Process(tmp_path, toml(config))
        for point in ("schema.recorded:kill:4", "schema.recorded:kill:20"):
            if how == "killed":
                process.start(failpoint=point)
                assert await process.wait() == -signal.SIGKILL
        async with bridge(config):
            await settled(config)
            for scenario, story in stories.items():
                assert await story.told(config) == story.true, scenario
            # The log has rows under former names of columns: all of them are written once more.
            for story in stories.values():
                await story.write()
            await settled(config)
    await agrees(config, rewritten=names.values())


LARGE = "repeat('{}', 3000)"
FULL_OF_LARGE: dict[str, tuple[list[str], list[Told]]] = {
    "come and gone": (
        [
            "ALTER TABLE t ADD c text", f"UPDATE t SET c = {LARGE.format('c')}", "UPDATE t SET n = 2",
            "ALTER TABLE t DROP c",
        ],
        [Told("update", {"id": "integer", "n": "integer", "b": "text", "c": "text"}, set())] * 2,
    ),
    "renamed and gone": (
        ["ALTER TABLE t RENAME b TO c", "UPDATE t SET n = 2", "ALTER TABLE t DROP c"],
        [Told("update", {"id": "integer", "n": "integer", "c": "text"}, set())],
    ),
    "with the key renamed": (
        ["ALTER TABLE t RENAME id TO i", "ALTER TABLE t RENAME b TO c", "UPDATE t SET n = 2", "ALTER TABLE t DROP c"],
        [Told("update", {"i": "integer", "n": "integer", "c": "text"}, set())],
    ),
    "gone within the transaction": (
        ["BEGIN; UPDATE t SET n = 2; ALTER TABLE t DROP b; UPDATE t SET n = 3; COMMIT"],
        [
            Told("update", {"id": "integer", "n": "integer", "b": "text"}, set()),
            Told("update", {"id": "integer", "n": "integer"}, set()),
        ],
    ),
    "gone within a savepoint": (
        ["BEGIN; SAVEPOINT s; ALTER TABLE t DROP b; UPDATE t SET n = 2; RELEASE s; COMMIT", "UPDATE t SET n = 3"],
        [Told("update", {"id": "integer", "n": "integer"}, set())] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("parted", [False, True])
async def test_an_old_row_tells_of_columns_that_the_new_one_leaves_out(
    pg_db: str, nats: NatsServer, parted: bool
) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn", tables=["public.t?*", "public.mark"])
    columns = "(id int PRIMARY KEY, n int, b text)"
    await execute(pg_db, MARK)
    for number in range(len(FULL_OF_LARGE)):
        table = f"t{number}"
        made = [f"CREATE TABLE {table} {columns}"]
        if parted:
            made = [
                f"CREATE TABLE {table} {columns} PARTITION BY RANGE (id)",
                f"CREATE TABLE part_{table} (b text, gone int, n int, id int NOT NULL)",
                f"ALTER TABLE part_{table} DROP gone", f"ALTER TABLE {table} ATTACH PARTITION part_{table} DEFAULT",
                f"ALTER TABLE part_{table} REPLICA IDENTITY FULL",
            ]  # fmt: skip
        part = f"part_{table}" if parted else table
        full = [f"ALTER TABLE {table} REPLICA IDENTITY FULL", f"ALTER TABLE {part} ALTER b SET STORAGE EXTERNAL"]
        await execute(pg_db, *made, *full, f"INSERT INTO {table} VALUES (1, 1, {LARGE.format('b')})")
    async with bridge(config):
        await settled(config)
    for number, (steps, _) in enumerate(FULL_OF_LARGE.values()):
        await execute(pg_db, *(re.sub(r"\bt\b", f"t{number}", step) for step in steps))
    async with bridge(config):
        await settled(config)
    for number, (how, (_, true)) in enumerate(FULL_OF_LARGE.items()):
        found, told = [], {"id": "integer", "n": "integer", "b": "text"}
        for _, event in await messages(config):
            if event.table == f"t{number}" and event.op == "schema":
                told = {column.name: column.type for column in event.columns}
                assert event.key_columns == (next(name for name in told if name in ("id", "i")),), how
            elif event.table == f"t{number}" and event.op == "update":
                old, new = msgspec.json.decode(event.before), msgspec.json.decode(event.after)
                assert old.keys() == new.keys() == told.keys(), how
                assert [old.get(name) for name in "bc"] == [new.get(name) for name in "bc"] or old["c"] is None, how
                found.append(Told("update", told, set(event.unchanged)))
        assert found == true, how


@pytest.mark.parametrize("running", [False, True])
async def test_a_partition_tells_of_the_whole_tables_key_as_it_was(pg_db: str, nats: NatsServer, running: bool) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn", tables=["public.t", "public.mark"])
    await execute(
        pg_db, MARK, "CREATE TABLE t (id int, n int, b text, PRIMARY KEY (id, n)) PARTITION BY RANGE (id)",
        "CREATE TABLE part_of_t (b text, n int NOT NULL, id int NOT NULL)",
        "ALTER TABLE t ATTACH PARTITION part_of_t DEFAULT", "INSERT INTO t VALUES (1, 1, 'b')",
    )  # fmt: skip
    steps = [
        "ALTER TABLE t ADD c text", "INSERT INTO t VALUES (2, 2, 'b', 'c')",
        "ALTER TABLE t RENAME id TO i", "INSERT INTO t VALUES (3, 3, 'b', 'c')",
        "ALTER TABLE t RENAME i TO id", "INSERT INTO t VALUES (4, 4, 'b', 'c')",
    ]  # fmt: skip
    async with bridge(config):
        await settled(config)
        if running:
            await execute(pg_db, *steps)
            await settled(config)
    if not running:
        await execute(pg_db, *steps)
        async with bridge(config):
            await settled(config)
    events = [event for _, event in await messages(config) if event.table == "t" and event.op in ("schema", "insert")]
    assert [event.op for event in events] == ["schema", "insert"] * 3
    assert [event.key_columns for event in events[::2]] == [("id", "n"), ("i", "n"), ("id", "n")]
    assert [set(msgspec.json.decode(event.key)) for event in events[1::2]] == [{"id", "n"}, {"i", "n"}, {"id", "n"}]


async def test_a_record_that_has_no_numbers_yet_gets_them(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn", tables=["public.t?*", "public.mark"])
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True, client_encoding="utf8") as sql:
        made = {"one comes": ["+c", "c"], "one goes": ["DROP a"]}
        then = {"one comes": ["DROP a", "+d"], "one goes": ["+c", "c", "DROP b"]}
        stories = [Story(sql, f"t{number}", made[name], False) for number, name in enumerate(made)]
        await execute(pg_db, MARK)
        for story in stories:
            await story.begin()
        async with bridge(config):
            await settled(config)
        async with state_of(config) as state:
            for number in range(len(stories)):
                key = table_key(config.source.name, "public", f"t{number}")
                kept = await state.get(key, TableRecord)
                assert kept is not None
                assert kept[0].layouts[0].columns == {"id": 1, "body": 2, "a": 3, "b": 4}
                await state.put(key, msgspec.structs.replace(kept[0], layouts=[]), kept[1])
        while await each(stories):
            pass
        async with bridge(config):
            await settled(config)
        # From here on columns are known by their numbers.
        done = [len(story.true) for story in stories]
        for story, more in zip(stories, then.values(), strict=True):
            story.left = steps(more)
        while await each(stories):
            pass
        async with bridge(config):
            await settled(config)
        for story, before in zip(stories, done, strict=True):
            told = await story.told(config)
            assert len(told) == len(story.true)
            assert told[before:] == story.true[before:]
    await agrees(config)
