"""How a consumer keeps its place in the log: connections that come and go, what was given, and what was acked.

`Following.next` gives one item after the other. Whatever breaks in between, the next connection goes on behind the last
item that was given; a durable is set back to what was acked, and what its reader has had already is dropped here, while
its acks count again. Where a newer writer has written over sequences that were given, items go back: their epoch is
higher, and `turn` counts on.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any, Literal

import anyio
import msgspec
import nats.errors

from bridge import event, log
from bridge.config import Config, duration
from bridge.errors import ForeignWriter, OtherStream, Overtaken, Unavailable, UsageError
from bridge.stream import answer, claims
from bridge.stream.durable import Durable, Seen
from bridge.stream.freshness import Freshness
from bridge.stream.intake import Message
from bridge.stream.items import Item, Transaction
from bridge.stream.reader import create_consumer, existing, let_go
from bridge.stream.server import NOT_FOUND_CONSUMER, NOT_FOUND_STREAM, ApiError, Broker, Servers, StreamState, connect
from bridge.stream.state import Writer
from bridge.stream.subjects import epochs_key
from bridge.waiting import Backoff

LOOK_EVERY = 1.0
REMEMBER_EVERY = 60.0
PROGRESS_EVERY = 600.0
CLOSE_SECONDS = 2.0
_EPOCH, _REST, _FRESH = "bridge.epoch", "bridge.rest", "bridge.fresh"

Start = Literal["first"] | int | datetime
Large = Literal["resolve", "leave"]


class Following:
    """One reader's way through the log.

    Args:
        subjects: what to read; asked with the stream's state, since a compacted stream has others.
        durable: the consumer's name; empty for one that goes with its reader.
    """

    def __init__(
        self, config: Config, servers: Servers, subjects: Any, *, start: Start, durable: str, follow: bool, large: Large
    ) -> None:
        self._config = config
        self._servers = servers
        self._subjects = subjects
        self._start = start
        self._name = durable
        self._fleeting = ""
        self._follow = follow
        self._large = large
        self._stack = contextlib.AsyncExitStack()
        self._broker: Broker | None = None
        self._consumer: Durable | None = None
        self._batches: AsyncGenerator[list[Message], None] | None = None
        self._backoff = Backoff("events")
        self._created = ""
        self._until: int | None = None
        self._reads: list[str] = []
        self._first = 0
        self._given: Seen | None = None
        self._done = Seen()
        self._turn = 0
        self._ready: deque[Item] = deque()
        self._remembered = (Seen(), 0.0)
        self._fresh: Freshness | None = None
        self._looked = self._noted = self._told = 0.0
        self.ended = False

    async def next(self) -> Item | None:
        """The next item; None in a pause, and at the end."""
        if not self._ready and not self.ended:
            try:
                await self._take(await self._batch())
            except Unavailable as error:
                await self._disconnect()
                await self._backoff.wait(error)
        return self._ready.popleft() if self._ready else None

    async def _batch(self) -> list[Message]:
        if self._consumer is None:
            await self.connect(self._backoff)
        assert self._consumer is not None
        consumer, whole = self._consumer, False
        if self._fresh is not None and not self._name and self._given is not None:
            self._fresh.done(self._given.seq)  # who asks for more is done with what was given
        try:
            if time.monotonic() - self._looked > LOOK_EVERY:
                await self._look(consumer)
            found: list[Message] = []
            if not self.ended:
                self._batches = self._batches or consumer.batches()
                found = await anext(self._batches)
            whole = True
            return found
        finally:
            if not whole:
                # Cut off in the middle: what was taken and not given must come again.
                await self._close_batches()
                consumer.again(self._behind)

    @property
    def _behind(self) -> Seen:
        """Where the consumer is set back to: what was acked; without acks, what was given."""
        return self._done if self._name or self._given is None else self._given

    async def _take(self, batch: list[Message]) -> None:
        """Make items of what is new. What comes once more after a reconnect has been given; only its acks are new."""
        assert self._given is not None
        for message in batch:
            if not message.position:
                raise ForeignWriter(
                    f"the message at sequence {message.seq} of the stream {self._config.stream.name} is no bridge's",
                    "find and stop its publisher; remove the message with `nats stream rmm`",
                )
            if message.seq <= self._given.seq:
                if message.epoch <= self._given.epoch:
                    continue
                self._went_back(message.seq - 1)
            if self._until is not None and message.seq > self._until:
                break
            self._given = Seen(max(message.epoch, self._given.epoch), message.seq, message.position)
            self._ready.append(
                Item(
                    message.seq, message.position, message.epoch, message.op, message.subject, message.last,
                    message.data, message.at, self._turn,
                )
            )  # fmt: skip
        if self._fresh is not None and self._ready:
            self._fresh.taken(self._ready[-1].seq, self._ready[-1].stored)
        if self._until is not None and batch:
            last = batch[-1]
            self.ended = last.seq >= self._until or (last.pending == 0 and await self._nothing_behind(last.seq))
        if batch and self._name and batch[0].seq <= self._done.seq and self._consumer is not None:
            await self._consumer.ack(self._done.seq)

    async def _nothing_behind(self, seq: int) -> bool:
        """Whether the stream itself has nothing more to read: a consumer's count of what is pending is no proof."""
        assert self._broker is not None
        assert self._until is not None
        for subject in self._reads:
            found = await self._broker.message(self._config.stream.name, next_by_subj=subject, seq=seq + 1)
            if found is not None and found.seq <= self._until:
                log.get().warning("count of pending messages is wrong", stream=self._config.stream.name, after=seq)
                return False
        return True

    def _went_back(self, seq: int) -> None:
        self._turn += 1
        if self._done.seq > seq:
            self._done = Seen(self._done.epoch, seq)

    async def ack(self, done: Item | Transaction) -> None:
        """Everything up to here is done; where the server cannot be told now, it is told by the next connection."""
        if done.turn != self._turn or done.seq <= self._done.seq:
            return
        self._done = Seen(done.epoch, done.seq, done.position)
        if self._fresh is not None:
            self._fresh.done(done.seq)
        with contextlib.suppress(Unavailable):
            if self._consumer is not None:
                await self._consumer.ack(done.seq)
                if done.epoch > self._remembered[0].epoch:
                    await self._remember()

    async def passed(self, item: Item) -> bool:
        """Whether the log has gone on behind an item's transaction, and nothing of it is still to come."""
        with contextlib.suppress(Unavailable):
            if self._broker is None or self._consumer is None:
                return False
            at = self._until if self.ended else None
            if at is None:
                at = (await existing(self._broker, self._config.stream.name)).last_seq
            found = await self._broker.message(self._config.stream.name, seq=at)
            if found is None:
                return False
            same = found.headers.get(event.HEADER_POSITION, "").startswith(item.commit)
            if same and event.HEADER_LAST not in found.headers:
                return False
            return self.ended or await self._consumer.look() is not None
        return False

    async def _look(self, consumer: Durable) -> None:
        """Once a second: where nothing is left, the reader is as far as the stream."""
        self._looked, began = time.monotonic(), time.time()
        rest = await consumer.look()
        if rest is not None and self._given is not None:
            self._given = rest if rest.seq > self._given.seq else self._given
            self._done = rest if rest.seq > self._done.seq else self._done
            self.ended = not self._follow
            if self._fresh is not None:
                self._fresh.caught_up(began)
        self._check_fresh()
        every = min(REMEMBER_EVERY, self._fresh.remember) if self._fresh is not None else REMEMBER_EVERY
        if self._looked - self._noted > every:
            await self._remember()
        if self._name and self._looked - self._told > PROGRESS_EVERY:
            self._told = self._looked
            await consumer.progress()

    def _check_fresh(self) -> None:
        """Overtaken where a compacted log may have dropped a deleted row's last event before it was read."""
        if self._fresh is not None and self._fresh.lost:
            raise Overtaken(
                f"the reader of {self._config.stream.name} is "
                f"{time.time() - self._fresh.since:,.0f} seconds behind a compacted log whose tombstones go after "
                f"{self._config.stream.tombstone_ttl}: it may have missed rows that were deleted",
                "build anew what was made of the events; a longer [stream] tombstone_ttl allows for longer stops",
            )

    async def fetch(self, item: Item) -> Item:
        """The item with its whole event; Unavailable where the connection is lost."""
        ref = event.ref_of(item.data)
        if ref is None:
            return item
        if self._broker is None:
            await self.connect(self._backoff)
        assert self._broker is not None
        return msgspec.structs.replace(item, data=await claims.resolve(self._broker, ref, seq=item.seq))

    # Connection and consumer

    async def connect(self, backoff: Backoff) -> None:
        """Connect, and open the consumer behind what is done."""
        await self._disconnect()
        where = self._config.stream
        broker = await self._stack.enter_async_context(connect(where, self._servers, name="bridge events"))
        self._broker = broker
        state = await existing(broker, where.name)
        if self._created not in ("", state.created):
            raise OtherStream(
                f"the stream {where.name} was made again at {state.created}; what was read came from the one of "
                f"{self._created}",
                "build anew what was made of the events, from the new stream's start",
            )
        self._created = state.created
        if not self._follow and self._until is None:
            self._until = state.last_seq
        self._consumer = await self._opened(broker, state)
        if self._until is not None and not self._consumer.pending:
            self.ended = await self._nothing_behind(self._consumer.seen.seq)
        self._looked = self._told = time.monotonic()
        backoff.over()

    async def _opened(self, broker: Broker, state: StreamState) -> Durable:
        self._fleeting = "" if self._name else f"events-{secrets.token_hex(6)}"
        name, subjects = self._name or self._fleeting, self._subjects(state)
        self._reads = subjects
        kept = await self._kept(broker, state, subjects) if self._name else None
        newest = await self._newest(broker)
        if kept is not None:
            self._first = kept[0]
            done = kept[1] if self._given is None else self._done
        else:
            self._first = self._first or await self._beginning(broker, state)
            done = Seen(0, self._first - 1) if self._given is None else self._behind

        async def epochs() -> list[Writer]:
            return await self._writers(broker)

        if state.compacted and self._fresh is None:
            since = kept[2] if kept is not None and kept[2] else time.time()
            self._fresh = Freshness(name, duration(self._config.stream.tombstone_ttl), since)
        if state.last_seq > done.seq:
            self._check_fresh()
        exact = isinstance(self._start, int) or kept is not None or self._given is not None
        consumer = Durable(
            broker, state.name, name, subjects,
            first=self._first, epochs=epochs, parts=self._parts, named=bool(self._name), exact=exact,
        )  # fmt: skip
        await consumer.open(done)
        if self._given is None:
            self._given = consumer.seen
            self._done = Seen(newest, consumer.seen.seq) if kept is None else done
        if kept is None:
            await self._remember()
        return consumer

    def _parts(self, batch: list[Message]) -> AsyncGenerator[list[Message], None]:
        assert self._broker is not None
        return claims.whole(self._broker, self._config.stream.name, batch, leave=self._large == "leave")

    async def _beginning(self, broker: Broker, state: StreamState) -> int:
        if isinstance(self._start, int):
            return max(self._start, 1)
        if isinstance(self._start, datetime):
            start = self._start if self._start.tzinfo else self._start.replace(tzinfo=UTC)
            at = start.astimezone(UTC).isoformat().replace("+00:00", "Z")
            found = await broker.message(state.name, start_time=at, next_by_subj=">")
            return found.seq if found is not None else state.last_seq + 1
        return max(state.first_seq, 1)

    async def _kept(self, broker: Broker, state: StreamState, subjects: list[str]) -> tuple[int, Seen, float] | None:
        """Where a durable began, what it has done, and up to what time it has read; None where there is no such one.

        Raises:
            UsageError: it reads other tables.
        """
        try:
            info = await broker.api(f"CONSUMER.INFO.{state.name}.{self._name}")
        except ApiError as error:
            if error.code != NOT_FOUND_CONSUMER:
                raise
            return None
        config = info["config"]
        reads = config.get("filter_subjects") or [config.get("filter_subject", "")]
        if sorted(reads) != sorted(subjects):
            raise UsageError(
                f"the durable {self._name} reads {', '.join(sorted(reads))}, not {', '.join(sorted(subjects))}",
                f"choose another name, or begin anew: nats consumer rm {state.name} {self._name}",
            )
        metadata, first = config.get("metadata") or {}, config.get("opt_start_seq", 1)
        # The server moves a floor along with the stream's beginning: there it is no proof that anything was acked.
        floor = info["ack_floor"]["stream_seq"]
        done = max(floor if floor >= state.first_seq else 0, int(metadata.get(_REST, 0)), first - 1)
        epoch = int(metadata.get(_EPOCH, 0)) or await self._newest(broker)
        return first, Seen(epoch, done), float(metadata.get(_FRESH, 0.0))

    async def _remember(self) -> None:
        """Keep with the consumer under which epoch its acks were given, and how far a quiet table was read."""
        kept = self._done, self._fresh.since if self._fresh is not None else 0.0
        if not self._name or self._broker is None or kept == self._remembered:
            return
        self._noted = time.monotonic()
        stream, (done, fresh) = self._config.stream.name, kept
        config: dict[str, Any] = (await self._broker.api(f"CONSUMER.INFO.{stream}.{self._name}"))["config"]
        noted = {_EPOCH: str(done.epoch), _REST: str(done.seq)} | ({_FRESH: str(fresh)} if fresh else {})
        config["metadata"] = (config.get("metadata") or {}) | noted
        await create_consumer(self._broker, stream, self._name, config, action="update")
        self._remembered = kept

    async def _newest(self, broker: Broker) -> int:
        return max((writer.epoch for writer in await self._writers(broker)), default=0)

    async def _writers(self, broker: Broker) -> list[Writer]:
        """The bridges that have written, from the state bucket; none where there is no such bucket."""
        bucket, key = self._config.state.bucket, epochs_key(self._config.source.name)
        try:
            found = await broker.message(f"KV_{bucket}", last_by_subj=f"$KV.{bucket}.{key}")
        except ApiError as error:
            if error.code == NOT_FOUND_STREAM:
                return []
            raise
        if found is None or not found.data:
            return []
        return answer.value(found.data, list[Writer], f"the KV key {bucket}/{key}")

    async def _close_batches(self) -> None:
        batches, self._batches = self._batches, None
        if batches is not None:
            with anyio.CancelScope(shield=True), contextlib.suppress(Unavailable):
                await batches.aclose()

    async def _disconnect(self) -> None:
        self._broker = self._consumer = None
        await self._close_batches()
        await self._stack.aclose()

    async def close(self) -> None:
        """Let the last acks out, remove a consumer that was for this reader alone, and disconnect."""
        with anyio.CancelScope(shield=True):
            missing = (Unavailable, ApiError, nats.errors.Error, OSError, RuntimeError)
            with anyio.move_on_after(CLOSE_SECONDS), contextlib.suppress(*missing):
                if self._broker is not None and not self._broker.closed.is_set():
                    await self._remember()
                    await self._broker.nc.flush()
            await self._close_batches()
            if self._broker is not None and self._fleeting:
                await let_go(self._broker, self._config.stream.name, self._fleeting)
            await self._disconnect()
