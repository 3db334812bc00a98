"""`reindex NAME --until TIME|SEQ`: the index as it was at a point of the log, under an alias of its own.

It is an index of its own beside the live one, `NAME-until-SEQ`, with its own record, lease and consumer: neither the
live index nor its reader sees any of it. It is built as a rebuild builds, up to that sequence, and resumed like one;
once it is there nothing feeds it, and its consumer goes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from bridge.config import Config, past_name
from bridge.errors import UsageError
from bridge.index import plan
from bridge.index.engine import Engine
from bridge.index.generation import Generation
from bridge.index.own import own_mapping
from bridge.index.place import Place, Site, site, working
from bridge.index.plan import Options, Plan, looking
from bridge.index.rebuild import Progress, Summary, build
from bridge.index.switch import forget_retired
from bridge.stream.lease import Holder
from bridge.stream.reader import existing, last_at
from bridge.stream.server import Servers
from bridge.waiting import Backoff, forever


class There(NamedTuple):
    """An index of that point that had been built before."""

    alias: str
    physical: str
    documents: int


async def build_until(
    config: Config,
    name: str,
    servers: Servers,
    point: int | datetime,
    *,
    mapping: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
    awaited: plan.Awaited | None = None,
) -> Summary | There:
    """Build an index of what the log held at a point, unless it is there with today's configuration.

    Args:
        point: a sequence, or a time: everything that the stream had stored by then.
        mapping: a mapping file in place of the configured one.
        awaited: as of a rebuild.

    Raises:
        UsageError: the log is compacted, or does not hold the whole table at that point.
        ...: what a rebuild raises.
    """
    where, upto = await forever(f"reindex {name} --until", lambda b: _at(config, name, servers, point, b))
    options = Options(mapping=mapping, upto=upto, awaited=awaited)
    there = await _there(where, servers, options)
    if there is not None:
        return there
    summary = await build(where, servers, options, progress)
    await _there(where, servers, options)
    return summary


async def plan_until(
    config: Config,
    name: str,
    servers: Servers,
    point: int | datetime,
    *,
    mapping: str = "",
    awaited: plan.Awaited | None = None,
) -> Plan | There:
    """What `build_until` would do."""
    where, upto = await _at(config, name, servers, point)
    options = Options(mapping=mapping, upto=upto, awaited=awaited)
    async with looking(where, servers) as place:
        found = await _found(place, options)
        if found is not None:
            return There(where.index.alias, found.physical, await place.engine.count(where.index.alias))
    return await plan.plan(where, servers, options)


async def drop_until(config: Config, name: str, servers: Servers, point: int | datetime) -> list[str]:
    """Delete the index of a point, and everything that is remembered of it; the physical names."""
    where, _ = await forever(f"reindex {name} --until", lambda b: _at(config, name, servers, point, b))
    holder = Holder()

    async def attempt(backoff: Backoff) -> list[str]:
        async with working(where, servers, "reindex", holder, patient=False) as place:
            backoff.over()
            doomed = (await place.record()).generations
            retired = [msgspec.structs.replace(generation, state="retired") for generation in doomed]
            await place.change(lambda record: record.of(retired))
            await forget_retired(place)
            await place.state.delete(where.key)
            return [generation.physical for generation in doomed]

    return await forever(f"reindex {where.named} --drop-old", attempt)


async def _at(
    config: Config, name: str, servers: Servers, point: int | datetime, backoff: Backoff | None = None
) -> tuple[Site, int]:
    """The site of the index of a point, and the point's sequence."""
    live = site(config, name)
    if config.stream.compact:
        raise UsageError(
            f"the log {config.stream.name} is compacted: it keeps only the last event of each row, and has no past",
            f'--until needs a log with [stream] mode = "log"; the present: bridge reindex {name}',
        )
    if isinstance(point, datetime) and point > datetime.now(UTC):
        raise UsageError(f"{point.isoformat()} is still to come", f"the index as it is now: bridge reindex {name}")
    async with looking(live, servers) as place:
        if backoff is not None:
            backoff.over()
        stream = await existing(place.broker, config.stream.name)
        upto = point if isinstance(point, int) else await last_at(place.broker, stream, point)
    if not upto:
        raise UsageError(
            f"the log {stream.name} had stored nothing by {point}", "name a later time; `bridge status` shows its reach"
        )
    called = past_name(name, upto)
    index = msgspec.structs.replace(live.index, alias=called)
    return msgspec.structs.replace(live, name=called, index=index, until=upto), upto


async def _there(where: Site, servers: Servers, options: Options) -> There | None:
    """The index, if it is there as it should be; its consumer, which has nothing more to read, goes."""

    async def attempt(backoff: Backoff) -> There | None:
        async with looking(where, servers) as place:
            backoff.over()
            found = await _found(place, options)
            if found is None:
                return None
            await place.remove_consumer(found)
            return There(where.index.alias, found.physical, await place.engine.count(where.index.alias))

    return await forever(f"reindex {where.named}", attempt)


async def _found(place: Place, options: Options) -> Generation | None:
    stream = await existing(place.broker, place.site.config.stream.name)
    record = await place.record()
    live = record.get(record.generation)
    own = own_mapping(options.mapping or place.site.index.mapping)
    if live is None or not plan.resumable(place.site, live, stream, own):
        return None
    return live if await _is_on(place.engine, place.site.index.alias, live.physical) else None


async def _is_on(engine: Engine, alias: str, physical: str) -> bool:
    return physical in await engine.indexes(alias)
