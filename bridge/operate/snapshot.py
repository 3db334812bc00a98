"""`bridge snapshot`: ask for tables to be read while the stream flows, and see how far that is.

Everything goes by way of the state bucket: the bridge takes it up where it runs, or as soon as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import anyio

from bridge import log
from bridge.config import Config, join_name, split_name
from bridge.errors import BridgeError, ServerRefused, UsageError
from bridge.operate.checks.tables import near
from bridge.source import chunks, connection
from bridge.source.catalog import Catalog, Filter
from bridge.stream import asking, server
from bridge.stream.asking import Root
from bridge.stream.lease import Lease, alive, lease_key
from bridge.stream.server import Servers
from bridge.stream.state import SnapshotStatus, State
from bridge.stream.trim import Trimmed, trim, trimmable

Action = Literal["ask", "pause", "resume", "cancel", "status"]
LOOK_EVERY = 0.5
ANSWER_WITHIN = 15.0
LISTED = 30


class Asked(NamedTuple):
    """What was asked for: tables by name or pattern (none: all), what to do with them, which of their rows; trim: the
    log is to be trimmed then."""

    tables: Sequence[str] = ()
    action: Action = "ask"
    where: str = ""
    trim: bool = False


class Told(NamedTuple):
    """What became of it, by table; `running` whether a bridge is there to do it; `idle` lists the tables that nobody
    has asked for, where a reading was to be paused, resumed or cancelled."""

    tables: dict[Root, SnapshotStatus]
    running: bool
    idle: list[Root]


async def snapshot(config: Config, servers: Servers, asked: Asked) -> Told:
    """Do what was asked for.

    Raises:
        UsageError: no such table, or a part is asked for of one that is being read as a whole.
        ServerRefused: there is no state bucket yet, or one that is named has no key; to trim: no bridge is running, or
            the log is compacted.
        Unavailable: NATS is away.
    """
    async with server.connect(config.stream, servers, name="bridge snapshot") as broker:
        state, source = await _state(config, broker), config.source.name
        running = await _runs(state, source)
        if asked.trim:
            await trimmable(broker, config.stream.name)
            if not running:
                raise ServerRefused(
                    "no bridge is running that would read the tables", "start it (`bridge run`), and trim then"
                )
        known = await asking.tables(state, source)
        published = Filter(config.source.tables)
        if asked.action == "ask":
            known = {root: status for root, status in known.items() if published.matches(*root)}
        # They are looked for by name alone, and there may be many.
        partitions = await asking.partitions(state, source) if asked.tables else {}
        chosen = chosen_of(known, asked.tables, partitions)
        if asked.where:
            refuse_part({root: known[root] for root in chosen})
        if asked.action == "ask":
            await _refuse_keyless(config, Filter(list(asked.tables)).literal)
        idle = [root for root in chosen if not await _done(state, source, root, asked)]
        now = await asking.tables(state, source)
        return Told({root: now[root] for root in chosen if root in now}, running, idle)


async def _done(state: State, source: str, root: Root, asked: Asked) -> bool:
    """Whether there was something of a table to do it to."""
    match asked.action:
        case "ask":
            await asking.ask(state, source, root, where=asked.where)
        case "pause":
            return await asking.pause(state, source, root)
        case "resume":
            return await asking.resume(state, source, root)
        case "cancel":
            return await asking.cancel(state, source, root)
    return True


async def follow(
    config: Config, servers: Servers, tables: Sequence[Root], show: Callable[[dict[Root, SnapshotStatus]], None]
) -> dict[Root, SnapshotStatus]:
    """Return once nothing is under way for these tables any more: all done, failed or paused. Where no bridge is there
    to do it, that is said, and one waited for."""
    async with server.connect(config.stream, servers, name="bridge snapshot") as broker:
        state, running = await _state(config, broker), True
        while True:
            known = await asking.tables(state, config.source.name)
            found = {root: known[root] for root in tables if root in known}
            show(found)
            if not any(status.again is not None and status.again.under_way for status in found.values()):
                return found
            running, before = await _runs(state, config.source.name), running
            if before and not running:
                log.get().warning("waiting", why="no bridge is running", next="bridge run")
            with anyio.move_on_after(LOOK_EVERY):
                await broker.watch()


async def trimmed(config: Config, servers: Servers, *, force: bool) -> Trimmed:
    """Remove what the log has from before its complete pictures; raises what `trim` does. A table that was dropped has
    no picture to keep: one that is there under its name again is read anew."""
    async with (
        server.connect(config.stream, servers, name="bridge snapshot") as broker,
        connection.connect(config.source.dsn) as sql,
    ):
        known = await asking.tables(await _state(config, broker), config.source.name)
        published = Filter(config.source.tables)
        there = {one.root for one in await Catalog(sql, config.source).all()}
        kept = {root: status for root, status in known.items() if root in there and published.matches(*root)}
        return await trim(broker, config.stream.name, kept, force=force)


async def _runs(state: State, source: str) -> bool:
    lease = await state.get(lease_key("bridge", source), Lease)
    return lease is not None and alive(lease[0])


async def _state(config: Config, broker: server.Broker) -> State:
    bucket = config.state.bucket
    if await broker.stream(f"KV_{bucket}") is None:
        raise ServerRefused(
            f"there is no KV bucket {bucket}: no bridge has run yet",
            "start it: `bridge run` reads every table by itself at its first start",
        )
    return await State.open(broker, bucket, config.stream.replicas)


async def _refuse_keyless(config: Config, named: Sequence[Root]) -> None:
    """Raise ServerRefused where one of the tables has no key, as far as PostgreSQL can be asked: the bridge would only
    say so later. A pattern may choose some that have none."""
    if not named:
        return
    try:
        with anyio.fail_after(ANSWER_WITHIN):
            async with connection.connect(config.source.dsn) as sql:
                parts = await Catalog(sql, config.source).all()
    except (BridgeError, TimeoutError):
        return
    for part in parts:
        if part.kind == "r" and part.root in named:
            chunks.refuse_keyless(join_name(*part.root), part.key)


def refuse_part(tables: dict[Root, SnapshotStatus]) -> None:
    """Raise UsageError where one of the tables is being read as a whole: a part would take that one's place."""
    whole = [
        join_name(*root)
        for root, status in tables.items()
        if status.again is not None and not status.again.where and status.again.state != "failed"
    ]
    if whole:
        raise UsageError(
            f"{', '.join(whole)}: being read as a whole, which --where would end",
            "let it come to its end, or --cancel it first",
        )


def chosen_of(known: Collection[Root], names: Sequence[str], partitions: Mapping[str, Root]) -> list[Root]:
    """The tables that names and patterns choose; partitions, by their names, are read with the tables they belong to.

    Raises:
        UsageError: one of them chooses none.
    """
    chosen: dict[Root, None] = {}
    for name in names or ["*.*"]:
        try:
            called = ".".join(split_name(name))
        except ValueError as error:
            raise UsageError(str(error), "write schema.table, or a pattern such as public.*") from None
        found = [root for root in known if Filter([name]).matches(*root)]
        if not found and called in partitions:
            whole = join_name(*partitions[called])
            raise UsageError(f"{name} is a partition of {whole}, and is read and compared with it", f"name {whole}")
        if not found:
            listed = sorted(join_name(*root) for root in known)
            literal = bool(Filter([name]).literal)
            like = near(split_name(name), known) if literal else None
            raise UsageError(
                f"no published table {'is called' if literal else 'matches'} {name}",
                f"{f'did you mean {join_name(*like)}? ' if like else ''}the bridge knows: "
                f"{', '.join(listed[:LISTED]) or 'none'}; [source] tables says what is published",
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)
