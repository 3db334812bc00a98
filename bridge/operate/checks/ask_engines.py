"""Asks the search engines what `bridge check` wants to know. Everything is asked once: nothing waits for an engine."""

from __future__ import annotations

import time
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from bridge.config import Config, Index
from bridge.errors import ConfigError, ServerRefused
from bridge.index import dialect
from bridge.index.document import load
from bridge.index.engine import Engine, EngineError, opened
from bridge.index.foreign import made
from bridge.index.naming import UNREADABLE
from bridge.operate.checks import engines
from bridge.operate.checks.clocks import Reading, read_at
from bridge.operate.checks.engines import Disk, State

SECONDS = 5.0
NEEDED = ["read", "write", "manage"]

_by_index = msgspec.json.Decoder(dict[str, dict[str, Any]])


class Answer(NamedTuple):
    """All that the engine of one index has said."""

    engine: engines.Engine
    state: State
    clock: Reading | None


async def ask(name: str, index: Index) -> Answer:
    """What the engine of one index says.

    Raises:
        Unavailable: it is away. ServerRefused: TLS or the login, or what answers is no engine all along.
    """
    async with opened(index) as engine:
        # The cheapest request that every login may make tells an engine that is away from one that refuses this role.
        await _reached(engine)
        product = dialect.recognized(await _told(engine, "/"), await _told(engine, "/_nodes/_local"))
        began = time.time()
        clock = _clock(began, await _told(engine, "/_cat/health?format=json"), time.time())
        if not product.distribution and clock is None:
            await _doubted(engine, name)
        disks = await _told(engine, "/_cat/allocation?format=json")
        return Answer(
            engines.Engine(where=engine.where, product=product, disks=_disks(disks)),
            await _state(engine, name, index, product),
            clock,
        )


async def _reached(engine: Engine) -> None:
    try:
        await engine.ask("GET", "/", seconds=SECONDS)
    except EngineError:
        return  # an engine all the same: some builds have nothing there
    except ServerRefused as error:
        # 403: the role may not ask what it is, and may do the rest. 401 is a wrong login.
        if " with 403" not in error.what:
            raise


async def _doubted(engine: Engine, name: str) -> None:
    """Return where what has told nothing of itself answers as an engine does: a role may be refused all but indexes.

    Raises:
        ServerRefused: it is something else that speaks HTTP.
    """
    try:
        _by_index.decode(await engine.ask("GET", f"/{quote(name)}-*/_alias", seconds=SECONDS))
        return
    except ServerRefused:
        return  # what the role may not is another finding
    except EngineError as error:
        if error.kind:
            return
    except UNREADABLE:
        pass
    raise ServerRefused("what answers there is no Elasticsearch or OpenSearch", "correct `url` of the index")


async def _told(engine: Engine, path: str, method: str = "GET", body: Any = None) -> Any:
    """The decoded answer to a question that some engines and roles refuse; empty there."""
    try:
        return msgspec.json.decode(await engine.ask(method, path, body, seconds=SECONDS))
    except (EngineError, ServerRefused, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def _disks(answer: Any) -> list[Disk]:
    found = answer if isinstance(answer, list) else []
    return [
        Disk(str(one.get("node")), int(one["disk.percent"])) for one in found if str(one.get("disk.percent")).isdigit()
    ]


def _clock(began: float, answer: Any, ended: float) -> Reading | None:
    """The engine's clock, which it tells in whole seconds."""
    try:
        return read_at(began, float(answer[0]["epoch"]), ended, coarse=1.0)
    except (KeyError, IndexError, TypeError, ValueError):
        return None


async def _state(engine: Engine, name: str, index: Index, product: dialect.Product) -> State:
    denied: list[str] = []

    async def ask(path: str) -> Any:
        try:
            return _by_index.decode(await engine.ask("GET", path, seconds=SECONDS))
        except UNREADABLE:
            what = f"the answer to GET {path.split('?')[0]} is cut off or not an engine's"
            raise ServerRefused(what, "correct `url` of the index, or look at the proxy on the way") from None
        except ServerRefused:
            denied.append(f"GET {path.split('?')[0]}")
        except EngineError as error:
            if error.status != 404:
                raise
        return {}

    every = f"{quote(name)}-*"
    aliases = {**await ask(f"/{every}/_alias"), **await ask(f"/{quote(index.alias)}/_alias")}
    settings = await ask(f"/{every}/_settings?flat_settings=true")
    mappings = await ask(f"/{every}/_mapping")
    health = await _told(engine, f"/_cluster/health/{every}?level=indices")
    return State(
        denied=denied,
        lacking=await _lacking(engine, name, index, product),
        aliases={one: list(found.get("aliases", {})) for one, found in aliases.items()},
        settings={one: found.get("settings", {}) for one, found in settings.items()},
        health={one: found.get("status", "") for one, found in (health or {}).get("indices", {}).items()},
        builders=_builders(mappings),
    )


def _builders(mappings: dict[str, Any]) -> dict[str, str]:
    """The source of the bridge that has made an index, of each that one has."""
    metas = {one: found.get("mappings", {}).get("_meta", {}) for one, found in mappings.items()}
    return {one: str(meta["source"]) for one, meta in metas.items() if made(meta)}


async def _lacking(engine: Engine, name: str, index: Index, product: dialect.Product) -> list[str]:
    """What Elasticsearch's own security says that the role lacks; nothing where there is no such security."""
    if product.distribution != dialect.ELASTICSEARCH:
        return []
    body = {"index": [{"names": [f"{name}-*", index.alias], "privileges": NEEDED}]}
    answer = await _told(engine, "/_security/user/_has_privileges", "POST", body)
    found = answer.get("index", {}) if isinstance(answer, dict) else {}
    return [f"{privilege} on {one}" for one, given in found.items() for privilege, has in given.items() if has is False]


def transform_of(config: Config, name: str) -> str:
    """What is wrong with the transforms of an index; empty where nothing is."""
    index = config.index[name]
    wrong = []
    for one in dict.fromkeys([index.transform, *(index.part(table).transform for table in index.holds)]):
        try:
            if one:
                load(one)
        except ConfigError as error:
            wrong.append(error.what)
    return "; ".join(wrong)
