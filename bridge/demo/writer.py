"""The writer: small transactions of new posts, edits, deletes and key changes, until it is told to stop.

It is the only one that writes, so it knows without asking which rows there are.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import psycopg

from bridge.demo.archive import Archive, Post
from bridge.demo.board import Writes

PAUSE = 0.04
MOST_CHANGES = 8
_TAGS = ["question", "answered", "wontfix", "docs", "easy", "stale"]


class Writer:
    """`newest` is the last new post that is committed and still there: its id, and when the commit had returned."""

    def __init__(self, dsn: str, archive: Archive, writes: Writes) -> None:
        self._dsn = dsn
        self._archive = archive
        self._writes = writes
        self._random = random.Random(1)
        self._ids = [post.id for post in archive.posts if not post.digest]
        self._digests = [post.id for post in archive.posts if post.digest]
        self._next = len(archive.posts) + 1
        self._changes: list[tuple[int, Callable[[Any], Awaitable[None]]]] = [
            (45, self._post), (30, self._edit), (10, self._edit_digest), (12, self._delete), (3, self._rekey),
        ]  # fmt: skip
        self._stop = False
        self.newest: tuple[int, float] | None = None

    def stop(self) -> None:
        """End after the transaction that is under way."""
        self._stop = True

    async def run(self) -> None:
        """Write until `stop`."""
        async with await psycopg.AsyncConnection.connect(self._dsn) as connection:
            while not self._stop:
                # A transaction takes milliseconds; cut short it would be cancelled on the server, with a warning.
                with anyio.CancelScope(shield=True):
                    await self._transaction(connection)
                # The pace of a busy forum, not a wait for anything.
                await anyio.sleep(PAUSE * self._random.uniform(0.5, 1.5))

    async def _transaction(self, connection: psycopg.AsyncConnection[Any]) -> None:
        posted = self._next
        weights = [weight for weight, _ in self._changes]
        for _ in range(self._random.randint(1, MOST_CHANGES)):
            _, change = self._random.choices(self._changes, weights)[0]
            await change(connection)
        await connection.commit()
        self._writes.transactions += 1
        if self._next > posted and self._next - 1 in self._ids[-MOST_CHANGES:]:
            self.newest = self._next - 1, time.monotonic()

    async def _post(self, sql: Any) -> None:
        parent, other = self._random.choices(self._archive.posts, k=2)
        number, self._next = self._next, self._next + 1
        await sql.execute(
            "INSERT INTO messages (id, list_id, parent_id, author, subject, body, tags, source, score, posted_at)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s::jsonb, %s::numeric, clock_timestamp())",
            (
                number, parent.list_id, parent.id, other.author, f"Re: {parent.subject}", _reply(parent, other),
                parent.tags, other.source, parent.score,
            ),
        )  # fmt: skip
        await sql.execute("UPDATE lists SET posts = posts + 1 WHERE id = %s", (parent.list_id,))
        self._ids.append(number)
        self._writes.posts += 1
        self._writes.others += 1

    async def _edit(self, sql: Any) -> None:
        note = self._random.choice(self._archive.posts)
        await sql.execute(
            "UPDATE messages SET body = body || %s, tags = %s, edited_at = clock_timestamp() WHERE id = %s",
            (f"\n\nEdit: see {note.author}, {note.subject}", self._tags(), self._random.choice(self._ids)),
        )
        self._writes.edits += 1

    async def _edit_digest(self, sql: Any) -> None:
        """An edit beside a large body: PostgreSQL does not log the body, and nobody may take it for empty."""
        if not self._digests:
            return await self._edit(sql)
        await sql.execute(
            "UPDATE messages SET score = score + 0.125, pinned = NOT pinned, tags = %s WHERE id = %s",
            (self._tags(), self._random.choice(self._digests)),
        )
        self._writes.edits += 1
        self._writes.toasted += 1
        return None

    async def _delete(self, sql: Any) -> None:
        place = self._random.randrange(len(self._ids) - MOST_CHANGES)
        await sql.execute("DELETE FROM messages WHERE id = %s", (self._ids.pop(place),))
        self._writes.deletes += 1

    async def _rekey(self, sql: Any) -> None:
        """A row gets another key: the old document must go, the new one must have everything."""
        ids = self._digests if self._digests and self._random.random() < 0.3 else self._ids
        place = self._random.randrange(max(1, len(ids) - MOST_CHANGES))
        number, self._next = self._next, self._next + 1
        await sql.execute("UPDATE messages SET id = %s WHERE id = %s", (number, ids[place]))
        ids[place] = number
        self._writes.keys += 1

    def _tags(self) -> list[str]:
        return self._random.sample(_TAGS, self._random.randint(0, 3))


def _reply(parent: Post, other: Post) -> str:
    quoted = "\n".join(f"> {line}" for line in parent.body.splitlines()[:3])
    return f"{quoted}\n\n{other.body[:800]}"
