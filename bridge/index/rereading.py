"""The log read once more beside an index's reader: into a picture up to a sequence, then on to see what has changed.

Nothing here takes a lease or writes; a rebuild and the reader may be at work meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence

import anyio.to_thread

from bridge.errors import IndexMismatch, ServerRefused, Unavailable
from bridge.index.bulk import Tally
from bridge.index.document import Builder, version
from bridge.index.feed import Feed
from bridge.index.generation import Generation, members
from bridge.index.picture import Picture, Standing, Table
from bridge.index.place import Place, Site, connected
from bridge.stream import claims
from bridge.stream.definition import check_mode
from bridge.stream.durable import LIMITS
from bridge.stream.intake import Message
from bridge.stream.lease import STALE, Lease
from bridge.stream.reach import complete_from
from bridge.stream.reader import existing, overtaken, read
from bridge.stream.server import Servers, StreamState
from bridge.stream.state import State
from bridge.waiting import until

LOOK_EVERY = 0.2
STANDSTILL = 30.0


@contextlib.asynccontextmanager
async def looking(where: Site, servers: Servers, role: str) -> AsyncIterator[Place]:
    """A place to look at an index from, over a connection of its own."""
    config = where.config
    async with connected(where, servers, role) as (broker, engine):
        check_mode(await existing(broker, config.stream.name), config.stream)
        yield Place(where, broker, await State.open(broker, config.state.bucket, config.stream.replicas), engine)


async def caught_up(place: Place, number: int) -> bool:
    """Wait until a generation has everything that the stream holds now; whether it has. It does not get it where no
    reader is at work, or where that one makes no headway."""
    end = (await existing(place.broker, place.site.config.stream.name)).last_seq
    moved, renewed = time.monotonic(), time.monotonic()
    seq, revision, reached = -1, -1, False

    async def settled() -> bool:
        nonlocal moved, renewed, seq, revision, reached
        generation = (await place.record()).get(number)
        if generation is None or generation.seq >= end:
            reached = True
            return True
        now = time.monotonic()
        if generation.seq != seq:
            seq, moved = generation.seq, now
        lease = await place.state.get(place.site.lease("index"), Lease)
        if lease is None:
            return True
        if lease[1] != revision:
            revision, renewed = lease[1], now
        return now - renewed > STALE or now - moved > STANDSTILL

    await until(settled, seconds=float("inf"), every=LOOK_EVERY)
    return reached


class Rereading:
    """One generation's log, read from where it is complete. Make it with `rereading`.

    Attributes:
        feed: of the generation; it is not run. builders: make its documents.
        picture: the rows as they stood at `drawn`.
        drawn: the sequence up to which the picture was drawn. end: the one up to which the log was read since.
    """

    def __init__(
        self,
        place: Place,
        feed: Feed,
        builders: Mapping[Table, Builder],
        picture: Picture,
        *,
        start: int,
        epoch: int,
        state: StreamState,
    ) -> None:
        generation = feed.generation
        self._place = place
        self._generation = generation
        self._start = start
        self._epoch = epoch
        self._subjects = sorted(place.site.subject(member) for member in members(generation.shapes).values())
        self._limited = not state.compacted and any(state.config.get(limit, 0) > 0 for limit in LIMITS)
        self.feed = feed
        self.builders = builders
        self.picture = picture
        self.drawn = self.end = start - 1

    async def draw(self, upto: int) -> None:
        """Draw the picture as of a sequence.

        Raises:
            Overtaken: retention has removed events that were not read yet.
            ServerRefused: there is no room for the picture.
        """
        while True:
            await self._read(self._start, upto, self.picture.take)
            if not await anyio.to_thread.run_sync(self.picture.again):
                break
        self.drawn = self.end = max(upto, self._start - 1)

    async def draw_all(self) -> None:
        """Draw the picture as of the log's end now; raises what `draw` does."""
        await self.draw((await existing(self._place.broker, self._generation.stream)).last_seq)

    async def advance(self) -> None:
        """Read on to the log's end as it is now: notes on everything that has changed are forgotten."""
        end = (await existing(self._place.broker, self._generation.stream)).last_seq
        if end > self.end:
            await self._read(self.end + 1, end, self.picture.touch)
            self.end = end

    async def _read(self, start: int, upto: int, take: Callable[[Sequence[Message]], None]) -> None:
        seen = start - 1
        async with contextlib.aclosing(self._batches(start, upto)) as batches:
            async for batch in batches:
                if self._limited:
                    first = (await existing(self._place.broker, self._generation.stream)).first_seq
                    if first > seen + 1:
                        raise overtaken(self._generation.stream, first, seen)
                await anyio.to_thread.run_sync(take, batch)
                seen = batch[-1].seq

    async def _batches(self, start: int, upto: int) -> AsyncGenerator[list[Message], None]:
        place, stream = self._place, self._generation.stream
        async with contextlib.aclosing(
            read(place.broker, stream, subjects=self._subjects, start=start, last=upto)
        ) as batches:
            async for batch in batches:
                async with contextlib.aclosing(claims.whole(place.broker, stream, batch, lenient=True)) as parts:
                    async for part in parts:
                        if part:
                            yield part

    def version(self, standing: Standing | None) -> int:
        """The version with which a row (None: one that is gone) is written again.

        Whatever happened to the row up to the log's end is older, whatever comes is newer. A complete read that has
        not ended yet must still be able to sweep the row, where it has not come across it: then it is just older than
        that read's beginning.
        """
        if standing is not None:
            begin = self.picture.open.get((standing.schema, standing.table), 0)
            if standing.version < begin:
                return begin - 1
        return version(max(self.picture.epoch, self._generation.epoch), self.end)

    async def still_stands(self) -> None:
        """Raise Unavailable where a new writer has written over what was read, or where the generation is no longer in
        use: then everything is to be looked at once more."""
        for writer in await self._place.writers():
            if writer.epoch > self._epoch and writer.first_seq <= self.end:
                raise Unavailable(f"the log was written anew from sequence {writer.first_seq:,} on", "reading it again")
        await in_use(self._place, self._generation)


async def in_use(place: Place, generation: Generation) -> None:
    """Raise Unavailable where a rebuild has put another generation in the place of one."""
    now = (await place.record()).get(generation.number)
    if now is None or now.state != generation.state:
        raise Unavailable(f"the generation {generation.physical} was replaced meanwhile", "looking at the new one")


@contextlib.asynccontextmanager
async def rereading(
    place: Place, generation: Generation, *, wanted: Iterable[str] | None = None
) -> AsyncIterator[Rereading]:
    """The log of a generation, with a picture that is removed at the end.

    Args:
        wanted: the only addresses whose rows are asked for; None for all.

    Raises:
        Gap: the stream does not hold all rows of the table any more.
        IndexMismatch: the generation was built from another stream.
    """
    state = await existing(place.broker, generation.stream)
    if state.created != generation.stream_created:
        raise IndexMismatch(
            f"the index {generation.physical} was built from another stream than today's {generation.stream}",
            f"build it anew: bridge reindex {place.site.name}",
        )
    start = generation.first
    if not state.compacted and state.messages and state.first_seq > start:
        start = max(start, await _complete_from(place, generation, state))
    writers = await place.writers()
    before = max((writer.epoch for writer in writers if writer.first_seq < start), default=0)
    newest = max((writer.epoch for writer in writers), default=0)
    keys = {member.key: await _key(place, member.key) for member in members(generation.shapes).values()}
    feed = Feed(place, generation, Tally())
    builders = await feed.builders()
    with Picture(builders, lambda table: keys.get(table, []), epoch=before, wanted=wanted) as picture:
        yield Rereading(place, feed, builders, picture, start=start, epoch=newest, state=state)


async def _complete_from(place: Place, generation: Generation, state: StreamState) -> int:
    return min(
        [
            complete_from(await place.snapshot(*member.key), state.first_seq, state.name, member.name)
            for member in members(generation.shapes).values()
        ]
    )


async def _key(place: Place, table: Table) -> Sequence[str]:
    """The columns of a table's key as they are recorded; none where it has none, so that events without one are
    refused as the reader refuses them."""
    try:
        return await place.primary(*table)
    except ServerRefused:
        return []
