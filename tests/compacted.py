"""Reads a compacted log and compares it with PostgreSQL's tables.

Twice: as it stands, one row for each subject whose message is not a tombstone (what a truncate left behind must have
been purged); and event by event, as a reader does that meets truncates and sweeps.
"""

from __future__ import annotations

import psycopg

from bridge.config import Config
from bridge.event import Event
from bridge.stream import subjects
from bridge.stream.reader import Message
from tests.oracle import Raw, parsed, published, same_rows
from tests.running import messages

ROWS = ("insert", "update", "read")
Name = tuple[str, str]


class Compacted:
    """The rows of every table, by subject, each with the sequence that wrote it."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[Name, int, Raw]] = {}

    def apply(self, message: Message, found: Event) -> None:
        """Take one message."""
        table, _, last = message.subject.rpartition(".")
        if found.op in ROWS:
            assert not found.unchanged, f"sequence {message.seq} leaves out columns"
            self.rows[message.subject] = ((found.schema, found.table), message.seq, parsed(found.after))
        elif found.op == "delete":
            self.rows.pop(message.subject, None)
        elif last in (subjects.TRUNCATE, subjects.END):
            below = message.seq if last == subjects.TRUNCATE else found.begin_seq or 0
            assert below
            self.rows = {s: r for s, r in self.rows.items() if not s.startswith(f"{table}.") or r[1] >= below}


async def agrees(config: Config) -> list[tuple[Message, Event]]:
    """Asserts that the log holds one message a subject, and PostgreSQL's rows; the messages."""
    found = await messages(config)
    assert len({message.subject for message, _ in found}) == len(found)
    sequences = [message.seq for message, _ in found]
    assert sequences == sorted(sequences)
    replayed = Compacted()
    for message, one in found:
        replayed.apply(message, one)
    standing = {
        message.subject: ((one.schema, one.table), message.seq, parsed(one.after))
        for message, one in found
        if one.op in ROWS
    }
    assert standing == replayed.rows, f"{len(standing.keys() - replayed.rows.keys())} rows are left behind"
    async with await psycopg.AsyncConnection.connect(
        str(config.source.dsn), autocommit=True, client_encoding="utf8"
    ) as connection:
        for name in await published(connection, config.source.tables):
            rows = [row for table, _, row in standing.values() if table == name]
            await same_rows(connection, *name, rows, [])
    return found
