"""`bridge check`: everything that keeps the bridge from its work, or will one day, at once and with its remedy.

All servers are asked at the same time, each part within `WITHIN` seconds. What is away is one finding; the rest is
looked at all the same. Nothing is changed anywhere: wal2json is tried on a temporary slot that is gone at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio

from bridge import embedded, structured
from bridge.config import Config, hide
from bridge.errors import BridgeError, Unavailable
from bridge.index.own import differing
from bridge.operate.checks import ask_jetstream, ask_postgres, clocks, jetstream, local, postgres, tables
from bridge.operate.checks.finding import Checked, Finding, sorted_by_level, well, wrong
from bridge.operate.checks.postgres import Plugin
from bridge.source import slot
from bridge.source.connection import POOLER
from bridge.stream.server import Servers

if TYPE_CHECKING:
    from bridge.operate.checks import ask_engines

T = TypeVar("T")

WITHIN = 15.0
# With these no slot can be made at all: what trying the plugin says is the same once more.
_SAME = {"recovery", "wal_level", "role", "plugin_libraries"}
_AWAY = {
    "postgres": "start PostgreSQL, or correct host and port in [source] dsn",
    "jetstream": "start nats-server, or correct [stream] servers",
    "engine": "start it, or correct `url` of the index",
}


async def check(config: Config, servers: Servers, *, thorough: bool = True) -> Checked:
    """Look at everything.

    Args:
        thorough: also try wal2json, and ask the search engines; else only what costs the servers next to nothing.
    """
    found: list[Finding] = local.store(config.stream)
    log: list[ask_jetstream.Answer] = []
    sites: dict[str, ask_engines.Answer] = {}

    async def database() -> None:
        answer = await _asked("postgres", "PostgreSQL", lambda: ask_postgres.ask(config), found)
        if answer is None:
            return
        plugin = await ask_postgres.try_plugin(config) if thorough and not _hopeless(answer) else Plugin()
        found.extend(_of_database(config, answer, plugin, thorough=thorough))

    async def stream() -> None:
        if config.stream.embedded and embedded.find(Path(config.stream.store_dir)) is None:
            what = "the embedded nats-server runs when the bridge does: it was not asked"
            found.append(well("jetstream.reachable", config.stream.store_dir, what))
            return
        answer = await _asked("jetstream", "NATS", lambda: ask_jetstream.ask(config, servers), found)
        if answer is not None:
            log.append(answer)
            found.extend(jetstream.judge(config, answer.broker))
            found.extend([clocks.judge("nats", answer.broker.where, answer.clock)] if answer.clock is not None else [])

    async def engine(name: str) -> None:
        # What speaks to engines is large, and a running bridge has no need of it.
        from bridge.operate.checks import ask_engines

        index = config.index[name]
        about = f"{name} at {', '.join(hide(url) for url in index.url)}"
        answer = await _asked("engine", about, lambda: ask_engines.ask(name, index), found)
        if answer is not None:
            sites[name] = answer

    async with structured.group() as tasks:
        tasks.start_soon(database)
        tasks.start_soon(stream)
        for name in config.index if thorough else ():
            tasks.start_soon(engine, name)
    if sites:
        found += _of_engines(config, sites, log[0] if log else None, found)
    return Checked(sorted_by_level(found))


async def _asked(kind: str, about: str, ask: Callable[[], Awaitable[T]], found: list[Finding]) -> T | None:
    """What was answered; where that is nothing, a finding says why."""
    id = f"{kind}.reachable"
    try:
        with anyio.fail_after(WITHIN):
            return await ask()
    except Unavailable as error:
        found.append(wrong(id, about, error.what, _AWAY[kind]))
    except BridgeError as error:
        found.append(wrong("postgres.proxy" if POOLER in error.what else id, about, error.what, error.remedy))
    except TimeoutError:
        found.append(wrong(id, about, f"no answer within {WITHIN:g} s", _AWAY[kind]))
    return None


def _hopeless(answer: ask_postgres.Answer) -> bool:
    """Whether no slot can be made, for a reason that is a finding already."""
    database = answer.database
    full = database.slots_used >= database.slots or database.senders_used >= database.senders
    return full or any(one.kind in _SAME for one in slot.refusals(database.server))


def _of_database(config: Config, answer: ask_postgres.Answer, plugin: Plugin, *, thorough: bool) -> list[Finding]:
    database = answer.database
    found = [well("postgres.reachable", database.server.database, f"as {database.server.role}")]
    found += postgres.judge(database, config.source.slot, datetime.now(UTC).date(), failover=config.source.failover)
    if thorough and not any(one.kind in _SAME for one in slot.refusals(database.server)):
        if _hopeless(answer):
            plugin = Plugin(why="every replication slot or WAL sender is in use")
        found += postgres.judge_plugin(plugin, database.server.database, database.server.role)
    found += tables.judge(config, answer.tables, database.server.role, exact=plugin.exact)
    return [*found, clocks.judge("postgres", database.server.database, answer.clock)]


def _of_engines(
    config: Config, sites: dict[str, ask_engines.Answer], log: ask_jetstream.Answer | None, before: list[Finding]
) -> list[Finding]:
    """What counts for the indexes; `before`: what was found of everything else."""
    from bridge.operate.checks import ask_engines, engines

    found: list[Finding] = []
    stuck = {one.about for one in before if one.id == "tables.index"}
    for name, answer in sites.items():
        index = config.index[name]
        record = log.records.get(name) if log is not None else None
        about = engines.judge_engine(answer.engine)
        about += [clocks.judge("engine", answer.engine.where, answer.clock)] if answer.clock is not None else []
        # Several indexes may be on one engine.
        found += [one for one in about if one not in found]
        changed = differing(index, record) if record is not None else []
        transform = ask_engines.transform_of(config, name)
        stream = log.broker.stream if log is not None else None
        found += engines.judge_index(
            name, index, answer.state, record, changed, transform,
            source=config.source.name, created=stream["created"] if stream else "", buildable=name not in stuck,
        )  # fmt: skip
    return found
