"""`drop`: give the slot back, so that PostgreSQL can remove its WAL; on request the stream and the state as well."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from bridge import console, errors
from bridge.config import Config
from bridge.errors import Unavailable
from bridge.operate.status import database
from bridge.source import connection, slot
from bridge.stream import claims, objects, server, subjects
from bridge.stream.lease import Lease, alive, lease_key, whose
from bridge.stream.server import ApiError
from bridge.stream.state import State

Nats = Callable[[Config], AbstractAsyncContextManager[server.Servers]]


class Asked(NamedTuple):
    """The command line: what goes besides the slot, and whether nobody need be asked."""

    stream: bool = False
    state: bool = False
    yes: bool = False


def command(settings: Config, asked: Asked, running: server.Servers | None, nats: Nats) -> int:
    """Do what was asked for; the exit code.

    Args:
        running: the NATS servers that are there before anything is started; None: there are none.
        nats: the servers to connect to, started where need be.

    Raises:
        UsageError: nobody can be asked. ...: what `unused`, `slot_of`, `stream_of` and `state_of` raise.
    """
    doomed = [f"slot {settings.source.slot}"]
    if asked.stream:
        doomed.append(f"stream {settings.stream.name} with all its messages")
    if asked.state:
        doomed.append(f"checkpoint and tables of source {settings.source.name} in bucket {settings.state.bucket}")
    more = asked.stream or asked.state

    async def look() -> None:
        await unused(settings, running if more else None)

    if not asked.yes:
        console.can_agree(doomed)
        code = console.once(look)
        if code:
            return code
        if not console.agreed(doomed):
            sys.stdout.write("nothing was dropped\n")
            return errors.EXIT_DONE

    async def work() -> None:
        # The slot last: while it is there, whatever else fails can be done again.
        async with contextlib.AsyncExitStack() as stack:
            servers = await stack.enter_async_context(nats(settings)) if more else None
            # Again: a bridge may have been started while the question stood.
            await unused(settings, servers)
            if servers is not None and asked.stream:
                console.told(await stream_of(settings, servers))
            if servers is not None and asked.state:
                console.told(await state_of(settings, servers))
            console.told(await slot_of(settings))

    return console.once(work)


async def unused(config: Config, servers: server.Servers | None) -> None:
    """Return where nobody works with the slot and, as far as it is asked about, with the stream.

    Args:
        servers: NATS, where something of it is to be deleted: a bridge that waits for PostgreSQL has no more than its
            lease there. None: it is not asked.

    Raises:
        Unavailable: a bridge runs; or a server is away, so that nobody can tell.
    """
    async with database.opened(config) as ask:
        found = await ask()
    if found.active or found.lock_pid:
        raise Unavailable(f"the slot {config.source.slot} is in use: a bridge works with it", "stop that bridge first")
    if servers is None:
        return
    async with server.connect(config.stream, servers, name="bridge drop") as broker:
        if await broker.stream(f"KV_{config.state.bucket}") is None:
            return
        state = await State.open(broker, config.state.bucket, config.stream.replicas)
        lease = await state.get(lease_key("bridge", config.source.name), Lease)
    if lease is not None and alive(lease[0]):
        what = f"the stream {config.stream.name} is in use: {whose(lease[0])} is a bridge that runs"
        raise Unavailable(what, "stop that bridge first")


async def slot_of(config: Config) -> str:
    """Drop the slot; a line that says what was done.

    Raises:
        Unavailable: a bridge still reads from it, or PostgreSQL is away.
    """
    name = config.source.slot
    async with connection.connect(config.source.dsn) as sql:
        done = await slot.drop(sql, name)
    return f"slot {name}: dropped" if done else f"slot {name}: there was none"


async def stream_of(config: Config, servers: server.Servers) -> str:
    """Delete the stream with all its messages, large rows and consumers; a line that says what was done."""
    name = config.stream.name
    async with server.connect(config.stream, servers, name="bridge drop") as broker:
        found = await broker.stream(name)
        for doomed in (name, objects.stream_of(claims.bucket_of(name))):
            try:
                await broker.api(f"STREAM.DELETE.{doomed}", seconds=30)
            except ApiError as error:
                if error.code != server.NOT_FOUND_STREAM:
                    raise
        if found is None:
            return f"stream {name}: there was none"
        return f"stream {name}: deleted with {found.messages:,} messages"


async def state_of(config: Config, servers: server.Servers) -> str:
    """Delete the source's keys in the state bucket; a line that says what was done."""
    source = subjects.token(config.source.name)
    mine = [subjects.checkpoint_key(config.source.name), subjects.epochs_key(config.source.name)]
    async with server.connect(config.stream, servers, name="bridge drop") as broker:
        if await broker.stream(f"KV_{config.state.bucket}") is None:
            return f"state {config.state.bucket}: there was none"
        state = await State.open(broker, config.state.bucket, config.stream.replicas)
        gone = {key for key in mine if await state.delete(key)}
        # A listing is no proof that there is nothing else: the keys that are known are deleted by name, and it is asked
        # again until it has none.
        kinds = tuple(f"{kind}.{source}." for kind in ("snapshot", "table", "shape"))
        while found := [k for k in await state.keys("") if k.startswith(kinds)]:
            gone |= {key for key in found if await state.delete(key)}
    if not gone:
        return f"state {config.state.bucket}: there was nothing of source {config.source.name}"
    return f"state {config.state.bucket}: {len(gone)} keys of source {config.source.name} deleted"
