"""One generation of an index, fed from its consumer: what the always-on reader and the rebuild share.

Here the stream and the search engine meet. Acks follow the engine's answers; the KV record holds what is known to be
done, at most a second behind.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import msgspec

from bridge import delays, log, structured
from bridge.delays import Delays
from bridge.errors import Unavailable
from bridge.failpoints import reach
from bridge.index import mapping
from bridge.index.apply import Applier
from bridge.index.belonging import belongs, drop_outdated, regain, take_writes
from bridge.index.bulk import Mark, Tally
from bridge.index.circuit import Circuit
from bridge.index.columns import changed, grow, known_types, misfit, say_changed, say_gone, say_left_out
from bridge.index.convert import converters
from bridge.index.document import Builder
from bridge.index.generation import Generation, IndexRecord, Member, members
from bridge.index.ground import Label, Letter
from bridge.index.place import Place, freshness
from bridge.index.reason import paths
from bridge.stream import claims, deadletters
from bridge.stream.definition import check_mode
from bridge.stream.durable import ACK_WAIT, Durable, Seen
from bridge.stream.intake import Message
from bridge.stream.reader import existing, read
from bridge.stream.server import StreamState
from bridge.stream.state import TableRecord

EVERY = 1.0


class _Committed(msgspec.Struct):
    """The one field of an event that its delay is counted by; None for what stands between transactions."""

    committed_at: str | None = None


def _committed_at(message: Message) -> str:
    """When an event was committed; empty where that cannot be read, which is for the applier to find."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError):
        return msgspec.json.decode(message.data, type=_Committed).committed_at or ""
    return ""


class Feed:
    """One generation, fed from its consumer over one connection; nothing behind `upto`, where that is given.

    ready: set once it is known that the index belongs to the stream, and its consumer is there.
    """

    def __init__(
        self, place: Place, generation: Generation, tally: Tally, circuit: Circuit | None = None, *, upto: int = 0
    ) -> None:
        self.place = place
        self.circuit = circuit or Circuit(place.site.index.reject_limit)
        self.generation = generation
        self.tally = tally
        self.done = Seen(generation.epoch, generation.seq, generation.position)
        self._members = members(generation.shapes)
        self._subjects = sorted(place.site.subject(member) for member in self._members.values())
        self.durable = self._consumer()
        self._fresh = freshness(place.site, generation) if place.site.config.stream.compact else None
        self._applier: Applier | None = None
        self._types: dict[str, dict[str, str]] = {}
        self._said: set[str] = set()
        self._builders = {member.key: self._builder(member) for member in self._members.values()}
        self._lock = anyio.Lock()
        self._stored = (self.done, generation.fresh)
        self.taken = 0
        self._upto = upto
        self._over = False
        self._buried = False
        self._letters_said = log.Seldom()
        self.write_alias = generation.write_alias
        self._opened = 0
        # Of batches that the index does not have yet: the last sequence, and when the first event was committed.
        self._committed: deque[tuple[int, str]] = deque()
        self._follows = False
        self.ready = anyio.Event()

    async def run(self, between: Callable[[bool], Awaitable[bool]] | None = None) -> None:
        """Feed until `between` says so (asked after every batch, told whether nothing is left to read), or for ever.

        Raises:
            IndexMismatch: index and stream do not belong together. Overtaken: retention has removed unread events.
            OtherStream: the stream is of the other mode.
            Unavailable: the connection to NATS is gone.
        """
        # What a rebuild replays is old for no fault of anybody's.
        self._follows = between is None
        stream = await self._stream()
        uuid = await belongs(
            self.place.engine, self.place.site.named, self.generation.physical, stream.name, stream.created,
            self.generation.uuid,
        )  # fmt: skip
        if uuid and uuid != self.generation.uuid:
            await self._changed(uuid=uuid)
        self._fit(await self.place.tables(self._members.values()))
        rejected = await self.place.refused(self.generation.number)
        await self._open()
        self.ready.set()
        reach("index.opened")
        async with structured.group() as group:
            label = Label(self.place.site.name, self.generation.number, self.place.site.named)
            self._applier = Applier(
                self.place.engine, self.generation.physical, label, self._builders, self, group,
                tally=self.tally, rejected=rejected, circuit=self.circuit, longest=self.generation.longest,
            )  # fmt: skip
            group.start_soon(self._watch)
            async with contextlib.aclosing(self.durable.batches()) as batches:
                async for batch in batches:
                    if await self._step(batch, between):
                        break
            group.cancel_scope.cancel()
        await self.store()

    async def _stream(self) -> StreamState:
        """The stream as it is now, checked for what this generation may have missed of it."""
        stream = await existing(self.place.broker, self.generation.stream)
        check_mode(stream, self.place.site.config.stream)
        if self._fresh is not None and stream.last_seq > self.done.seq:
            self._fresh.check()
        return stream

    def _consumer(self) -> Durable:
        return Durable(
            self.place.broker, self.generation.stream, self.generation.consumer, self._subjects,
            first=self.generation.first, epochs=self.place.writers, parts=self._whole,
        )  # fmt: skip

    async def _open(self) -> None:
        """Go on with a write alias and from a consumer of this feed's own: one that was replaced while it slept, and
        requests of its that come late, can neither write, nor take a message from it, nor set it ahead."""

        def named(record: IndexRecord) -> IndexRecord:
            self.still_allowed()
            return record.having_opened(self.generation.number)

        self._take(await self.place.change(named))
        self._opened, self.write_alias = self.generation.opened, self.generation.write_alias
        reach("index.named")
        await take_writes(self.place.engine, self.place.site.named, self.generation, self.still_allowed)
        reach("index.admitted")
        self.durable = self._consumer()
        await self.durable.open(self.done)
        # The engine may have been waited for, and tombstones have gone meanwhile.
        await self._stream()
        self.still_allowed()
        await self.place.remove_older_consumers(self.generation)

    async def _step(self, batch: list[Message], between: Callable[[bool], Awaitable[bool]] | None) -> bool:
        assert self._applier is not None
        if self._upto and batch and batch[-1].seq >= self._upto:
            batch, self._over = [message for message in batch if message.seq <= self._upto], True
        if self._fresh is not None and batch:
            self._fresh.taken(batch[-1].seq, batch[-1].at)
        if self._follows and batch and (at := _committed_at(batch[0])):
            self._committed.append((batch[-1].seq, at))
        await self._applier.take(batch)
        self.taken += len(batch)
        if not self.durable.waiting:
            await self._applier.flush()
        at_end = self._over or (self.durable.pending == 0 and not self.durable.waiting)
        if between is not None and await between(at_end):
            await self._applier.settle()
            return True
        return False

    @property
    def rejected(self) -> dict[str, int]:
        """The documents that were rejected and not deleted since, each with the last version that was."""
        return self._applier.rejected if self._applier is not None else {}

    async def builders(self) -> dict[tuple[str, str], Builder]:
        """What makes each table's documents, by (schema, table), as the tables' columns are now."""
        self._fit(await self.place.tables(self._members.values()))
        return self._builders

    def _builder(self, member: Member) -> Builder:
        def toastable(column: str) -> bool:
            return mapping.toastable(self._types.get(member.name, {}).get(column, ""))

        def fits(field: str) -> bool:
            why = misfit(self.generation, field)
            if why and (said := f"{member.name} {field} left out") not in self._said:
                self._said.add(said)
                say_left_out(self.place.site.named, self.generation, member.name, field, why)
            return not why

        return Builder(member.shape, member.name, member.naming, toastable, fits)

    def _fit(self, tables: dict[str, TableRecord]) -> None:
        """Take up what the tables' columns are now, and say once which changed its type so that its field is wrong, or
        has a name that the index cannot have."""
        self._types = {name: {column.name: column.type for column in own.plain} for name, own in tables.items()}
        fields = self.generation.mapping["properties"]
        for member in self._members.values():
            builder = self._builders[member.key]
            builder.converters = converters(fields, self._types[member.name], member.shape.rename)
            # Rows in the log may still have columns that the table had once.
            builder.look([*self._types[member.name], *sorted(tables[member.name].former)])
            news = changed(self.generation, member.name, member.shape, tables[member.name].plain)
            say_changed(self.place.site.named, self.generation, member.name, news, self._said)
            gone = builder.kept(self.generation.types.get(member.name, {}).keys() - self._types[member.name].keys())
            say_gone(self.place.site.named, self.generation, member.name, gone, self._said)

    async def _watch(self) -> None:
        """Once a second: keep the record, compare with the stream, and keep the server from sending again."""
        assert self._applier is not None
        told = time.monotonic()
        while True:
            await anyio.sleep(EVERY)
            began = time.time()
            rest = await self.durable.look()
            if rest is not None and self._applier.idle:
                if self._fresh is not None:
                    if rest.seq > self.done.seq:
                        # Something was stored that did not come: a tombstone may be among it that has gone by now.
                        self._fresh.check()
                    self._fresh.caught_up(began)
                self.done = rest if rest.seq > self.done.seq else self.done
            if self._fresh is not None:
                self._fresh.check()
            await self.store()
            if time.monotonic() - told > ACK_WAIT / 3:
                await self.durable.progress()
                told = time.monotonic()

    async def store(self) -> None:
        """Write how far everything is done into the record."""
        done, fresh = self.done, self._stored[1]
        if self._fresh is not None and (done != self._stored[0] or self._fresh.since - fresh > self._fresh.remember):
            fresh = self._fresh.since
        if (done, fresh) == self._stored:
            return
        number = self.generation.number
        changes = {"seq": done.seq, "epoch": done.epoch, "position": done.position, "fresh": fresh}
        await self.place.change(lambda record: record.having_changed(number, **changes))
        self._stored = (done, fresh)
        reach("index.stored")

    # What the applier needs of the stream

    async def bury(self, letter: Letter) -> None:
        """Store a dead letter."""
        config, name = self.place.site.config, self.place.site.name
        if (unsaid := self._letters_said.admits()) is not None:
            log.get().warning(
                "dead letter", index=name, seq=letter.seq, op=letter.op, reason=letter.reason, unsaid=unsaid
            )
        unique = f"{name}-{letter.generation}-{letter.epoch}-{letter.seq}"
        # The first one may have to make the stream.
        async with contextlib.nullcontext() if self._buried else self._lock:
            await deadletters.bury(self.place.broker, config.stream, config.source.name, name, letter, unique)
            self._buried = True

    async def history(self, upto: int) -> AsyncIterator[list[Message]]:
        """The tables' messages from where the generation began."""
        batches = read(
            self.place.broker,
            self.generation.stream,
            subjects=self._subjects,
            start=self.generation.first,
            last=upto,
        )
        async with contextlib.aclosing(batches):
            async for batch in batches:
                async with contextlib.aclosing(self._whole(batch)) as parts:
                    async for part in parts:
                        yield part

    def _whole(self, batch: list[Message]) -> AsyncGenerator[list[Message], None]:
        """A batch with its large rows; one whose object is missing becomes a dead letter as it is."""
        return claims.whole(self.place.broker, self.generation.stream, batch, lenient=True)

    async def key(self, schema: str, table: str) -> list[str]:
        """The columns of a table's key as they are recorded now."""
        return await self.place.primary(schema, table)

    async def reached(self, mark: Mark) -> None:
        """Ack everything up to a place."""
        self.done = Seen(mark.epoch, mark.seq, mark.position)
        while self._committed and self._committed[0][0] <= mark.seq:
            delays.indexed.setdefault(self.place.site.name, Delays()).since(self._committed.popleft()[1], time.time())
        if self._fresh is not None:
            self._fresh.done(mark.seq)
        reach("index.reached")
        await self.durable.ack(mark.seq)
        reach("index.acked")

    def still_allowed(self) -> None:
        """Raise Lost where the lease has run out: whoever slept must send nothing."""
        self.place.still_allowed()

    async def regain(self) -> bool:
        """Put back a write alias that is gone while its index is there, unless another reader's has taken its place."""
        while True:
            now = (await self.place.record()).get(self.generation.number)
            if now is None:
                return False
            if self._opened not in (0, now.opened):
                raise Unavailable(
                    f"another process feeds {now.physical} of index {self.place.site.named} by now",
                    "waiting for the lease",
                )
            self.write_alias = now.write_alias
            self.still_allowed()
            if not await regain(self.place.engine, self.place.site.named, now):
                return False
            after = (await self.place.record()).get(self.generation.number)
            if after is None or after.opened == now.opened:
                return after is not None
            # A reader has begun meanwhile, and may have taken it away just before it was put back.
            await drop_outdated(self.place.engine, after)

    def known(self) -> frozenset[str]:
        """The names of fields and columns, which reasons may show."""
        return paths(self.generation.mapping).union(*self._types.values())

    def beginning(self, table: str) -> int:
        """The version of a table's last begin marker."""
        return self.generation.begins.get(table, 0)

    async def begun(self, table: str, at: int) -> None:
        """Remember a begin marker before anything behind it is acked."""
        await self._changed(begins={**self.generation.begins, table: at})
        reach("index.begun")

    async def ended(self, table: str, at: int) -> None:
        """Remember an end marker."""
        await self._changed(ends={**self.generation.ends, table: at})

    def reads(self, table: str, seq: int) -> bool:
        """Whether a table's complete picture begins later, or its begin marker was seen and not its end."""
        generation = self.generation
        return seq < generation.wholes.get(table, 0) or generation.begins.get(table, 0) > generation.ends.get(table, 0)

    async def longest(self, documents: int) -> None:
        """Remember how many documents a row may have."""
        await self._changed(longest=max(documents, self.generation.longest))

    async def learn(self, documents: list[dict[str, Any]]) -> bool:
        """Add the columns that the mapping lacks; whether these documents now fit."""
        async with self._lock:
            tables = await self.place.tables(self._members.values())
            self._fit(tables)
            columns = {name: table.plain for name, table in tables.items()}
            grown = await grow(
                self.place.engine, self.place.site.named, self.generation, self._members.values(), columns, documents
            )
            if grown is not None:
                reach("index.grown")
                types = {name: known_types(self.generation, name, own) for name, own in columns.items()}
                await self._changed(mapping=grown, types=types)
                self._fit(tables)
            return grown is not None

    async def catch_up(self) -> None:
        """Know the fields that were added by now: whoever is adding some holds the lock until they are recorded."""
        async with self._lock:
            self._take(await self.place.record())
            self._fit(await self.place.tables(self._members.values()))

    async def _changed(self, **changes: Any) -> None:
        number = self.generation.number
        self._take(await self.place.change(lambda record: record.having_changed(number, **changes)))

    def _take(self, record: IndexRecord) -> None:
        self.generation = record.get(self.generation.number) or self.generation
