"""Claim checks: events that are larger than the server's largest message, by way of an object store.

The whole event goes into the object store `{stream}_large`, under its position as the name; in the stream stands a
short event with a reference to it (`Event.ref`). The object comes first, so that a reader who sees the event finds it.
Positions do not change when PostgreSQL sends a change again, so a bridge that was killed in between, or whose object a
power failure took back, stores the same object under the same name.

An object goes a while after its event has left the stream. The bucket has no limits of its own: what it holds is what
the stream refers to. Readers get the whole event from `whole`; who finds an object missing or damaged is told so.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import anyio
import msgspec
from nats.nuid import NUID

from bridge import event, log
from bridge.errors import ObjectMissing, TooLarge, Unavailable
from bridge.event import HEADER_POSITION, Ref
from bridge.stream import objects
from bridge.stream.intake import Message
from bridge.stream.objects import Info, described
from bridge.stream.reader import overtaken, read
from bridge.stream.server import ApiError, Broker, StreamState

ROOM_FOR_HEADERS = 1 << 10
EVERY = 60.0
COMPACT_EVERY = 600.0
_SUBJECT = "Bridge-Subject"


def bucket_of(stream: str) -> str:
    """The object store of a stream's large rows."""
    return f"{stream}_large"


class Claims:
    """The writer's side. `largest` is the size in bytes up to which an event goes as it is.

    Args:
        located: the subject that an event (its table's subject, position and short form) has in a stream that keeps one
            message a subject; without it nothing is collected there.
    """

    def __init__(
        self,
        broker: Broker,
        stream: str,
        replicas: int,
        located: Callable[[bytes, str, bytes], bytes] | None = None,
    ) -> None:
        self._broker = broker
        self._stream = stream
        self._bucket = bucket_of(stream)
        self._replicas = replicas
        self._located = located
        self._there = False
        self._putting: set[str] = set()
        self._nuid = NUID()
        self.largest = broker.max_payload - ROOM_FOR_HEADERS

    async def put(self, subject: bytes, position: str, payload: bytes) -> bytes:
        """Store an event's object unless it is there already; the short event to publish in its place.

        Raises:
            TooLarge: not even that fits into a message.
            Unavailable: the object store does not take it (now).
        """
        ref, short = await self._short(position, payload)
        if len(short) > self.largest:
            raise TooLarge(
                f"the event at {position} on {subject.decode()} has {len(short):,} bytes even without its row; NATS at "
                f"{self._broker.where} takes messages of {self._broker.max_payload:,} at most",
                "raise max_payload in the NATS server's configuration and start again; nothing is lost meanwhile",
            )
        await self._store(subject, ref, short, payload)
        return short

    async def again(self, subject: bytes, position: str, payload: bytes) -> None:
        """Store the object of an event that the stream has, if it is not there: a power failure may have taken it."""
        ref, short = await self._short(position, payload)
        if await self._store(subject, ref, short, payload):
            log.get().warning("object stored again", bucket=self._bucket, name=position)

    async def _short(self, position: str, payload: bytes) -> tuple[Ref, bytes]:
        ref = Ref(self._bucket, position, len(payload), await objects.digest_of(payload))
        return ref, event.referred(payload, ref)

    async def _store(self, subject: bytes, ref: Ref, short: bytes, payload: bytes) -> bool:
        """Whether there was something to store."""
        if not self._there:
            await objects.ensure(
                self._broker, self._bucket, self._replicas, f"rows of {self._stream} that are larger than max_payload"
            )
            self._there = True
        self._putting.add(ref.name)
        try:
            at = self._located(subject, ref.name, short) if self._located is not None else subject
            return await self._replace(at.decode(), ref, payload)
        finally:
            self._putting.discard(ref.name)

    async def _replace(self, subject: str, ref: Ref, payload: bytes) -> bool:
        old = await objects.find(self._broker, self._bucket, ref.name)
        # Chunks of an attempt that was killed, of a bridge that stood still, or of the object itself.
        chunks = await objects.counted(self._broker, self._bucket, _chunks(self._bucket, ref.name))
        ours = objects.chunk_subject(self._bucket, old.nuid) if old is not None else ""
        same = old is not None and (old.digest, old.size) == (ref.digest, ref.size) and chunks.get(ours) == old.chunks
        if not same:
            await objects.put(
                self._broker,
                Info(ref.name, ref.bucket, f"{ref.name}.{self._nuid.next().decode()}", digest=ref.digest),
                payload,
                replaces=old.seq if old is not None else 0,
                headers={_SUBJECT: [subject]},
            )
        for rest in chunks:
            if not same or rest != ours:
                await objects.purge(self._broker, self._bucket, rest)
        return not same

    # Collecting

    async def run(self, acked: Callable[[], str]) -> None:
        """Delete objects whose events have left the stream, until cancelled; `acked` tells the last acked position.

        What is found gone goes a round later: who has just read the event may still fetch its object.
        """
        doomed: set[str] = set()
        before, started = "", False
        while True:
            pause = EVERY
            try:
                found = await self._state()
                if found is not None and not started:
                    await self.orphans()
                started = True
                if found is not None and not found.compacted:
                    floor = await self.floor(acked())
                    await self.collect(before)
                    before = floor
                elif found is not None and self._located is not None:
                    pause = COMPACT_EVERY
                    doomed = await self.compacted(acked(), doomed)
            except (ApiError, Unavailable) as error:
                # Nothing is lost by waiting; a connection that is gone ends the session elsewhere.
                log.get().warning("objects not collected", bucket=self._bucket, why=error.what, next="trying again")
            await anyio.sleep(pause)

    async def _state(self) -> StreamState | None:
        """The stream's state where there is a bucket to collect in."""
        if await self._broker.stream(objects.stream_of(self._bucket)) is None:
            return None
        return await self._broker.stream(self._stream)

    async def floor(self, acked: str) -> str:
        """The position below which no event is in the stream any more, nor will be; `acked` was asked for before."""
        state = await self._broker.stream(self._stream)
        if state is None or not state.messages:
            return acked + "~" if acked else ""
        first = await self._broker.message(self._stream, seq=state.first_seq)
        return first.headers.get(HEADER_POSITION, "") if first is not None else ""

    async def collect(self, floor: str) -> int:
        """Delete the objects of events below a position; how many."""
        count = 0
        async with aclosing(objects.oldest(self._broker, self._bucket)) as names:
            async for name, _ in names:
                if name >= floor:
                    break
                await self._delete(name)
                count += 1
        if count:
            log.get().info("objects collected", bucket=self._bucket, count=count, before=floor)
        return count

    async def compacted(self, acked: str, doomed: set[str]) -> set[str]:
        """Delete the objects named in `doomed` whose events compaction has removed; those found gone only now."""
        gone: set[str] = set()
        batches = read(
            self._broker, objects.stream_of(self._bucket), subjects=[objects.description_subject(self._bucket, "")]
        )
        async with aclosing(batches):
            async for batch in batches:
                for message in batch:
                    info = described(message.data)
                    if info is not None and info.name <= acked and await self._overwritten(info):
                        gone.add(info.name)
        for name in gone & doomed:
            await self._delete(name)
        return gone - doomed

    async def _overwritten(self, info: Info) -> bool:
        for subject in info.headers.get(_SUBJECT, []):
            last = await self._broker.message(self._stream, last_by_subj=subject)
            # The second half of a changed key differs from the event's own position in its last part.
            return last is None or last.headers.get(HEADER_POSITION, "")[:-8] != info.name[:-8]
        return False

    async def orphans(self) -> None:
        """Delete the chunks that a killed bridge left without a description."""
        if await self._broker.stream(objects.stream_of(self._bucket)) is None:
            return
        chunks = await objects.counted(self._broker, self._bucket, objects.chunk_subject(self._bucket, ">"))
        described = await objects.counted(self._broker, self._bucket, objects.description_subject(self._bucket, ""))
        known = {objects.name_in(subject) for subject in described}
        for subject in chunks:
            name = subject.split(".")[3]
            if name not in known and name not in self._putting:
                await objects.purge(self._broker, self._bucket, subject)

    async def _delete(self, name: str) -> None:
        """The chunks first: what is killed in between is deleted again, as the description is still there."""
        await objects.purge(self._broker, self._bucket, _chunks(self._bucket, name))
        await objects.purge(self._broker, self._bucket, objects.description_subject(self._bucket, name))


def _chunks(bucket: str, name: str) -> str:
    """All chunks that were ever stored under a name: the nuid of a claim check's object begins with it."""
    return objects.chunk_subject(bucket, f"{name}.>")


async def resolve(broker: Broker, ref: Ref, *, seq: int) -> bytes:
    """The whole event that a claim check stands for.

    Args:
        seq: the sequence of the event that refers to it, for the error.

    Raises:
        ObjectMissing: the object is gone or damaged.
        Unavailable: the connection is lost.
    """
    info = await objects.find(broker, ref.bucket, ref.name)
    data = None
    if info is not None and not info.deleted and (info.size, info.digest) == (ref.size, ref.digest):
        data = await objects.get(broker, info)
    if data is None:
        raise ObjectMissing(
            f"the object {ref.name} of the store {ref.bucket}, which holds the row of sequence {seq}, is "
            f"{'gone' if info is None or info.deleted else 'damaged'}",
            f"restore the store from a backup, or read on from sequence {seq + 1} and write that row again in "
            "PostgreSQL, so that the log has it once more",
        )
    return data


async def whole(
    broker: Broker, stream: str, batch: list[Message], *, lenient: bool = False, leave: bool = False
) -> AsyncGenerator[list[Message], None]:
    """A batch in parts: each event that goes by claim check is resolved, alone, when its turn comes.

    Args:
        lenient: give an event whose object is missing as it is, and say so in the log.
        leave: give all events as they are.

    Raises:
        ObjectMissing: an object is gone or damaged, though its event is in the stream.
        Overtaken: retention has removed both event and object since the event was read.
    """
    start = 0
    for index, message in enumerate(batch):
        ref = event.ref_of(message.data)
        if ref is None or leave:
            continue
        if index > start:
            yield batch[start:index]
        start = index + 1
        try:
            data = await resolve(broker, ref, seq=message.seq)
        except ObjectMissing as error:
            if await _left(broker, stream, message):
                continue
            if not lenient:
                raise
            log.get().error("object missing", what=error.what, next=error.remedy)
            data = message.data
        yield [msgspec.structs.replace(message, data=data)]
    if start < len(batch) or not batch:
        yield batch[start:]


async def _left(broker: Broker, stream: str, message: Message) -> bool:
    """Whether compaction has removed an event since it was read, so that a newer one of its key follows.

    Raises:
        Overtaken: it was retention.
    """
    state = await broker.stream(stream)
    if state is None:
        raise Unavailable(f"the stream {stream} is gone", "waiting for it")
    if state.compacted:
        return await broker.message(stream, seq=message.seq) is None
    if message.seq < state.first_seq:
        raise overtaken(stream, state.first_seq, message.seq - 1)
    return False
