"""A compacted log: one message a subject, so that the stream is bounded by the live rows. Kafka calls it compaction.

`Compacting` is the publisher of such a stream. What a truncate, or the end of a complete read, leaves behind is purged:
the rows' messages below it. A crash in between leaves those two events, so that every start can do it again.

A deleted row's tombstone goes after `tombstone_ttl`: `Freshness` tells a reader when it may have missed one.

Source: JetStream `max_msgs_per_subject`; ADR-43, "Per-message TTL" (`Nats-TTL`); `$JS.API.STREAM.PURGE` with `filter`
and `seq` (exclusive).
"""

from __future__ import annotations

from collections import deque
from contextlib import aclosing
from typing import NamedTuple

from bridge import event, log
from bridge.failpoints import reach
from bridge.stream import subjects
from bridge.stream.keyed import spread
from bridge.stream.publisher import Publisher
from bridge.stream.reader import read
from bridge.stream.server import Broker
from bridge.stream.tail import Tail
from bridge.structured import group

PURGE_SECONDS = 60.0
WITHOUT_KEY = (b"truncate", b"snapshot")
BEGIN = f".{subjects.BEGIN}".encode()


class Purge(NamedTuple):
    """What is to be purged once the stream ends at `at` or later: messages on `subjects` below `below`."""

    at: int
    subjects: str
    below: int


class Compacting(Publisher):
    """Publishes each event on its row's subject.

    Args:
        tombstone_ttl: seconds after which a deleted row's last message goes.
    """

    def __init__(self, broker: Broker, stream: str, epoch: int, tail: Tail, *, tombstone_ttl: float) -> None:
        super().__init__(broker, stream, epoch, tail)
        self._ttl = b"Nats-TTL: %d\r\n" % max(1, round(tombstone_ttl))
        self._began: dict[bytes, int] = {}
        self._due: deque[Purge] = deque()

    async def open(self) -> None:
        """Subscribe to the answers, and purge what an earlier bridge could not."""
        await super().open()
        for due in await unfinished(self._broker, self._stream):
            await purge(self._broker, self._stream, due)

    def add(
        self, subject: bytes, op: bytes, position: bytes, payload: bytes, extra: bytes = b"", *, joined: bool = False
    ) -> None:
        """Take one event of a table, as the log would have it; it may become two messages.

        Raises:
            NotCompactable: it does not tell the whole row. TooLarge: as the publisher of a log.
        """
        found = spread(subject, position, payload, self._began.get(subject, 0))
        if op in WITHOUT_KEY:
            seq = self.next_seq
            if found[0].subject.endswith(BEGIN):
                self._began[subject] = seq
            due = leftover(found[0].subject.decode(), seq, self._began.get(subject, 0))
            if due is not None:
                self._due.append(due)
        for one in found:
            more = extra + self._ttl if one.tombstone else extra
            super().add(one.subject, one.op, one.position, one.payload, more, joined=joined)
            joined = True

    def ends(self, subject: bytes, begin: int, /) -> bool:
        """Only one that it has begun, too: rows from before that are purged then, and a reader takes the begin that an
        end names for the same writer's."""
        return self._began.get(subject) == begin

    async def watch(self) -> None:
        """Settle doubts, and purge, until cancelled; raises what `Publisher.watch` does."""
        async with group() as tasks:
            tasks.start_soon(super().watch)
            tasks.start_soon(self._purges)

    async def _purges(self) -> None:
        while True:
            changed = self._changed
            while self._due and self._due[0].at <= self.acked.seq:
                reach("purge.due")
                await purge(self._broker, self._stream, self._due[0])
                reach("purge.done")
                self._due.popleft()
                self._notify()
            await changed.wait()

    def drop_unfinished(self) -> None:
        """As for a log; what a dropped truncate would have purged stays."""
        super().drop_unfinished()
        self._due = deque(due for due in self._due if due.at < self.next_seq)

    async def drain(self) -> None:
        """Send everything that was added; return once the stream has it and what it leaves behind is purged."""
        await super().drain()
        while self._due:
            await self._changed.wait()


def leftover(subject: str, seq: int, began: int) -> Purge | None:
    """What is to go once a message on `subject` is in the stream at `seq`; `began`: what an `@end` ends."""
    table, _, last = subject.rpartition(".")
    if last == subjects.TRUNCATE:
        return Purge(seq, f"{table}.>", seq)
    if last == subjects.END and began:
        return Purge(seq, f"{table}.>", began)
    return None


async def unfinished(broker: Broker, stream: str) -> list[Purge]:
    """Everything that may have to be purged still: purging it again harms nothing."""
    state = await broker.stream(stream)
    if state is None or not state.messages:
        return []
    source = str(state.config["subjects"][0]).removesuffix(".>")
    last = [f"{source}.*.*.{subjects.TRUNCATE}", f"{source}.*.*.*.{subjects.TRUNCATE}", f"{source}.*.*.{subjects.END}"]
    found = []
    async with aclosing(read(broker, stream, subjects=last)) as batches:
        async for batch in batches:
            for message in batch:
                due = leftover(message.subject, message.seq, event.decode(message.data).begin_seq or 0)
                if due is not None:
                    found.append(due)
    return found


async def purge(broker: Broker, stream: str, due: Purge) -> None:
    """Remove the messages of rows that a truncate or a complete read has shown to be gone."""
    body = {"filter": due.subjects, "seq": due.below}
    answer = await broker.api(f"STREAM.PURGE.{stream}", body, seconds=PURGE_SECONDS)
    if answer["purged"]:
        log.get().info("rows purged", stream=stream, subjects=due.subjects, below=due.below, count=answer["purged"])


async def is_complete(broker: Broker, stream: str, table: str) -> bool:
    """Whether a table (its subject) has been read completely or truncated: the stream has all its rows since then."""
    for last in (subjects.END, subjects.TRUNCATE):
        if await broker.message(stream, last_by_subj=f"{table}.{last}") is not None:
            return True
    return False
