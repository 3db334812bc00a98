"""What a search engine, its disks, and an index with its alias mean for the reader that feeds it. Pure.

Source: Elasticsearch and OpenSearch REST APIs: `_cluster/health`, `_alias`, `_settings`, `_cat/allocation`,
Elasticsearch's `_security/user/_has_privileges`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.config import Index, hide
from bridge.index.dialect import ELASTICSEARCH, OPENSEARCH, Product
from bridge.index.generation import Generation, IndexRecord, number_of
from bridge.index.reason import lifts
from bridge.operate.checks.finding import Finding, warning, well, wrong

OLDEST = {ELASTICSEARCH: (7, 0), OPENSEARCH: (1, 0)}
TRIED = {ELASTICSEARCH: (8, 19), OPENSEARCH: (2, 19)}
LOW, HIGH = 85, 95


class Disk(msgspec.Struct, frozen=True):
    """A node's disk: how much of it is in use, in percent."""

    node: str
    percent: int


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine says of itself; disks is empty where it, or the role, does not tell."""

    where: str
    product: Product
    disks: list[Disk] = []


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine says of one index.

    denied: requests that the role may not make; lacking: privileges as Elasticsearch names them; aliases: of each
    index that is or holds the alias or is one of its generations; settings: flat, by index; health: by index; builders:
    of each index that a bridge has made, that bridge's source.
    """

    denied: list[str] = []
    lacking: list[str] = []
    aliases: dict[str, list[str]] = {}
    settings: dict[str, dict[str, Any]] = {}
    health: dict[str, str] = {}
    builders: dict[str, str] = {}


def judge_engine(found: Engine) -> list[Finding]:
    """What counts for every index that is on the engine."""
    return [well("engine.reachable", found.where, "it answers"), _product(found), *_disks(found)]


def _product(found: Engine) -> Finding:
    product = found.product
    if not product.distribution:
        return warning(
            "engine.product",
            found.where,
            "the engine does not tell what it is",
            "let the role ask: cluster privilege `monitor` (Elasticsearch), `cluster:monitor/main` and"
            " `cluster:monitor/nodes/info` (OpenSearch)",
            why="fields get only types that every engine has",
        )
    oldest = OLDEST[product.distribution]
    if product.version < oldest:
        return wrong(
            "engine.product",
            found.where,
            f"{product} is older than {'.'.join(map(str, oldest))}",
            "upgrade it",
        )
    tried = TRIED[product.distribution]
    note = "" if product.version == tried else f" (tests run on {'.'.join(map(str, tried))})"
    return well("engine.product", found.where, f"{product}{note}")


def _disks(found: Engine) -> list[Finding]:
    out = []
    for disk in found.disks:
        if disk.percent < LOW:
            continue
        make = wrong if disk.percent >= HIGH else warning
        out.append(
            make(
                "engine.disk",
                found.where,
                f"the disk of node {disk.node} is {disk.percent} % full",
                "make room: delete indexes or add a node; watermarks: GET /_cluster/settings?include_defaults=true"
                "&filter_path=**.disk.watermark",
                why=f"by default no shard is placed above {LOW} %, and above {HIGH} % every write is blocked",
            )
        )
    if not out and found.disks:
        most = max(disk.percent for disk in found.disks)
        out.append(well("engine.disk", found.where, f"disks are {most} % full at most"))
    return out


def judge_index(
    name: str,
    index: Index,
    found: State,
    record: IndexRecord | None,
    changed: list[str],
    transform: str,
    *,
    source: str = "",
    created: str = "",
    buildable: bool = True,
) -> list[Finding]:
    """What counts for one index.

    Args:
        record: what is remembered of it; None where nothing is.
        changed: the keys of its configuration that wait for a rebuild.
        transform: what is wrong with its transform, empty where nothing is.
        source: the source of the bridge that asks.
        created: when today's stream was made; empty where that is not known, or there is none.
        buildable: False where another finding says why it can never be built.
    """
    out = _privileges(name, found)
    if transform:
        out.append(
            warning(
                "engine.transform",
                name,
                transform,
                f"correct `transform` of [index.{name}], or install the module; where the reader runs on another host,"
                " check there",
            )
        )
    if changed:
        out.append(
            warning(
                "engine.config",
                name,
                f"the configuration has changed since it was built: {', '.join(changed)}",
                f"bridge reindex {name} (what it would do: bridge reindex {name} --dry-run)",
            )
        )
    if found.denied:
        return out
    if buildable or _live(record) is not None or index.alias in found.aliases:
        out += _alias(name, index, found, record, created)
    forgotten = _forgotten(name, index.alias, found, record)
    out += [_left_over(name, index, found.builders.get(one, ""), source, one) for one in forgotten]
    # What nobody uses may be as it is: that it is there is said.
    used = msgspec.structs.replace(
        found,
        health={one: colour for one, colour in found.health.items() if one not in forgotten},
        settings={one: settings for one, settings in found.settings.items() if one not in forgotten},
    )
    return [*out, *_health(name, used), *_blocks(name, used)]


def _privileges(name: str, found: State) -> list[Finding]:
    remedy = (
        f"give the role what docs/indexes.md lists under `The least that the role needs`: indices {name}-* and the"
        " alias: read, write, manage; cluster: monitor"
    )
    if found.denied:
        return [wrong("engine.privileges", name, f"the role may not: {', '.join(found.denied)}", remedy)]
    if found.lacking:
        return [wrong("engine.privileges", name, f"the role lacks {', '.join(found.lacking)}", remedy)]
    return [well("engine.privileges", name, "nothing was refused")]


def _alias(name: str, index: Index, found: State, record: IndexRecord | None, created: str) -> list[Finding]:
    alias, live = index.alias, _live(record)
    if alias in found.aliases:
        return [
            wrong(
                "engine.alias",
                name,
                f"an index, not an alias, is called {alias}",
                f"bridge reindex {name} --replace-index: it is removed in the call that sets the alias; or another"
                f" alias for [index.{name}]",
            )
        ]
    having = sorted(one for one, aliases in found.aliases.items() if (live.alias if live else alias) in aliases)
    if live is None:
        if having:
            next_ = f"bridge index {name} builds its first generation and moves the alias to it"
            return [well("engine.alias", name, f"the alias {alias} is on {', '.join(having)}; {next_}")]
        return [well("engine.alias", name, f"not built yet: `bridge index {name}` does it")]
    if live.physical not in found.aliases:
        what = f"the index {live.physical}, which searches see by the record, is not there"
        return [wrong("engine.alias", name, what, f"bridge reindex {name}")]
    if having != [live.physical]:
        on = ", ".join(having) or "no index"
        return [
            wrong(
                "engine.alias",
                name,
                f"the alias {live.alias or alias} is on {on}, and not on {live.physical} alone",
                f"bridge reindex {name}; or by hand: POST /_aliases, add for {live.physical} and remove for others",
            )
        ]
    if created and live.stream_created != created:
        what = f"{live.physical}, which searches see, was built from another stream than today's: no reader takes it"
        return [wrong("engine.alias", name, what, f"build it anew: bridge reindex {name}")]
    return [well("engine.alias", name, f"{live.alias or alias} is {live.physical}")]


def _forgotten(name: str, alias: str, found: State, record: IndexRecord | None) -> list[str]:
    """Indexes that are named as generations are, that nobody knows, and that searches of the alias do not see: the
    state bucket was deleted, or a NATS server that lost power forgot that one was begun, and its index stays."""
    known = {one.physical for one in record.generations} if record is not None else set()
    if not known:
        return []
    unseen = [one for one, aliases in found.aliases.items() if alias not in aliases]
    return sorted(one for one in unseen if number_of(name, one) and one not in known)


def _left_over(name: str, index: Index, builder: str, source: str, one: str) -> Finding:
    delete, unless = f"curl -X DELETE {hide(index.url[0])}/{one}", "if nobody searches it by its own name"
    what = f"the index {one} is named as a generation is, and no bridge has made it"
    if builder and builder == source:
        what = f"the index {one} is an earlier generation, which the state bucket has forgotten: no reader feeds it"
    elif builder:
        what, unless = f"the index {one} is a generation of the source {builder}", "if that source is given up"
    why = "it takes room and does no other harm: searches of the alias do not see it"
    if builder and builder != source:
        why = "two sources build indexes of one name on this engine: give one of them another, or remove what is left"
    return warning("engine.leftover", name, what, f"{unless}: {delete}", why=why)


def _live(record: IndexRecord | None) -> Generation | None:
    return record.get(record.generation) if record is not None else None


def _health(name: str, found: State) -> list[Finding]:
    out = []
    for index, colour in sorted(found.health.items()):
        if colour == "red":
            out.append(
                wrong(
                    "engine.health",
                    name,
                    f"{index} is red: a shard is not there",
                    f"GET /_cluster/allocation/explain says why; bring its node back, or bridge reindex {name}",
                )
            )
        elif colour == "yellow":
            out.append(
                warning(
                    "engine.health",
                    name,
                    f"{index} is yellow: a replica has no node",
                    f'add a node; or [index.{name}] settings = {{ "index.number_of_replicas" = 0 }} and for now'
                    f' PUT /{index}/_settings {{"index.number_of_replicas": 0}}',
                    why="with the node that has the only copy the index ends",
                )
            )
    green = [index for index, colour in found.health.items() if colour == "green"]
    return out or [well("engine.health", name, f"{', '.join(sorted(green))}: green")] * bool(green)


def _blocks(name: str, found: State) -> list[Finding]:
    out = []
    for index, settings in sorted(found.settings.items()):
        for what, remedy in lifts(settings, index):
            out.append(wrong("engine.block", name, f"{index}: {what}", remedy))
    return out or [well("engine.block", name, "nothing blocks writes")] * bool(found.settings)
