"""What a consumer of the log gets: single events, or whole transactions."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta

import msgspec

from bridge import event
from bridge.errors import BadRecord
from bridge.event import Event

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Item(msgspec.Struct, frozen=True, dict=True):
    """One event of the log and its place in it.

    seq: the stream's sequence; it goes back where a power failure took the stream's end (see `Log`).
    position: the event's identity, the same whenever PostgreSQL sends the change again; as text it sorts in the log's
        order. What makes a consumer idempotent.
    epoch: counts the bridges that have written the log; (epoch, seq) only ever goes up.
    op, subject: as in `event`, and where it was published.
    last: whether it ends its transaction.
    data: the whole event as JSON, also that of a large row.
    stored: when the stream stored it, in nanoseconds since 1970.
    turn: how often the reader had gone back when it gave this item.
    """

    seq: int
    position: str
    epoch: int
    op: str
    subject: str
    last: bool
    data: bytes
    stored: int
    turn: int = 0

    @property
    def at(self) -> datetime:
        """When the stream stored it, in UTC."""
        return _EPOCH + timedelta(microseconds=self.stored // 1000)

    @functools.cached_property
    def event(self) -> Event:
        """The decoded event; its `key`, `before` and `after` are raw JSON, for `msgspec.json.decode`.

        Raises:
            BadRecord: it cannot be decoded, since its values are nested too deep; `data` has it.
        """
        try:
            return event.decode(self.data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRecord(
                f"the event at sequence {self.seq} cannot be decoded ({type(error).__name__})",
                "take it apart from Item.data, or go on behind it",
            ) from None

    @property
    def commit(self) -> str:
        """What all events of one transaction have in common, and no other event has: timeline and commit end."""
        return self.position[:25]


class Transaction(msgspec.Struct, frozen=True):
    """The events of one transaction that the reader's tables have, in order; or a single event from outside of any
    (`read`, `snapshot`, and what comes with them), which has no txid.

    part: 0, or which part of a transaction that is too large to be held whole.
    complete: whether this ends the transaction; only a part is not.
    """

    items: tuple[Item, ...]
    part: int = 0
    complete: bool = True

    @property
    def seq(self) -> int:
        """The sequence of its last event."""
        return self.items[-1].seq

    @property
    def epoch(self) -> int:
        """The epoch of its last event."""
        return self.items[-1].epoch

    @property
    def position(self) -> str:
        """The position of its last event."""
        return self.items[-1].position

    @property
    def turn(self) -> int:
        """As its last event's."""
        return self.items[-1].turn

    @property
    def txid(self) -> int | None:
        """PostgreSQL's transaction id."""
        return self.items[0].event.txid

    @property
    def commit_lsn(self) -> str:
        """The end of its commit record."""
        return self.items[0].event.commit_lsn

    @property
    def committed_at(self) -> str | None:
        """When it was committed, ISO 8601 in UTC."""
        return self.items[0].event.committed_at
