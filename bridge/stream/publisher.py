"""Publishing events in order, once: adaptive group commit, always fenced.

Events are added one by one, `commit` ends a transaction. A batch goes out when it is full, or by `flush` at once when
nothing more is waiting; it is cut at a transaction's end where one is in it. A batch names the sequence that the stream
must end with (`Nats-Expected-Last-Sequence`), predicted from the batches before it, so several are on their way at a
time and none can get in twice, out of order or between another writer's. What is unanswered is kept until the stream
has it. Two ways over the wire:

    batch   an atomic batch: all of it or nothing, one sync of the server for the whole
    chain   single messages that each name the sequence before their own; one answer, to the last, proves them all

Any doubt (no answer in time, an error, an empty answer) ends in `_resolve`: stop sending, read the stream's last
message and go on after it, or stop because somebody else wrote. An event is only ever sent for one sequence, so what
of it is still on its way while the tail is read can get in, or what is sent again for it, but never both.

What a killed predecessor had on its way may get in late, and after a snapshot that started over it is something else.
A chain would not notice: its first message is refused, its second follows the late one as well as it would have
followed the first, and the answer to the last is as expected. So a session begins with batches, each answered by
itself, until it is past every sequence that a predecessor can have sent for (`LATE`).

Frames are written to the connection directly: the client library's own publish costs more than everything else that
is done for a row. A `Broker` never reconnects, so nothing is ever replayed from a buffer.

Source: ADR-50, "JetStream Batch Publishing".
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from typing import NamedTuple

import anyio
import msgspec
from nats.aio.msg import Msg

from bridge import event, log
from bridge.errors import Fenced, ForeignWriter, ServerRefused, TooLarge, Unavailable
from bridge.failpoints import reach
from bridge.stream import batch as wire
from bridge.stream.batch import Item
from bridge.stream.mode import Publishing
from bridge.stream.server import Broker, Stored

BATCH_MESSAGES = 1000
BATCH_BYTES = 1 << 20
WINDOW_BATCHES = 4
EAGER_BATCHES = 2
WINDOW_BYTES = 8 << 20
LATE = (WINDOW_BATCHES + 1) * BATCH_MESSAGES
ACK_TIMEOUT = 5.0
GIVE_UP_AFTER = 30.0
# Ours (op, position, epoch, version, last), the batch's and the expected sequence are 400 bytes at most.
ROOM_FOR_HEADERS = 512

# Wrong last sequence (twice), a batch that was already committed, no code at all: settled by reading the tail.
EXPECTED_DOUBTS = (10071, 10164, 10201, 0)


class Tail(NamedTuple):
    """The stream's end: the last sequence given out, and what its last message says (empty and 0 where there is none).

    at: the last message's own sequence, where it is not `seq`: the messages after it were removed.
    """

    seq: int
    position: str
    epoch: int
    at: int | None = None


class _Ack(msgspec.Struct):
    seq: int = 0
    error: dict[str, object] | None = None


class _Batch(NamedTuple):
    number: int
    items: list[Item]
    bytes: int
    expected: int  # the stream's last sequence before this batch


class Publisher:
    """Publishes to one stream under one epoch. Not for concurrent use by several tasks.

    full: `room` must be awaited before more is added; acked: the stream's tail as far as it is known to hold what was
    added; acked_end: the commit end of the last transaction that it holds whole.
    """

    def __init__(self, broker: Broker, stream: str, epoch: int, tail: Tail, publishing: Publishing = "batch") -> None:
        self._broker = broker
        self._stream = stream
        self.epoch = epoch
        self.publishing = publishing
        self.acked = tail
        self.acked_end = 0
        self._open: list[Item] = []
        self._open_bytes = 0
        self._open_cut = 0
        self._flying: deque[_Batch] = deque()
        self._flying_bytes = 0
        self._next = tail.seq
        self._chain_from = tail.seq + LATE
        self._number = 0
        self._id = secrets.token_hex(6).encode()
        self._changed = asyncio.Event()
        self._doubt = ""
        self.full = False
        self._wanted = False
        self._refused: object = None
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
        found = wire.item(subject, headers, payload, position, joined=joined)
        self._open.append(found)
        self._open_bytes += found.head + size

    def commit(self, end: int) -> None:
        """What was added last is the last event of the transaction whose commit record ends at `end`."""
        self._open[-1].close(end)
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
        if self._wanted and not self._doubt and len(self._flying) < EAGER_BATCHES:
            self._wanted = False
            self._cut()

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
        batch = _Batch(self._number, items, sum([i.head + i.size for i in items]), self._next)
        self._flying.append(batch)
        self._flying_bytes += batch.bytes
        self._next += len(items)
        self._look()
        if not self._doubt:
            self._write(batch)

    def _write(self, batch: _Batch) -> None:
        """Hand the frames to the connection, whole commands at a time; the transport buffers them."""
        reach("batch.closed")
        reply = b"%b.%d" % (self._inbox, batch.number)
        if self.publishing == "chain" and batch.expected >= self._chain_from:
            frames = wire.chain(batch.items, batch.expected, reply)
        else:
            frames = wire.batch(batch.items, b"%b.%d" % (self._id, batch.number), batch.expected, reply)
        self._broker.write(frames)
        reach("batch.written")

    async def _answered(self, message: Msg) -> None:
        """Take one batch's answer; anything but the expected ack of the oldest batch is a doubt."""
        number = int(message.subject.rpartition(".")[2])
        if not self._flying or number < self._flying[0].number or self._doubt:
            return
        batch = self._flying[0]
        try:
            ack = msgspec.json.decode(message.data, type=_Ack) if message.data else _Ack()
        except msgspec.DecodeError:
            ack = _Ack()
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
        """Announce a refusal that is not about sequences (a full disk, a limit) once, until something gets in again."""
        if code not in EXPECTED_DOUBTS and code != self._refused:
            self._refused = code
            self._log.warning("publish refused", code=code, reason=reason, next="trying again until it is accepted")

    def _took(self, items: list[Item], seq: int) -> None:
        self.acked = Tail(seq, items[-1].position.decode(), self.epoch)
        self._refused = None
        self._fruitless = 0
        for item in reversed(items):
            if item.end:
                self.acked_end = item.end
                break

    async def room(self) -> None:
        """Return once there is room for more. `watch`, beside it, raises what goes wrong."""
        while self.full:
            await self._changed.wait()

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
        tail = await self._tail(anyio.current_time() + GIVE_UP_AFTER)
        reach("doubt.read")
        # From here on nothing waits: whoever adds meanwhile would get in before what is sent again.
        items = [item for batch in self._flying for item in batch.items]
        rest = settle(self.acked, tail, items, self.epoch, self._stream)
        done = items[: len(items) - len(rest)]
        if done:
            self._took(done, tail.seq)
        self.acked = tail if tail.seq else self.acked
        self._flying.clear()
        self._flying_bytes = 0
        self._next = tail.seq
        self._doubt = ""
        self._fruitless += 1
        for part in self._parts(rest):
            self._send(part)

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

    async def _tail(self, deadline: float) -> Tail:
        """The stream's end, asked for again and again until `deadline`: a stream without a leader does not answer."""
        pause = 0.05
        while True:
            try:
                return await read_tail(self._broker, self._stream)
            except Unavailable:
                if self._broker.closed.is_set() or anyio.current_time() > deadline:
                    raise
            await anyio.sleep(pause)
            pause = min(pause * 2, 2.0)


def settle(acked: Tail, tail: Tail, items: list[Item], epoch: int, stream: str) -> list[Item]:
    """The items that the stream, ending at `tail`, does not have yet; it had `acked` and was sent `items` after it.

    Raises:
        Fenced: a newer epoch wrote there. ForeignWriter: something without an epoch did.
        StreamChanged: the stream is shorter than what was acked, or a predecessor's last messages came in late.
    """
    if tail.epoch > epoch:
        raise Fenced(
            f"a newer bridge (epoch {tail.epoch}) writes to the stream {stream}; this one has epoch {epoch}",
            "this one has stopped; run only one bridge per source",
        )
    if tail.seq == acked.seq:
        return items
    if tail.seq > acked.seq and not tail.position:
        raise ForeignWriter(
            f"something that is no bridge published to {stream} at sequence {tail.seq}",
            "find and stop it (`nats stream get`), and let only the bridge publish to the stream's subjects",
        )
    if tail.seq < acked.seq:
        raise StreamChanged(
            f"the stream {stream} ends at sequence {tail.seq}, the broker had acked {acked.seq}",
            "continuing from what is left",
        )
    position = tail.position.encode()
    rest = [item for item in items if item.position > position]
    if len(items) - len(rest) != tail.seq - acked.seq:
        # What a killed bridge, or this one's last connection, had sent was still on its way when the tail was read.
        raise StreamChanged(
            f"the stream {stream} ends at sequence {tail.seq} with position {tail.position}, which does not continue "
            f"sequence {acked.seq}",
            "reading its end again",
        )
    return rest


class StreamChanged(Unavailable):
    """The stream's end is not what this session started from: recover as at a start, from what is there now."""


async def read_tail(broker: Broker, stream: str) -> Tail:
    """The stream's end now: the last sequence that was given out, and what the last message that is there says.

    Raises:
        Unavailable: no answer.
        ServerRefused: there is no such stream any more.
    """
    state = await broker.stream(stream)
    if state is None:
        raise ServerRefused(f"the stream {stream} is gone", "see `bridge drop --state`, then start anew")
    if state.last_seq == 0:
        return Tail(0, "", 0)
    found = await broker.message(stream, seq=state.last_seq)
    if found is None:
        # By the stream's own subjects: for a bare ">" the server finds nothing once the last message was removed.
        found = await broker.message(stream, last_by_subj=state.config["subjects"][0])
    return tail_of(found, state.last_seq)._replace(at=found.seq if found is not None else 0)


def tail_of(message: Stored | None, seq: int) -> Tail:
    """The tail that the last message stands for; without position and epoch if it was not written by a bridge."""
    if message is None:
        return Tail(seq, "", 0)
    epoch = message.headers.get(event.HEADER_EPOCH, "")
    position = message.headers.get(event.HEADER_POSITION, "")
    if not epoch.isdigit():
        return Tail(seq, "", 0)
    return Tail(seq, position, int(epoch))
