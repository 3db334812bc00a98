"""`drop`: give the slot back, so that PostgreSQL can remove its WAL; on request the stream and the state as well."""

from __future__ import annotations

from bridge.config import Config
from bridge.source import connection, slot
from bridge.stream import claims, objects, server, subjects
from bridge.stream.server import ApiError
from bridge.stream.state import State


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
