"""Reading the stream: in order, without a gap that nobody notices.

`read` is for those who come and go (`replay`, comparisons): an ephemeral consumer that is made again behind the last
message seen whenever the server lost it or a delivery is missing.

`Durable` is for search indexes: a named consumer whose acks (one covers all before it) say what need not come again.
After a start or a reconnect, and after a jump in the consumer's delivery sequence (somebody else pulled), the consumer
is set back to what is known to be done; what then comes a second time is dropped here. It stops where retention has
overtaken the reader, and goes back where a newer writer has written over sequences that were read already: an ack that
was not yet on disk can be taken back by a power failure.

A broken connection raises `Unavailable`; the caller goes on over a new `Broker` from where it was.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import msgspec

from bridge import log
from bridge.errors import BridgeError, IndexMismatch, ServerRefused
from bridge.stream.pull import ConsumerGone, Message, Pull, parse, pulling, send
from bridge.stream.server import NOT_FOUND_CONSUMER, NOT_FOUND_STREAM, ApiError, Broker, StreamState
from bridge.stream.state import Writer

__all__ = ["ConsumerGone", "Durable", "Message", "Seen", "read"]

ACK_WAIT = 1800.0
WINDOW = 65_536
EPHEMERAL_IDLE = 300.0
RESET_SERVER = (2, 14)


class Seen(msgspec.Struct, frozen=True):
    """How far a reader has come: everything up to sequence `seq`, the last of it written under `epoch`."""

    epoch: int = 0
    seq: int = 0
    position: str = ""


async def read(
    broker: Broker,
    stream: str,
    *,
    subjects: list[str],
    start: int | datetime | None = None,
    follow: bool = False,
    last: int | None = None,
) -> AsyncGenerator[list[Message], None]:
    """Batches of the stream's messages on `subjects`, in order.

    Args:
        start: the first sequence, or a time, or None for the stream's beginning.
        follow: go on for ever; else end with what the stream holds now.
        last: end at this sequence instead.

    Raises:
        ServerRefused: there is no such stream.
        Unavailable: the connection is lost; read on from the last message seen.
    """
    state = await existing(broker, stream)
    until = None if follow else min(last if last is not None else state.last_seq, state.last_seq)
    if until is not None and (until == 0 or (isinstance(start, int) and start > until)):
        return
    while True:
        name = f"read-{broker.nc.new_inbox()[-12:]}"
        made = await create_consumer(broker, stream, name, _ephemeral(name, subjects, start))
        try:
            if until is not None and made["num_pending"] == 0:
                return
            async with pulling(broker, stream, name) as pull:
                expected = 1
                with contextlib.suppress(ConsumerGone):
                    while True:
                        batch, expected, whole = _in_order(await pull.next(), expected)
                        kept = [m for m in batch if until is None or m.seq <= until]
                        if kept:
                            start = kept[-1].seq + 1
                            yield kept
                        if until is not None and await _ended(broker, stream, name, batch, until, expected):
                            return
                        if not whole:
                            break
        finally:
            with anyio.CancelScope(shield=True), contextlib.suppress(BridgeError):
                await broker.api(f"CONSUMER.DELETE.{stream}.{name}", seconds=1)


def _in_order(deliveries: list[Any], expected: int) -> tuple[list[Message], int, bool]:
    """The messages up to the first missing delivery, the next delivery's number, and whether none is missing."""
    batch: list[Message] = []
    for delivery in deliveries:
        message = parse(delivery)
        if message.delivery != expected:
            return batch, expected, False
        expected += 1
        batch.append(message)
    return batch, expected, True


async def _ended(broker: Broker, stream: str, name: str, batch: list[Message], until: int, expected: int) -> bool:
    """Whether nothing up to `until` is left; retention may have taken what the last message still announced."""
    if batch:
        return batch[-1].seq >= until or batch[-1].pending == 0
    try:
        info = await broker.api(f"CONSUMER.INFO.{stream}.{name}")
    except ApiError as error:
        if error.code == NOT_FOUND_CONSUMER:
            return False
        raise
    return bool(info["num_pending"] == 0 and info["delivered"]["consumer_seq"] < expected)


def _ephemeral(name: str, subjects: list[str], start: int | datetime | None) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "name": name,
        "ack_policy": "none",
        "inactive_threshold": int(EPHEMERAL_IDLE * 1e9),
        "mem_storage": True,
        "num_replicas": 1,
        "filter_subjects": subjects,
        "deliver_policy": "all",
    }
    if isinstance(start, datetime):
        at = start.astimezone(UTC).isoformat().replace("+00:00", "Z")
        wanted |= {"deliver_policy": "by_start_time", "opt_start_time": at}
    elif start is not None and start > 1:
        wanted |= {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
    return wanted


async def existing(broker: Broker, stream: str) -> StreamState:
    """The stream's state; ServerRefused where there is no such stream."""
    state = await broker.stream(stream)
    if state is None:
        raise ServerRefused(f"there is no stream {stream} at {broker.where}", "start the bridge first: it makes it")
    return state


async def create_consumer(broker: Broker, stream: str, name: str, config: dict[str, Any]) -> Any:
    """Make a consumer; its info."""
    body = {"stream_name": stream, "config": config, "action": "create"}
    return await broker.api(f"CONSUMER.CREATE.{stream}.{name}", body, seconds=10)


async def delete_consumer(broker: Broker, stream: str, name: str) -> None:
    """Remove a consumer; nothing happens where there is none."""
    try:
        await broker.api(f"CONSUMER.DELETE.{stream}.{name}", seconds=10)
    except ApiError as error:
        if error.code not in (NOT_FOUND_CONSUMER, NOT_FOUND_STREAM):
            raise


class Durable:
    """A durable consumer, read and acked by one process.

    Args:
        first: where this consumer begins; it is never set back below it.
        epochs: asks for the list of writers, to see which sequences were written anew.
    """

    def __init__(
        self,
        broker: Broker,
        stream: str,
        name: str,
        subjects: list[str],
        *,
        first: int,
        epochs: Callable[[], Awaitable[list[Writer]]],
    ) -> None:
        self._broker = broker
        self._stream = stream
        self._name = name
        self._subjects = subjects
        self._first = max(first, 1)
        self._epochs = epochs
        self._unacked: deque[tuple[int, str]] = deque()
        self._expected = 1
        self._pull: Pull | None = None
        self._back: Seen | None = None
        self.seen = Seen()
        self.pending = 0

    @property
    def waiting(self) -> bool:
        """Whether messages have arrived that `batches` has not given yet."""
        return self._pull is not None and self._pull.waiting

    async def open(self, done: Seen) -> None:
        """Make the consumer if it is not there and set it back to what is done: `done`, or less where it knows less.

        Raises:
            IndexMismatch: retention has removed messages that were not read yet.
        """
        self.seen = done
        state = await existing(self._broker, self._stream)
        self._overtaken(state)
        floor = done.seq
        try:
            info = await self._broker.api(f"CONSUMER.INFO.{self._stream}.{self._name}")
            floor = min(floor, info["ack_floor"]["stream_seq"])
            exists = True
        except ApiError as error:
            if error.code != NOT_FOUND_CONSUMER:
                raise
            exists = False
        back = self._rewritten(await self._epochs()) or done
        self.seen = Seen(back.epoch, max(min(back.seq, floor), self._first - 1), done.position)
        await self._set(exists=exists)

    def _rewritten(self, writers: list[Writer]) -> Seen | None:
        """Where to go back to because newer writers wrote seen sequences anew; None where nothing was.

        The epoch there is the newest that can stand at that sequence, so that nobody goes back for it twice.
        """
        newer = [w.first_seq for w in writers if w.epoch > self.seen.epoch and w.first_seq <= self.seen.seq]
        if not newer or self.seen.seq < self._first:
            return None
        first = max(min(newer), self._first)
        epoch = max(w.epoch for w in writers if w.first_seq <= first)
        log.get().warning("going back", consumer=self._name, seq=first, why="a newer writer wrote it anew")
        return Seen(epoch, first - 1, self.seen.position)

    async def _set(self, *, exists: bool = True) -> None:
        """The next delivery is the first message behind `seen`."""
        target = self.seen.seq + 1
        if exists and self._broker.version >= RESET_SERVER:
            try:
                await self._broker.api(f"CONSUMER.RESET.{self._stream}.{self._name}", {"seq": target})
            except ApiError as error:
                log.get().debug("consumer made again", consumer=self._name, why=error.description)
                await self._make(target, exists=True)
        else:
            await self._make(target, exists=exists)
        self.pending = (await self._info())["num_pending"]
        self._unacked.clear()
        self._expected = 1
        self._back = None

    async def _make(self, target: int, *, exists: bool) -> None:
        if exists:
            await delete_consumer(self._broker, self._stream, self._name)
        config = {
            "name": self._name,
            "durable_name": self._name,
            "ack_policy": "all",
            "ack_wait": int(ACK_WAIT * 1e9),
            "max_ack_pending": WINDOW,
            "deliver_policy": "by_start_sequence",
            # Made at its own beginning and then moved, so that a later reset may go back that far.
            "opt_start_seq": self._first if self._broker.version >= RESET_SERVER else target,
            "filter_subjects": self._subjects,
        }
        await create_consumer(self._broker, self._stream, self._name, config)
        if self._broker.version >= RESET_SERVER and target > self._first:
            await self._broker.api(f"CONSUMER.RESET.{self._stream}.{self._name}", {"seq": target})

    def _overtaken(self, state: StreamState) -> None:
        if state.compacted:
            return  # its beginning goes because later messages took its place; see compact.Freshness
        if state.messages and state.first_seq > self.seen.seq + 1 and state.first_seq > self._first:
            raise IndexMismatch(
                f"retention has overtaken the consumer {self._name}: the stream {self._stream} begins at sequence "
                f"{state.first_seq}, read is only up to {self.seen.seq}",
                "build the index anew with `bridge reindex`, and give the stream more room (max_age, max_bytes)",
            )

    async def batches(self) -> AsyncGenerator[list[Message], None]:
        """Messages in order, each once unless the consumer had to be set back; an empty list while there are none."""
        while True:
            async with pulling(self._broker, self._stream, self._name) as pull:
                self._pull = pull
                while self._back is None:
                    batch, self._expected, whole = _in_order(await pull.next(), self._expected)
                    yield await self._accepted(batch)
                    if not whole and self._back is None:
                        log.get().warning("delivery jumped", consumer=self._name, after=self.seen.seq)
                        self._back = self.seen
            self.seen = self._back
            await self._set()

    async def _accepted(self, batch: list[Message]) -> list[Message]:
        """What is new in a batch: a message that the server sent once more is only counted.

        Before the first message of a newer writer counts as seen, the list of writers tells whether that one also wrote
        over sequences behind us; then nothing more is accepted until `batches` has gone back.
        """
        fresh: list[Message] = []
        for message in batch:
            self.pending = message.pending
            if message.epoch > self.seen.epoch:
                self._back = self._rewritten(await self._epochs())
                if self._back is not None:
                    return fresh
            elif message.seq <= self.seen.seq:
                continue
            # What a killed predecessor sent may come in behind its successor's first messages: it must not look older.
            message.epoch = max(message.epoch, self.seen.epoch)
            self.seen = Seen(message.epoch, message.seq, message.position)
            self._unacked.append((message.seq, message.reply))
            fresh.append(message)
        return fresh

    async def ack(self, seq: int) -> None:
        """Everything up to `seq` is done and need not come again."""
        reply = ""
        while self._unacked and self._unacked[0][0] <= seq:
            reply = self._unacked.popleft()[1]
        if reply:
            await send(self._broker, reply)

    async def progress(self) -> None:
        """Tell the server that what is not acked is still being worked on."""
        for _, reply in list(self._unacked):
            await send(self._broker, reply, b"+WPI")

    async def look(self) -> Seen | None:
        """Compare with the stream; where nothing is left to read, how far the stream was read with that.

        Called about once a second. Where a newer writer wrote seen sequences anew, `batches` goes back to them.

        Raises:
            IndexMismatch: retention has overtaken this reader.
        """
        writers = await self._epochs()
        before = self.seen
        self._back = self._back or self._rewritten(writers)
        if self._back is not None:
            return None
        state = await existing(self._broker, self._stream)
        info = await self._info()
        if self.seen != before or self.waiting:
            return None
        if (
            info["num_pending"] == 0
            and info["num_ack_pending"] == 0
            and self._expected > info["delivered"]["consumer_seq"]
        ):
            self.pending = 0
            epoch = max((w.epoch for w in writers if w.first_seq <= state.last_seq), default=0)
            if state.last_seq > before.seq:
                self.seen = Seen(max(epoch, before.epoch), state.last_seq, before.position)
            return self.seen
        self._overtaken(state)
        return None

    async def _info(self) -> Any:
        try:
            return await self._broker.api(f"CONSUMER.INFO.{self._stream}.{self._name}")
        except ApiError as error:
            if error.code == NOT_FOUND_CONSUMER:
                raise ConsumerGone(f"the consumer {self._name} is not there", "making it again") from None
            raise
