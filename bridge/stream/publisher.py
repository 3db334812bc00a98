"""Publishing events in order, once: adaptive group commit in atomic batches, always fenced.

Events are added one by one. A batch goes out when it is full, or by `flush` at once when nothing more is waiting; it
is cut at a transaction's end where one is in it. Every batch names the sequence that the stream must end with
(`Nats-Expected-Last-Sequence`), predicted from the batches before it, so several are on their way at a time and none
can get in twice, out of order or between another writer's. What is unanswered is kept until the stream has it.

Any doubt (no answer in time, an error, an empty answer) ends in `_resolve`: stop sending, read the stream's last
message and go on after it, or stop because somebody else wrote.

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
from bridge.stream.batch import Item, frames
from bridge.stream.server import Broker, Stored

BATCH_MESSAGES = 1000
BATCH_BYTES = 1 << 20
WINDOW_BATCHES = 4
EAGER_BATCHES = 2
WINDOW_BYTES = 8 << 20
ACK_TIMEOUT = 5.0
GIVE_UP_AFTER = 30.0
ROOM_FOR_BATCH_HEADERS = 256

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

    acked: the stream's tail as far as it is known to hold what was added; acked_end: the commit end of the last
    transaction that it holds whole.
    """

    def __init__(self, broker: Broker, stream: str, epoch: int, tail: Tail) -> None:
        self._broker = broker
        self._stream = stream
        self.epoch = epoch
        self.acked = tail
        self.acked_end = 0
        self._open: list[Item] = []
        self._open_bytes = 0
        self._open_cut = 0
        self._flying: deque[_Batch] = deque()
        self._flying_bytes = 0
        self._next = tail.seq
        self._number = 0
        self._id = secrets.token_hex(6)
        self._changed = asyncio.Event()
        self._doubt = ""
        self._wanted = False
        self._refused: object = None
        self._fruitless = 0
        self._inbox = b""
        self._largest = broker.max_payload - ROOM_FOR_BATCH_HEADERS
        self._log = log.get(stream=stream, epoch=epoch)
        self._tail_headers = b"Bridge-Epoch: %d\r\nBridge-V: %s\r\n" % (epoch, event.FORMAT.encode())

    async def open(self) -> None:
        """Subscribe to the answers; call once before anything is added."""
        inbox = self._broker.nc.new_inbox()
        await self._broker.nc.subscribe(f"{inbox}.*", cb=self._answered)
        self._inbox = inbox.encode()

    @property
    def next_seq(self) -> int:
        """The sequence that the next event will have; the fence makes the prediction exact."""
        return self._next + len(self._open) + 1

    @property
    def idle(self) -> bool:
        """Whether everything that was added is in the stream."""
        return not self._flying and not self._open

    def add(self, subject: bytes, op: str, position: str, payload: bytes, end: int, *, last: bool) -> None:
        """Take one event; whoever adds awaits `room` whenever `full` says so.

        Raises:
            TooLarge: the event is larger than the server's max_payload.
        """
        headers = b"Bridge-Op: %s\r\nBridge-Position: %s\r\n%s" % (op.encode(), position.encode(), self._tail_headers)
        if last:
            headers += b"Bridge-Last: 1\r\n"
        size = len(headers) + len(payload)
        if size > self._largest:
            raise TooLarge(
                f"the event at {position} on {subject.decode()} has {size:,} bytes; NATS at {self._broker.where} takes "
                f"messages of {self._broker.max_payload:,} at most",
                "raise max_payload in the NATS server's configuration and start again; nothing is lost meanwhile",
            )
        if self._open and self._open_bytes + size > BATCH_BYTES:
            self._cut()
        self._open.append(Item(subject, headers, payload, position, end))
        self._open_bytes += size
        if end:
            self._open_cut = len(self._open)
        if len(self._open) >= BATCH_MESSAGES:
            self._cut()

    @property
    def full(self) -> bool:
        """Whether `room` must be awaited before more is added."""
        return len(self._flying) >= WINDOW_BATCHES or self._flying_bytes >= WINDOW_BYTES or bool(self._doubt)

    def flush(self) -> None:
        """Send the complete transactions that are open: at once, or with the next answer while enough are on their way.

        A batch costs the server a sync whatever its size: what comes meanwhile shares the next one.
        """
        self._wanted = bool(self._open_cut)
        if self._wanted and not self._doubt and len(self._flying) < EAGER_BATCHES:
            self._wanted = False
            self._cut()

    def _cut(self) -> None:
        """Close the open batch at the last transaction's end in it, or where it is if it holds no end."""
        cut = self._open_cut or len(self._open)
        items, self._open = self._open[:cut], self._open[cut:]
        self._open_cut = 0
        size = sum(len(i.headers) + len(i.payload) for i in items)
        self._open_bytes -= size
        self._send(items, size)

    def _send(self, items: list[Item], size: int) -> None:
        self._number += 1
        batch = _Batch(self._number, items, size, self._next)
        self._flying.append(batch)
        self._flying_bytes += size
        self._next += len(items)
        if not self._doubt:
            self._write(batch)

    def _write(self, batch: _Batch) -> None:
        """Hand the frames to the connection, whole commands at a time; the transport buffers them."""
        reply = b"%s.%d" % (self._inbox, batch.number)
        self._broker.write(frames(batch.items, b"%s.%d" % (self._id.encode(), batch.number), batch.expected, reply))

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
        self.acked = Tail(seq, items[-1].position, self.epoch)
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

    def _notify(self) -> None:
        """Wake everybody who waits now; a fresh event for those who wait later."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _resolve(self) -> None:
        """Find out what the stream has of what is on its way, and send the rest again after it."""
        self._log.debug("in doubt", why=self._doubt, unanswered=len(self._flying))
        if self._fruitless:
            # The server refused and keeps refusing: do not ask in a tight loop.
            await anyio.sleep(min(1.0, 0.05 * 2 ** min(self._fruitless, 5)))
        tail = await self._tail(anyio.current_time() + GIVE_UP_AFTER)
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
        for start in range(0, len(rest), BATCH_MESSAGES):
            part = rest[start : start + BATCH_MESSAGES]
            self._send(part, sum(len(i.headers) + len(i.payload) for i in part))

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
    rest = [item for item in items if item.position > tail.position]
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
