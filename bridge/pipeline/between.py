"""Events between transactions: the rows and markers of tables that are read while their changes stream.

They take their places where no transaction is under way, in small pieces, so that what streams waits for none of them
for long. Such an event's position is the end of what the stream has passed, then the highest LSN, then `sub`, which
counts on: after all of that, before whatever comes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import anyio
import anyio.lowlevel

from bridge import event
from bridge.event import Position
from bridge.pipeline.announce import Announcing
from bridge.pipeline.merge import Delivered, Merge
from bridge.source import lsn
from bridge.source.rows import Plan
from bridge.stream.claims import Claims
from bridge.stream.publisher import Publisher

PIECE = 200
PIECE_EVERY = 0.005
LAST_LSN = (1 << 64) - 1


class Piece:
    """What waits to be published on one subject, once the stream has passed `high`: a marker, or a chunk's rows.

    plan: what its events are written by, where they have columns.
    first, last: the sequences of its first and last event, 0 before it has any; done: whether it is all with the
    publisher.
    """

    def __init__(
        self,
        subject: bytes,
        high: int,
        op: bytes,
        payload: bytes = b"",
        merge: Merge | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.plan = plan
        self.subject = subject
        self.high = high
        self.op = op
        self.first = self.last = 0
        self.done = anyio.Event()
        self._payload = payload
        self._merge = merge

    def take(self, count: int) -> tuple[list[bytes], bool]:
        """The next events, and whether they are the last ones."""
        if self._merge is None:
            return [self._payload], True
        taken = self._merge.take(count)
        return taken, not self._merge.left


class Between:
    """What is put between transactions, and what has to be known of them for it.

    merges: the tables that are being read, by the subject of their events; turn: held by whoever gives the publisher
    events; delivered: what the stream has brought and snapshots may not show yet; queue: what waits, looked at with
    every message.

    Args:
        timeline: the timeline of an LSN.
        after: the position of the stream's last event.
    """

    def __init__(
        self,
        publisher: Publisher,
        claims: Claims,
        timeline: Callable[[int], int],
        after: str,
        announcing: Announcing,
    ) -> None:
        self._announcing = announcing
        self._publisher = publisher
        self._claims = claims
        self._timeline = timeline
        last = Position.parse(after) if after else Position(0, 0, 0, 0, 0)
        self._place, self._sub = last._replace(sub=0), last.sub
        self.queue: deque[Piece] = deque()
        self._due = 0.0
        self.merges: dict[bytes, Merge] = {}
        self.delivered = Delivered()
        self.turn = anyio.Lock(fast_acquire=True)

    def add(self, piece: Piece) -> None:
        """Queue what is to be published; pieces keep their order."""
        self.queue.append(piece)

    def drop(self, piece: Piece) -> None:
        """Forget what is not to be published any more."""
        if piece in self.queue:
            self.queue.remove(piece)

    @property
    def due(self) -> bool:
        """Whether it is time to publish some of what is queued."""
        return time.monotonic() >= self._due

    async def some(self, reached: int) -> bool:
        """Publish a little, between two transactions, by who holds `turn`; whether there was anything to publish.

        Args:
            reached: everything up to this LSN is with the publisher.
        """
        piece = next((piece for piece in self.queue if piece.high <= reached), None)
        if piece is None:
            return False
        payloads, last = piece.take(PIECE)
        if payloads:
            await self._publish(piece, payloads, reached)
            self._publisher.divide()
            self._publisher.flush()
        if last:
            self.queue.remove(piece)
            piece.done.set()
        self._due = time.monotonic() + PIECE_EVERY
        # What was flushed goes out now, and what streams gets into the line for the next turn.
        await anyio.lowlevel.checkpoint()
        return True

    async def _publish(self, piece: Piece, payloads: list[bytes], reached: int) -> None:
        publisher, prefix = self._publisher, self._at(reached)
        if piece.plan is not None and not piece.first:
            await self._altered(piece, piece.plan, prefix, reached)
        piece.first = piece.first or publisher.next_seq
        for payload in payloads:
            await self._add(piece.subject, piece.op, prefix, payload)
        piece.last = publisher.next_seq - 1

    async def _altered(self, piece: Piece, plan: Plan, prefix: bytes, reached: int) -> None:
        """Say before a piece that its table has other columns than the log's events had so far, where it has."""
        at, point = f"{prefix.decode()}{self._sub + 1:08x}", lsn.show(reached)
        payload = await self._announcing.due(plan, at, point.encode(), event.transaction(point, None, None))
        if payload:
            await self._add(piece.subject, b"schema", prefix, payload)
            # What the stream goes on with may have the columns of before, or those.
            self._announcing.forget(plan.relation.root)

    async def _add(self, subject: bytes, op: bytes, prefix: bytes, payload: bytes) -> None:
        publisher = self._publisher
        self._sub += 1
        position = b"%b%08x" % (prefix, self._sub)
        if len(payload) > self._claims.largest:
            payload = await self._claims.put(subject, position.decode(), payload)
        publisher.add(subject, op, position, payload)
        if publisher.full:
            await publisher.room()

    def _at(self, reached: int) -> bytes:
        """What the positions of events behind that LSN begin with; `_sub` goes on where there were some."""
        place = Position(self._timeline(reached), reached, LAST_LSN, 0, 0)
        if place != self._place:
            self._place, self._sub = place, 0
        return str(place)[:-8].encode()
