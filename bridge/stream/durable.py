"""Reading the stream for as long as one wants: a consumer that goes on where its reader was, whatever breaks.

`Durable` is for those who stay (search indexes, the public `events`): a named consumer whose acks (one covers all
before it) say what need not come again, or one without name and acks that goes with its reader. After a start or a
reconnect, and after a jump in the consumer's delivery sequence (somebody else pulled, or set it), the consumer is set
back to what is known to be done; what then comes a second time is dropped here. It stops where retention has overtaken
the reader, and goes back where a newer writer has written over sequences that were read already: an ack that was not
yet on disk can be taken back by a power failure.

A broken connection raises `Unavailable`; the caller goes on over a new `Broker` from where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

from bridge import log
from bridge.errors import StreamHole
from bridge.stream.intake import Message
from bridge.stream.pull import ConsumerGone, Pull, pulling, send
from bridge.stream.reader import FLEETING, create_consumer, delete_consumer, existing, in_order, overtaken
from bridge.stream.server import NOT_FOUND_CONSUMER, ApiError, Broker, StreamState
from bridge.stream.state import Writer

ACK_WAIT = 1800.0
WINDOW = 65_536
RESET_SERVER = (2, 14)
LIMITS = ("max_age", "max_bytes", "max_msgs")
NEAR = 100_000
FRESH = 2.0
LOST_AFTER = 3.0


class Seen(msgspec.Struct, frozen=True):
    """How far a reader has come: everything up to sequence `seq`, the last of it written under `epoch`."""

    epoch: int = 0
    seq: int = 0
    position: str = ""


async def _as_it_is(batch: list[Message]) -> AsyncGenerator[list[Message], None]:
    yield batch


class Durable:
    """A consumer, read and acked by one process.

    Args:
        first: where this consumer begins; it is never set back below it.
        epochs: asks for the list of writers, to see which sequences were written anew.
        parts: gives a batch in parts, each when its turn comes (`claims.whole`).
        named: whether the server keeps it, with its acks, when its reader is gone.
        exact: whether `first` itself must still be in the stream, or whatever is the first event by then will do.
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
        parts: Callable[[list[Message]], AsyncGenerator[list[Message], None]] = _as_it_is,
        named: bool = True,
        exact: bool = True,
    ) -> None:
        self._broker = broker
        self._stream = stream
        self._name = name
        self._subjects = subjects
        self._first = max(first, 1)
        self._epochs = epochs
        self._parts = parts
        self._named = named
        self._exact = exact
        self._held = False
        self._first_seq, self._asked = 0, 0.0
        self._cleared = 0
        self._whole = self._limited = False
        self._unacked: deque[tuple[int, str]] = deque()
        self._expected = 1
        self._pull: Pull | None = None
        self._back: Seen | None = None
        self._late: tuple[int, float] | None = None
        self.seen = Seen()
        self.pending = 0

    @property
    def waiting(self) -> bool:
        """Whether messages have arrived that `batches` has not given yet."""
        return self._held or (self._pull is not None and self._pull.waiting)

    async def open(self, done: Seen) -> None:
        """Make the consumer if it is not there and set it back to what is done: `done`, or less where it knows less.

        Raises:
            Overtaken: retention has removed messages that were not read yet.
        """
        self.seen = done
        self._cleared = done.seq
        self._overtaken(await self._state())
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
        self._cleared = 0
        log.get().warning("going back", consumer=self._name, seq=first, why="a newer writer wrote it anew")
        return Seen(epoch, first - 1, self.seen.position)

    async def _set(self, *, exists: bool = True) -> None:
        """The next delivery is the first message behind `seen`."""
        target = self.seen.seq + 1
        if exists and self._broker.version >= RESET_SERVER:
            try:
                await self._broker.api(f"CONSUMER.RESET.{self._stream}.{self._name}", {"seq": target})
            except ApiError as error:
                if error.code == NOT_FOUND_CONSUMER:
                    raise self._gone() from None
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
            "deliver_policy": "by_start_sequence",
            # Made at its own beginning and then moved, so that a later reset may go back that far.
            "opt_start_seq": self._first if self._broker.version >= RESET_SERVER else target,
            "filter_subjects": self._subjects,
        }
        config |= self._kept() if self._named else FLEETING
        await create_consumer(self._broker, self._stream, self._name, config)
        if self._broker.version >= RESET_SERVER and target > self._first:
            await self._broker.api(f"CONSUMER.RESET.{self._stream}.{self._name}", {"seq": target})

    def _kept(self) -> dict[str, Any]:
        return {
            "durable_name": self._name,
            "ack_policy": "all",
            "ack_wait": int(ACK_WAIT * 1e9),
            "max_ack_pending": WINDOW,
        }

    async def _state(self) -> StreamState:
        """The stream's state, and what is to be remembered of it."""
        state = await existing(self._broker, self._stream)
        self._asked = time.monotonic()
        self._first_seq = state.first_seq
        self._whole = state.config.get("subjects") == self._subjects and not state.compacted
        self._limited = self._whole or any(state.config.get(limit, 0) > 0 for limit in LIMITS)
        return state

    @property
    def _loose(self) -> bool:
        return not self._exact and self.seen.seq < self._first

    def _overtaken(self, state: StreamState) -> None:
        if self._loose:
            return
        seen = max(self.seen.seq, self._cleared)
        if state.messages and state.first_seq > seen + 1 and state.first_seq > self._first and not state.compacted:
            raise overtaken(self._stream, state.first_seq, seen)

    async def _passed(self, seq: int) -> None:
        """Before a message is accepted that is not the next one: whether those in between were only others' subjects.

        A reader of the whole stream misses no sequence; of a few subjects, it is asked for while the stream's beginning
        is near. The consumer itself says nothing when retention takes messages from under it.
        """
        if self._loose:
            return
        near = self.seen.seq - self._first_seq < NEAR or time.monotonic() - self._asked > FRESH
        if self._whole or (self._limited and near):
            self._overtaken(await self._state())
        if self._whole:
            raise StreamHole(
                f"the stream {self._stream} has nothing between the sequences {self.seen.seq:,} and {seq:,}",
                "a block of its file store is damaged, or messages were deleted by hand; read on behind the hole, and "
                "build anew what was made of the events before it",
            )

    def again(self, done: Seen) -> None:
        """Give everything behind `done` again, to whoever asks for `batches` next: the last one who did was cut off."""
        self._back = done
        self._held = False

    async def batches(self) -> AsyncGenerator[list[Message], None]:
        """Messages in order, each once unless the consumer had to be set back; an empty list while there are none."""
        while True:
            async with pulling(self._broker, self._stream, self._name) as pull:
                self._pull = pull
                while self._back is None:
                    batch, self._expected, whole = await self._ordered(await pull.next())
                    fresh = await self._accepted(batch)
                    self._held = True
                    async with contextlib.aclosing(self._parts(fresh)) as parts:
                        async for part in parts:
                            fresh = fresh[len(part) :]
                            self._held = bool(fresh)
                            yield part
                    self._held = False
                    if not whole and self._back is None:
                        log.get().warning("delivery jumped", consumer=self._name, after=self.seen.seq)
                        self._back = self.seen
            self.seen = self._back
            await self._set()

    async def _ordered(self, batch: list[Message]) -> tuple[list[Message], int, bool]:
        """As `in_order`; the first delivery after the consumer was set is compared with the stream: somebody else may
        have set it, too, and its numbers begin anew then."""
        if self._expected == 1 and batch and batch[0].seq > self.seen.seq + 1 and await self._skipped(batch[0].seq):
            return [], 1, False
        return in_order(batch, self._expected)

    async def _skipped(self, seq: int) -> bool:
        """Whether the stream has something for us between what was seen and a sequence."""
        for subject in self._subjects:
            found = await self._broker.message(self._stream, next_by_subj=subject, seq=self.seen.seq + 1)
            if found is not None and found.seq < seq:
                return True
        return False

    def _lost(self, delivered: int) -> bool:
        """Whether messages went to somebody else: delivered by the consumer's count, not come for some seconds, and
        none behind them shows it."""
        now = time.monotonic()
        if delivered < self._expected:
            self._late = None
        elif self._late is None or self._late[0] != self._expected:
            self._late = (self._expected, now)
        return self._late is not None and now - self._late[1] > LOST_AFTER

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
            if message.seq > self.seen.seq + 1:
                await self._passed(message.seq)
            # What a killed predecessor sent may come in behind its successor's first messages: it must not look older.
            message.epoch = max(message.epoch, self.seen.epoch)
            self.seen = Seen(message.epoch, message.seq, message.position)
            if self._named:
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
            Overtaken: retention has overtaken this reader.
        """
        writers = await self._epochs()
        before = self.seen
        self._back = self._back or self._rewritten(writers)
        if self._back is not None:
            return None
        state = await self._state()
        info = await self._info()
        if self.seen != before or self.waiting:
            self._late = None
            return None
        if self._lost(info["delivered"]["consumer_seq"]):
            log.get().warning("delivery jumped", consumer=self._name, after=self.seen.seq)
            self._back, self._late = self.seen, None
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
                raise self._gone() from None
            raise

    def _gone(self) -> ConsumerGone:
        return ConsumerGone(f"the consumer {self._name} is not there", "making it again")
