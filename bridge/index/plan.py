"""What a rebuild would build, from where, and whether it may: asked before anything is made, and by `--dry-run`.

Nothing here changes anything.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from bridge import log
from bridge.errors import IndexMismatch, Unavailable, UsageError
from bridge.index import mapping
from bridge.index.design import design
from bridge.index.foreign import displaced, may_replace, may_take_from
from bridge.index.generation import Generation, IndexRecord, is_generations, number_of, origin, physical, shapes
from bridge.index.own import differing, own_mapping
from bridge.index.place import Place, Site, busy, connected, freshness
from bridge.index.sound import loadable, named_by_key, sound
from bridge.stream.definition import check_mode
from bridge.stream.lease import Lease, alive
from bridge.stream.reach import complete_from
from bridge.stream.reader import count
from bridge.stream.server import Servers, StreamState
from bridge.stream.state import State

# Told which tables, (schema, table) each, are not recorded yet; raises where waiting for one of them is in vain.
Awaited = Callable[[list[tuple[str, str]]], Awaitable[None]]


class Options(NamedTuple):
    """What was asked for on the command line.

    keep_old: keep the generation that was live.
    replace_index: an index that has the alias' name gives way to it.
    first: nobody asked by name; the index reader begins.
    mapping: a mapping file in place of the configured one.
    upto: build only what the log held at this sequence.
    awaited: says whether tables that are not recorded can be waited for; by default all can.
    """

    keep_old: bool = False
    replace_index: bool = False
    first: bool = False
    mapping: str = ""
    upto: int = 0
    awaited: Awaited | None = None


class Plan(NamedTuple):
    """What a rebuild would do.

    resumed: it would go on with a generation that was begun.
    events: how many it would read.
    holders: the indexes that the alias is on now, and `documents` what they show.
    former: the alias that the index had until now, where it is to have another.
    mapping, settings: how they differ from the live generation's, a line each.
    changed: keys of the configuration that differ from it.
    """

    name: str
    generation: Generation
    resumed: bool
    start: int
    events: int
    alias: str
    holders: list[str]
    documents: int | None
    former: str
    mapping: list[str]
    settings: list[str]
    changed: list[str]


@asynccontextmanager
async def looking(where: Site, servers: Servers) -> AsyncIterator[Place]:
    """An index's place, only to be looked at: without a lease, and without a bucket being made."""
    config = where.config
    async with connected(where, servers, "look") as (broker, engine):
        if await broker.stream(f"KV_{config.state.bucket}") is None:
            raise Unavailable(f"there is no KV bucket {config.state.bucket} yet", "start the bridge: `bridge run`")
        yield Place(where, broker, await State.open(broker, config.state.bucket, config.stream.replicas), engine)


async def plan(where: Site, servers: Servers, options: Options) -> Plan:
    """What a rebuild with these options would do now.

    Raises: what `options.awaited` does.
        Unavailable: what it would wait for. Every other error is the one with which it would be refused.
    """
    async with looking(where, servers) as place:
        # Of a generation that was begun nothing else is asked again.
        loadable(where.members)
        lease = await place.state.get(where.lease("reindex"), Lease)
        if lease is not None and alive(lease[0]):
            raise await busy(place.state, where)
        await still_to_come(place, options)
        stream, start = await whole_from(place, options.upto)
        documents = await target_is_free(place, options, stream)
        own = own_mapping(options.mapping or where.index.mapping)
        record = await place.record()
        begun = [g for g in record.having("switching", "building") if await resumed(place, g, stream, own)]
        generation = begun[0] if begun else await drafted(place, await next_number(place, record), own, stream, start)
        live = record.get(record.generation)
        return Plan(
            name=where.name,
            generation=generation,
            resumed=bool(begun),
            start=max(generation.seq + 1, start),
            events=await count_events(place, stream, generation.seq + 1, options.upto),
            alias=where.index.alias,
            holders=sorted(await place.engine.indexes(where.index.alias)),
            documents=documents,
            former=record.alias if live is not None and record.alias != where.index.alias else "",
            mapping=_differences(_fields(live.mapping), _fields(generation.mapping)) if live else [],
            settings=_differences(mapping.flat(live.settings), mapping.flat(generation.settings)) if live else [],
            changed=differing(where.index, record),
        )


async def still_to_come(place: Place, options: Options) -> None:
    """Let `options.awaited` say whether the tables that are not recorded can be waited for."""
    if options.awaited is None:
        return
    keys = [member.key for member in place.site.members]
    unrecorded = [key for key in keys if await place.table(*key) is None]
    if unrecorded:
        await options.awaited(unrecorded)


async def count_events(place: Place, stream: StreamState, start: int, upto: int) -> int:
    """The tables' events from a sequence on, up to another one where that is given."""
    subjects = sorted(place.site.subject(member) for member in place.site.members)
    found = await count(place.broker, stream.name, subjects, start)
    return found - await count(place.broker, stream.name, subjects, upto + 1) if upto else found


async def whole_from(place: Place, upto: int) -> tuple[StreamState, int]:
    """The stream, and the sequence from which on it holds every row of the tables.

    Raises:
        Gap: rows are not in the stream, or no longer. OtherStream: it is of the other mode.
        UsageError: at the sequence `upto` it did not hold them all yet, or is not there.
        ServerRefused: a table has no key. ConfigError: its ids do not tell its rows apart.
        Unavailable: something is still to come.
    """
    where = place.site
    stream = await place.broker.stream(where.config.stream.name)
    if stream is None:
        raise Unavailable(f"there is no stream {where.config.stream.name} yet", "waiting for the bridge to make it")
    check_mode(stream, where.config.stream)
    # What is gone from a compacted log's beginning has a later message.
    first = 0 if stream.compacted else stream.first_seq
    starts, whole = [], 0
    for member in where.members:
        named_by_key(member, await place.primary(*member.key))
        status = await place.snapshot(*member.key)
        starts.append(complete_from(status, first, stream.name, member.name))
        whole = max(whole, starts[-1], status.last_seq if status is not None else 0)
    if upto and not whole <= upto <= stream.last_seq:
        tables = ", ".join(member.name for member in where.members)
        raise UsageError(
            f"the log holds all of {tables} from sequence {whole:,} to {stream.last_seq:,}, but not at {upto:,}",
            "name a sequence or a time in between; `bridge replay --from SEQ --limit 1` shows an event",
        )
    return stream, min(starts)


async def target_is_free(place: Place, options: Options, stream: StreamState) -> int | None:
    """The documents that the alias shows now; None where there is no such alias.

    Raises:
        IndexMismatch: its name is an index's that may not give way, or a build that nobody has asked for by that name
            would take it from an index that is not its own.
    """
    site = place.site
    alias = site.index.alias
    holders = await place.engine.indexes(alias)
    if alias in holders:
        await may_replace(place)
        if not options.replace_index:
            remedy = f"let it be replaced at the switch: bridge reindex {site.name} --replace-index"
            raise IndexMismatch(
                f"the alias {alias} cannot be made: an index has that name",
                f"delete it (DELETE /{alias}), or name another sequence" if site.until else remedy,
            )
        return await place.engine.count(alias)
    if options.first or site.until:
        for holder in holders:
            await may_take_from(place, holder, stream.name, stream.created)
    return await place.engine.count(alias) if holders else None


def resumable(where: Site, begun: Generation, stream: StreamState, own: dict[str, Any] | None) -> bool:
    """Whether a generation was begun with today's configuration, and what is in it is not too old."""
    stale = stream.compacted and freshness(where, begun).lost
    return begun.origin == origin(where.index, own) and begun.stream_created == stream.created and not stale


async def resumed(place: Place, begun: Generation, stream: StreamState, own: dict[str, Any] | None) -> bool:
    """Whether a rebuild goes on with a generation that was begun: not where the stream has lost what it needs next."""
    gone = not stream.compacted and stream.first_seq > max(begun.seq + 1, begun.first)
    return resumable(place.site, begun, stream, own) and not gone and not await displaced(place, begun)


async def next_number(place: Place, record: IndexRecord) -> int:
    """A number that no generation and no index has, and whose names no alias has either."""
    name = place.site.name
    made = await place.engine.indexes(f"{name}-*")
    taken = made.keys() | {alias for aliases in made.values() for alias in aliases}
    number = max([0, *(g.number for g in record.generations), *(number_of(name, index) for index in made)]) + 1
    while any(is_generations(one, name, number) for one in taken):
        number += 1
    return number


async def drafted(place: Place, number: int, own: dict[str, Any] | None, stream: StreamState, start: int) -> Generation:
    """A generation as it is begun with today's configuration and columns, and the user's own mapping where given.

    Raises:
        ConfigError: it cannot be had so.
    """
    index = place.site.index
    tables = await place.tables(place.site.members)
    designed = await design(place.engine, index, own, physical(place.site.name, number))
    properties = sound(place.site, tables, own, designed.choices)
    for warning in designed.warnings:
        log.get().warning("mapping", index=place.site.name, what=warning)
    meta = {
        "source": place.site.config.source.name,
        "stream": stream.name,
        "stream_created": stream.created,
        "index": place.site.name,
        "generation": number,
    }
    wholes = {
        f"{member.schema}.{member.table}": complete_from(
            await place.snapshot(*member.key), 0 if stream.compacted else stream.first_seq, stream.name, member.name
        )
        for member in place.site.members
    }
    named = physical(place.site.name, number)
    writers = await place.writers()
    return Generation(
        number=number,
        physical=named,
        consumer=named,
        state="building",
        shapes=shapes(index),
        settings=designed.settings,
        mapping=designed.mapping(properties, meta),
        choices=designed.choices,
        types={name: {column.name: column.type for column in known.plain} for name, known in tables.items()},
        origin=origin(index, own),
        stream=stream.name,
        stream_created=stream.created,
        first=start,
        wholes=wholes,
        seq=start - 1,
        epoch=max((w.epoch for w in writers if w.first_seq < start), default=0),
        fresh=time.time(),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _fields(of: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a mapping by their dotted names, each with its own parameters."""
    found: dict[str, Any] = {}
    for kind in ("properties", "fields"):
        for name, field in of.get(kind, {}).items():
            if f"{prefix}{name}" != mapping.HIDDEN:
                found[f"{prefix}{name}"] = {k: v for k, v in field.items() if k not in ("properties", "fields")}
                found |= _fields(field, f"{prefix}{name}.")
    return found


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {_shown(before.get(name))} → {_shown(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if not isinstance(value, dict):
        return str(value)
    more = [f"{name} {given}" for name, given in value.items() if name != "type"]
    return ", ".join([str(value.get("type", "object")), *more])
