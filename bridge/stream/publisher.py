"""Publishing events in order, once: adaptive group commit, always fenced.

Events are added one by one, `commit` ends a transaction. A batch goes out when it is full, or by `flush` at once when
nothing more is waiting; it is cut at a transaction's end where one is in it. A batch names the sequence that the stream
must end with (`Nats-Expected-Last-Sequence`), predicted from the batches before it, so several are on their way at a
time and none can get in twice, out of order or between another writer's. What is unanswered is kept until the stream
has it. Two ways over the wire:

    batch   an atomic batch: all of it or nothing, one sync of the server for the whole
    chain   single messages that each name the one before; one answer, to the last, proves them all

Any doubt (no answer in time, an error, an empty answer) ends in `_resolve`: stop sending, read what the stream has at
the end of everything that is on its way, and go on after it, or stop because somebody else wrote. An event is only ever
sent for one sequence, so what of it is still on its way while the tail is read can get in, or what is sent again for
it, but never both.

Frames are written to the connection directly: the client library's own publish costs more than everything else that
is done for a row. A `Broker` never reconnects, so nothing is ever replayed from a buffer.

Source: ADR-50, "JetStream Batch Publishing".
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import anyio
from nats.aio.msg import Msg

from bridge import delays, event, log
from bridge.errors import EventLost, TooLarge, Unavailable
from bridge.failpoints import reach
from bridge.stream import answer
from bridge.stream import batch as wire
from bridge.stream.batch import Item
from bridge.stream.mode import Publishing
from bridge.stream.refusal import NO_REASON, remedy
from bridge.stream.server import Broker
from bridge.stream.tail import StreamChanged, Tail, read_tail, settle, tail_of

T = TypeVar("T")

BATCH_MESSAGES = 1000
BATCH_BYTES = 1 << 20
WINDOW_BATCHES = 4
EAGER_BATCHES = 2
WINDOW_BYTES = 8 << 20
ACK_TIMEOUT = 5.0
GIVE_UP_AFTER = 30.0
# Ours (op, position, epoch, version, last), the batch's and the expected sequence are 400 bytes at most.
ROOM_FOR_HEADERS = 512

# Wrong last id, wrong last sequence (twice), a batch that was already committed, no code: settled by reading the tail.
EXPECTED_DOUBTS = (10070, 10071, 10164, 10201, 0)
# So many of them in a row without progress are a refusal whose reason the server keeps to itself (a write error).
STUBBORN = 5
# A stream that is nearly full takes a little now and then: that is one refusal, not many.
QUIET = 60.0


class _Batch(NamedTuple):
    number: int
    items: list[Item]
    bytes: int
    expected: int  # the stream's last sequence before this batch


class Publisher:
    """Publishes to one stream under one epoch. Not for concurrent use by several tasks.

    replicated: the stream has replicas, which must not be asked for the id of the message before (mode.py);
    full: `room` must be awaited before more is added; acked: the stream's tail as far as it is known to hold what was
    added; acked_end: the commit end of the last transaction that it holds whole.
    """

    def __init__(self, broker: Broker, stream: str, epoch: int, tail: Tail, publishing: Publishing = "batch") -> None:
        self._broker = broker
        self._stream = stream
        self.epoch = epoch
        self.publishing = publishing
        self.replicated = False
        self.acked = tail
        self.acked_end = 0
        self._open: list[Item] = []
        self._open_bytes = 0
        self._open_cut = 0
        self._flying: deque[_Batch] = deque()
        self._flying_bytes = 0
        self._next = tail.seq
        self._number = 0
        self._id = secrets.token_urlsafe(6).encode() + b"."
        self._sent = 0
        self._linked = False
        self._changed = asyncio.Event()
        self._doubt = ""
        self.full = False
        self._wanted = False
        self._refused: object = None
        self._refusing = False
        self._quiet_until = 0.0
        self._fruitless = 0
        self._inbox = b""
        self.largest = broker.max_payload - ROOM_FOR_HEADERS
        self._log = log.get(stream=stream, epoch=epoch)
        self._tail_headers = b"\r\nBridge-Epoch: %d\r\nBridge-V: %b\r\n" % (epoch, event.FORMAT.encode())

    async def open(self) -> None:
        """Subscribe to the answers; call once before anything is added."""
        inbox = self._broker.nc.new_inbox()
        await self._broker.nc.subscribe(f"{inbox}.*", cb=self._answered)
        # What is published goes to the connection directly, past the buffer in which the subscription waits.
        await self._broker.nc.flush()
        self._inbox = inbox.encode()

    @property
    def next_seq(self) -> int:
        """The sequence that the next event will have; the fence makes the prediction exact."""
        return self._next + len(self._open) + 1

    @property
    def idle(self) -> bool:
        """Whether everything that was added is in the stream."""
        return not self._flying and not self._open

    @property
    def unanswered(self) -> bool:
        """Whether something was sent that the stream has not acked."""
        return bool(self._flying)

    def add(
        self, subject: bytes, op: bytes, position: bytes, payload: bytes, extra: bytes = b"", *, joined: bool = False
    ) -> None:
        """Take one event; whoever adds awaits `room` whenever `full` says so.

        Args:
            extra: further header lines, each with its line's end.
            joined: this event is in one atomic batch with the one before it.

        Raises:
            TooLarge: the event is larger than the server's max_payload.
        """
        size = len(payload)
        if size > self.largest:
            raise self._too_large(subject, position, size)
        while self._open and (len(self._open) >= BATCH_MESSAGES or self._open_bytes + size > BATCH_BYTES):
            if not self._cut(joined=joined):
                break
        headers = b"Bridge-Op: %b\r\nBridge-Position: %b%b%b" % (op, position, self._tail_headers, extra)
        self._open.append(Item(subject, headers, payload, position, joined))
        self._open_bytes += len(headers) + size

    def commit(self, end: int, committed_at: str = "") -> None:
        """What was added last is the last event of the transaction whose commit record ends at `end`."""
        self._open[-1].close(end, committed_at)
        self._open_cut = len(self._open)

    def divide(self) -> None:
        """What was added last is between transactions: a batch may end with it."""
        self._open_cut = len(self._open)

    def _too_large(self, subject: bytes, position: bytes, size: int) -> TooLarge:
        return TooLarge(
            f"the event at {position.decode()} on {subject.decode()} has {size:,} bytes; NATS at {self._broker.where} "
            f"takes messages of {self._broker.max_payload:,} at most",
            "raise max_payload in the NATS server's configuration and start again; nothing is lost meanwhile",
        )

    def _look(self) -> None:
        """Keep `full` true to what is on its way; it is asked for after every event."""
        self.full = bool(self._doubt) or len(self._flying) >= WINDOW_BATCHES or self._flying_bytes >= WINDOW_BYTES

    def flush(self) -> None:
        """Send the complete transactions that are open: at once, or with the next answer while enough are on their way.

        A batch costs the server a sync whatever its size: what comes meanwhile shares the next one.
        """
        self._wanted = bool(self._open_cut)
        if self._wanted and not self._doubt and len(self._flying) < EAGER_BATCHES and not self._behind_a_single():
            self._wanted = False
            self._cut()

    def _behind_a_single(self) -> bool:
        """Whether an atomic batch would go out behind a single event that is on its way: a batch can only name the
        sequence, and another writer's message in the single one's place would give it just that. On a replicated stream
        a single event names no more than that, either."""
        single = bool(self._flying) and len(self._flying[-1].items) == 1
        return single and (self._open_cut > 1 or self.replicated) and self.publishing == "batch"

    def _cut(self, *, joined: bool = False) -> bool:
        """Close the open batch at the last transaction's end in it, or where it is if it holds no end.

        joined: the event that comes next is joined to the last open one; False where they are all joined, and stay.
        """
        cut = self._open_cut or len(self._open)
        if joined and not self._open_cut:
            cut = next((n for n in range(cut - 1, 0, -1) if not self._open[n].joined), 0)
        if not cut:
            return False
        items, self._open = self._open[:cut], self._open[cut:]
        self._open_cut = 0
        self._open_bytes = sum([i.bytes for i in self._open])
        self._send(items)
        return True

    def _send(self, items: list[Item]) -> None:
        self._number += 1
        batch = _Batch(self._number, items, sum([i.bytes for i in items]), self._next)
        self._flying.append(batch)
        self._flying_bytes += batch.bytes
        self._next += len(items)
        self._look()
        if not self._doubt:
            self._write(batch)

    def _write(self, batch: _Batch) -> None:
        """Hand the frames to the connection, whole commands at a time; the transport buffers them."""
        reach("batch.closed")
        reply, items = b"%b.%d" % (self._inbox, batch.number), batch.items
        if self.publishing == "chain" or len(items) == 1:
            frames = wire.chain(items, batch.expected, wire.Link(self._id, self._sent + 1, self._linked), reply)
            self._sent += len(items)
            self._linked = not self.replicated
        else:
            frames = wire.batch(items, b"%b%d" % (self._id, batch.number), batch.expected, reply)
            self._linked = False
        self._broker.write(frames)
        reach("batch.written")

    async def _answered(self, message: Msg) -> None:
        """Take one batch's answer; anything but the expected ack of the oldest batch is a doubt."""
        number = int(message.subject.rpartition(".")[2])
        if not self._flying or number < self._flying[0].number or self._doubt:
            return
        batch = self._flying[0]
        ack = answer.ack(message.data)
        expected = batch.expected + len(batch.items)
        if number == batch.number and ack.error is None and ack.seq == expected:
            reach("batch.acked")
            self._flying.popleft()
            self._flying_bytes -= batch.bytes
            self._took(batch.items, expected)
            if self._wanted:
                self.flush()
        else:
            why = ack.error or {"description": f"answer {ack.seq} for sequence {expected}"}
            self._doubt = f"{why.get('description')} (code {why.get('err_code', 0)})"
            self._say(why.get("err_code", 0), str(why.get("description")))
        self._notify()

    def _say(self, code: object, reason: str) -> None:
        """Announce a refusal that is not about sequences (a full disk, a limit) once, until all is well again."""
        if code in EXPECTED_DOUBTS:
            if self._fruitless < STUBBORN:
                return
            code = NO_REASON
        news = code != self._refused or (not self._refusing and anyio.current_time() > self._quiet_until)
        self._refused, self._refusing, self._quiet_until = code, True, anyio.current_time() + QUIET
        if news:
            self._log.warning("publish refused", code=code, reason=reason, next=remedy(code, reason, self._stream))

    def _took(self, items: list[Item], seq: int) -> None:
        self.acked = Tail(seq, items[-1].position.decode(), self.epoch)
        self._refusing = False
        self._fruitless = 0
        for item in reversed(items):
            if item.end:
                self.acked_end = item.end
                self._count(items)
                break

    def _count(self, items: list[Item]) -> None:
        """How long the batch's first transaction took."""
        first = next(item for item in items if item.end)
        if first.committed_at:
            delays.acked.since(first.committed_at, time.time())

    async def room(self) -> None:
        """Return once there is room for more. `watch`, beside it, raises what goes wrong."""
        while self.full:
            await self._changed.wait()

    async def reached(self, seq: int) -> None:
        """Return once the stream has everything up to a sequence. `watch`, beside it, raises what goes wrong."""
        while self.acked.seq < seq:
            await self._changed.wait()

    def drop_unfinished(self) -> None:
        """Before a stop: drop the open events of a transaction whose end has not been added. The last of them might be
        its last event and would lack the mark for ever; PostgreSQL sends them again."""
        del self._open[self._open_cut :]
        self._open_bytes = sum([i.bytes for i in self._open])

    def ends(self, _subject: bytes, _begin: int, /) -> bool:
        """Whether this writer can end a complete read of a table (its subject) that began at a sequence."""
        return True

    async def drain(self) -> None:
        """Send everything that was added and return once the stream has it; `watch`, beside it, raises."""
        while not self.idle:
            if self._open and not self.full:
                self._open_cut = len(self._open)
                self._cut()
            else:
                await self._changed.wait()

    async def watch(self) -> None:
        """Settle doubts and time-outs; runs beside the one who adds, until cancelled.

        Raises:
            Unavailable: the broker did not answer for 30 s, or the connection is gone.
            Fenced, ForeignWriter: somebody else wrote to the stream.
        """
        while True:
            if self._doubt:
                await self._resolve()
                if self._wanted:
                    self.flush()
                self._notify()
            oldest = self._flying[0].number if self._flying else 0
            changed = self._changed
            with anyio.move_on_after(ACK_TIMEOUT):
                await changed.wait()
                continue
            if oldest and self._flying and self._flying[0].number == oldest:
                self._doubt = "no answer in time"
                self._say(0, self._doubt)
                self._look()

    def _notify(self) -> None:
        """Wake everybody who waits now; a fresh event for those who wait later."""
        self._look()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _resolve(self) -> None:
        """Find out what the stream has of what is on its way, and send the rest again after it."""
        self._log.debug("in doubt", why=self._doubt, unanswered=len(self._flying))
        reach("doubt.begun")
        if self._fruitless:
            # The server refused and keeps refusing: do not ask in a tight loop.
            await anyio.sleep(min(1.0, 0.05 * 2 ** min(self._fruitless, 5)))
        if self._broker.violation:
            raise self._broker.refusal()
        deadline = anyio.current_time() + GIVE_UP_AFTER
        tail = await self._asked(deadline, lambda: read_tail(self._broker, self._stream))
        reach("doubt.read")
        settle(self.acked, tail, self._unanswered(), self.epoch, self._stream)
        for batch in [b for b in self._flying if b.expected + len(b.items) < tail.seq]:
            await self._in_its_place(batch.items[-1], batch.expected + len(batch.items), deadline)
        # From here on nothing waits: whoever adds meanwhile would get in before what is sent again.
        items = self._unanswered()
        rest = settle(self.acked, tail, items, self.epoch, self._stream)
        done = items[: len(items) - len(rest)]
        if done:
            self._took(done, tail.seq)
        self.acked = tail if tail.seq else self.acked
        self._flying.clear()
        self._flying_bytes = 0
        self._next = tail.seq
        self._linked = False
        self._doubt = ""
        self._fruitless += 1
        for part in self._parts(rest):
            self._send(part)

    def _unanswered(self) -> list[Item]:
        return [item for batch in self._flying for item in batch.items]

    def _parts(self, rest: list[Item]) -> list[list[Item]]:
        """What is to be sent again, in batches; never between two that are joined.

        Where nothing got in, a chain's first message goes alone: of a whole chain only the last is answered, and that
        answer tells of the broken chain, not of the reason (a full disk, a limit).
        """
        parts: list[list[Item]] = []
        start = 1 if self.publishing == "chain" and rest and self._fruitless > 1 else 0
        if start:
            parts.append(rest[:1])
        while start < len(rest):
            end = min(start + BATCH_MESSAGES, len(rest))
            while end < len(rest) and rest[end].joined:
                end -= 1
            parts.append(rest[start:end])
            start = end
        return parts

    async def _in_its_place(self, item: Item, seq: int, deadline: float) -> None:
        """Check that a batch which something of ours follows in the stream is there itself.

        Raises:
            EventLost: something else has its place.
            StreamChanged: the rows of an earlier snapshot have it, and this one starts over.
        """
        found = await self._asked(deadline, lambda: self._broker.message(self._stream, seq=seq))
        there = tail_of(found, seq)
        # One that retention or a later event of its key has taken away cannot be looked at.
        if found is None or there.position == item.position.decode():
            return
        what = f"sequence {seq} of the stream {self._stream} holds {there.position or 'no event of a bridge'}"
        expected = f"instead of the event at {item.position.decode()}, and later events follow it"
        if not there.epoch or not event.is_between(item.position.decode()):
            raise EventLost(
                f"{what} {expected}",
                "find who published it and stop that; then make the log anew: start again for the command",
            )
        raise StreamChanged(f"{what} {expected}", "reading it again")

    async def _asked(self, deadline: float, ask: Callable[[], Awaitable[T]]) -> T:
        """The stream's answer, asked for again and again until `deadline`: one without a leader does not answer."""
        pause = 0.05
        while True:
            try:
                return await ask()
            except Unavailable:
                if self._broker.closed.is_set() or anyio.current_time() > deadline:
                    raise
            await anyio.sleep(pause)
            pause = min(pause * 2, 2.0)
