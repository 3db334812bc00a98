"""What a consumer of the log is written with: `events` gives the log's events in order, from where one wants, for ever.

    async with events("nats://127.0.0.1:4222", tables=["public.users"], durable="my-app") as log:
        async for item in log:
            …
            await log.ack(item)

docs/consumers.md is its manual. Inside are handled: a server that is away (waited for), a broken connection (the next
one goes on behind the last item given), rows larger than the server's largest message (resolved), a consumer that the
server lost. Raised is what a person must know: see `Log`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from bridge import event
from bridge.config import Config, Secret, Source, State, Stream, Tls, split_name
from bridge.errors import UsageError
from bridge.stream.following import Following, Large, Start
from bridge.stream.items import Item, Transaction
from bridge.stream.server import Servers, StreamState
from bridge.stream.subjects import source_subjects, token
from bridge.waiting import Backoff, forever

LARGEST = 64 << 20
ITEM_BYTES = 600


def events(
    servers: str | Sequence[str] = "nats://127.0.0.1:4222",
    *,
    source: str = "main",
    tables: Sequence[str] = (),
    start: Start = "first",
    durable: str = "",
    follow: bool = True,
    large: Large = "resolve",
    stream: str = "",
    prefix: str = "cdc",
    bucket: str = "bridge",
    tombstone_ttl: str = "7d",
    user: str = "",
    password: str = "",
    token: str = "",
    credentials: str = "",
    nkey_seed_file: str = "",
    tls: Tls | None = None,
) -> Log:
    """The events of one source's log, for `async with`.

    Args:
        servers: URL of a NATS server, or several of one cluster.
        source: the source's name, as `[source] name` has it.
        tables: "schema.table" or "schema.*"; none means everything.
        start: the stream's first event, a sequence, or a time (UTC where it names no zone). A durable that is there
            already goes on behind what it acked, and this is not used.
        durable: a name under which the server keeps what was acked: letters, digits, - and _. One process at a time
            reads under a name. Without it nothing is kept.
        follow: go on for ever; else end with what the stream holds at the beginning.
        large: "leave": give the events of large rows as they are, without `before` and `after`, with a `ref` for
            `Log.resolve`.
        stream, prefix, bucket, tombstone_ttl: as `[stream] name`, `[stream] prefix`, `[state] bucket` and `[stream]
            tombstone_ttl` have them; the last counts in compact mode only.
        user, password, token, credentials, nkey_seed_file, tls: the login, as in `[stream]`.
    """
    connection = Stream(
        servers=[servers] if isinstance(servers, str) else list(servers),
        name=stream or f"cdc_{source}",
        prefix=prefix,
        tombstone_ttl=tombstone_ttl,
        user=user,
        password=Secret(password),
        token=Secret(token),
        credentials=credentials,
        nkey_seed_file=nkey_seed_file,
        tls=tls or Tls(),
    )
    config = Config(source=Source(name=source), stream=connection, state=State(bucket=bucket))
    return Log(
        config, connection.servers, tables=tables, start=start, durable=durable, follow=follow, large=large
    )  # fmt: skip


class Log:
    """A log that is being read; made by `events`, entered with `async with`, read with `async for`. By one task.

    Entering it waits until the servers are there.

    Raises:
        Overtaken: retention has removed events that were not read yet, or `start` is a sequence that is gone; or a
            compacted log was not read for half of `tombstone_ttl`.
        StreamHole: events are missing in the middle of the stream (noticed where everything is read).
        ObjectMissing: the object of a large row is gone or damaged.
        OtherStream: the stream was deleted and made again meanwhile.
        ForeignWriter: something in the stream is no bridge's.
        ServerRefused: no such stream, or the login is wrong.
        UsageError: impossible arguments, or a durable that reads other tables.
    """

    def __init__(
        self,
        config: Config,
        servers: Servers,
        *,
        tables: Sequence[str] = (),
        subjects: Sequence[str] = (),
        start: Start = "first",
        durable: str = "",
        follow: bool = True,
        large: Large = "resolve",
    ) -> None:
        self._source = source_subjects(config.stream.prefix, config.source.name)
        self._prefix = self._source.removesuffix(".>")
        self._tables = [_name(table) for table in tables]
        self._given = list(subjects)
        self._durable = _checked(durable)
        self._following = Following(
            config, servers, self._filters, start=start, durable=durable, follow=follow, large=large
        )

    async def __aenter__(self) -> Log:
        try:
            await forever("events", self._following.connect)
        except BaseException:
            await self._following.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._following.close()

    def __aiter__(self) -> Log:
        return self

    async def __anext__(self) -> Item:
        while True:
            item = await self._following.next()
            if item is not None:
                return item
            if self._following.ended:
                raise StopAsyncIteration

    async def ack(self, done: Item | Transaction) -> None:
        """This event, or transaction, and everything before it is done and need not come again.

        An ack that does not reach the server makes events come again, never get lost. One for an item that was written
        anew since (the log went back) counts for nothing.

        Raises:
            UsageError: the log is not read under a durable name.
        """
        if not self._durable:
            raise UsageError("only a durable keeps acks", 'name it: events(…, durable="my-app")')
        await self._following.ack(done)

    async def resolve(self, item: Item) -> Item:
        """The item with its whole event, where that is a large row's and was left; else the item itself.

        Raises:
            ObjectMissing: the object is gone or damaged.
        """

        async def fetch(_: Backoff) -> Item:
            return await self._following.fetch(item)

        return await forever("events", fetch)

    async def transactions(self, *, largest: int = LARGEST) -> AsyncGenerator[Transaction, None]:
        """Whole transactions, in commit order, instead of single events; each is held in memory until it is complete.

        A transaction is complete with its last event or, as far as some tables show it, once the log has gone on behind
        it: while nothing else is written, that takes up to a second. Snapshot rows and markers come alone. With
        `follow=False` a transaction of which the stream had only the beginning is not given.

        Args:
            largest: from so many bytes on a transaction comes in parts, all but the last of them not `complete`; what
                the parts hold is not taken back where the log goes back.
        """
        held = _Held(largest)
        while True:
            item = await self._following.next()
            if item is not None:
                for transaction in held.add(item):
                    yield transaction
                continue
            if held.items and await self._following.passed(held.items[-1]):
                yield held.take(complete=True)
            if self._following.ended:
                return

    def _filters(self, stream: StreamState) -> list[str]:
        """The subjects to read; in a compacted stream a table's rows have subjects of their own below the table's."""
        if self._given or not self._tables:
            return self._given or [self._source]
        whole = {schema for schema, table in self._tables if table == "*"}
        found = {f"{self._prefix}.{token(schema)}.>" for schema in whole}
        for schema, table in self._tables:
            if schema not in whole:
                found.add(f"{self._prefix}.{token(schema)}.{token(table)}" + (".>" if stream.compacted else ""))
        return sorted(found)


class _Held:
    """A transaction of which the end is not there yet."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._size = 0
        self._part = 0
        self.items: list[Item] = []

    def add(self, item: Item) -> list[Transaction]:
        """What is complete with one more event, or too large."""
        found: list[Transaction] = []
        if self.items and item.seq <= self.items[-1].seq:
            # The log went back: what it took away comes again.
            self.items = [held for held in self.items if held.seq < item.seq]
            self._size = sum(map(_size, self.items))
        if self.items and item.commit != self.items[-1].commit:
            found.append(self.take(complete=True))
        if event.is_between(item.position):
            return [*found, Transaction((item,))]
        if self.items and self._size + _size(item) > self._largest:
            found.append(self.take(complete=False))
        self.items.append(item)
        self._size += _size(item)
        if item.last:
            found.append(self.take(complete=True))
        return found

    def take(self, *, complete: bool) -> Transaction:
        """What is held, and nothing is any more."""
        found = Transaction(tuple(self.items), self._part, complete)
        self._part = 0 if complete else self._part + 1
        self.items, self._size = [], 0
        return found


def _size(item: Item) -> int:
    return len(item.data) + ITEM_BYTES


def _name(table: str) -> tuple[str, str]:
    try:
        return split_name(table)
    except ValueError as error:
        raise UsageError(str(error), 'name tables as "schema.table" or "schema.*"') from None


def _checked(durable: str) -> str:
    if durable and not all(c.isascii() and (c.isalnum() or c in "-_") for c in durable):
        raise UsageError(f"a durable cannot be called {durable!r}", "use letters, digits, - and _")
    return durable
