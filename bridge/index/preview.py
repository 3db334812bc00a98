"""`bridge index NAME --show-mapping`: what a rebuild would make now, without making anything.

Asks NATS for the table's columns and the engine for its kind and templates, and waits for neither.
"""

from __future__ import annotations

from typing import Any

import anyio
import msgspec

from bridge.config import Config
from bridge.errors import BridgeError, ServerMissing, ServerRefused, Unavailable
from bridge.index.design import Design, design
from bridge.index.engine import Engine, opened
from bridge.index.generation import physical
from bridge.index.own import own_mapping
from bridge.index.place import Site, site
from bridge.index.sound import sound
from bridge.stream.server import Servers, connect
from bridge.stream.state import State, TableRecord
from bridge.stream.subjects import table_key

WITHIN = 5.0


class Preview(msgspec.Struct, frozen=True):
    """The body that would make the index of that `engine`, and what was asked for and cannot be had."""

    engine: str
    body: dict[str, Any]
    warnings: list[str]

    @property
    def text(self) -> str:
        """The body as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self.body), indent=2).decode()


async def preview(config: Config, name: str, servers: Servers) -> Preview:
    """What a rebuild of an index would make now.

    Raises:
        ConfigError: no such index, or one that cannot be had as it is configured.
        ServerRefused: the table is not recorded, or a server refuses; ServerMissing: NATS or the engine is away.
    """
    where = site(config, name)
    own = own_mapping(where.index.mapping)
    tables = await _tables(where, servers)
    designed = await _designed(where, own)
    properties = sound(where, tables, own, designed.choices)
    meta = {"source": config.source.name, "stream": config.stream.name, "index": name}
    return Preview(str(designed.choices.product), designed.body(properties, meta), designed.warnings)


async def _tables(where: Site, servers: Servers) -> dict[str, TableRecord]:
    bucket, found = where.config.state.bucket, dict[str, TableRecord]()
    try:
        with anyio.fail_after(WITHIN):
            async with connect(where.config.stream, servers, name=f"bridge mapping {where.name}") as broker:
                # Opening the bucket would make it.
                state = await State.open(broker, bucket) if await broker.stream(f"KV_{bucket}") is not None else None
                for member in where.members if state is not None else []:
                    key = table_key(where.config.source.name, member.schema, member.table)
                    record = await state.get(key, TableRecord) if state is not None else None
                    if record is not None:
                        found[member.name] = record[0]
    except (Unavailable, TimeoutError) as error:
        raise _away("NATS", error) from None
    missing = [member.name for member in where.members if member.name not in found]
    if missing:
        raise ServerRefused(
            f"the table {missing[0]} is not recorded in the bucket {bucket}, so its columns are not known",
            "run the bridge with that table among [source] tables",
        )
    return found


async def _designed(where: Site, own: dict[str, Any] | None) -> Design:
    try:
        with anyio.fail_after(WITHIN):
            async with opened(where.index) as engine:
                # The first thing that is asked must not be waited for: it says whether the engine is there.
                await engine.ask("GET", "/_cluster/health?timeout=1s")
                numbers = await _numbers(engine, where.name)
                return await design(engine, where.index, own, physical(where.name, max(numbers, default=0) + 1))
    except (Unavailable, TimeoutError) as error:
        raise _away("the search engine", error) from None


async def _numbers(engine: Engine, name: str) -> list[int]:
    made = await engine.indexes(f"{name}-*")
    tails = [index.removeprefix(f"{name}-") for index in made]
    return [int(tail) for tail in tails if tail.isdigit()]


def _away(what: str, error: Exception) -> BridgeError:
    why = error.what if isinstance(error, BridgeError) else f"no answer within {WITHIN:g} s"
    return ServerMissing(f"{what} cannot be asked: {why}", "start it, or correct the configuration")
