"""How fast a rebuild is, against the same client bulking the same documents, ready in memory, into the same engine.

The log holds 750-byte rows as a snapshot leaves them. The rebuild's figure is its whole length: index made, log
replayed, settings restored, documents counted, alias switched. What the yardstick sends are the documents of a first
rebuild, byte by byte, into an index of the same mapping and settings, two bulks on their way at a time.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import anyio
import msgspec

from bench import documents, processor
from bench.documents import INDEX
from bench.result import Result, result
from bridge.embedded import NatsServer
from bridge.index.engine import Engine, opened
from bridge.index.rebuild import rebuild

DOCUMENTS = 100_000
PER_BULK = 2_000
IN_FLIGHT = 2


class _Hit(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    version: int = msgspec.field(name="_version")
    source: msgspec.Raw = msgspec.field(name="_source")
    sort: list[Any]


class _Hits(msgspec.Struct):
    hits: list[_Hit]


class _Page(msgspec.Struct):
    hits: _Hits


class Ready(NamedTuple):
    """What the yardstick sends: bulks, each with the number of its documents, and the mapping of their index."""

    mapping: dict[str, Any]
    bulks: list[tuple[bytes, int]]

    @property
    def documents(self) -> int:
        return sum(count for _, count in self.bulks)


class Run(NamedTuple):
    """Documents a second, and microseconds of processor a document: of this process, which is the client, and of the
    engine."""

    rate: float
    client: float
    engine: float


async def measure(kind: str, runs: int, scale: float) -> list[Result]:
    """Documents a second of `reindex` over those of plain bulks, and what a document costs in either."""
    wanted = max(int(DOCUMENTS * scale), PER_BULK)
    async with NatsServer.throwaway() as nats, documents.running(kind) as node:
        config = documents.configured(nats.url, node.url)
        await documents.begin(config, nats.url, wanted)
        await documents.fill(config, nats.url, wanted)
        found, yards = list[Run](), list[Run]()
        pids = documents.pids(node)
        async with opened(config.index[INDEX]) as client:
            # The engine's own code gets warm, too.
            ready = await _ready(client, (await rebuild(config, INDEX, [nats.url])).physical)
            await _plain(client, ready, pids)
            for _ in range(runs):
                yards.append(await _plain(client, ready, pids))
                found.append(await _timed(functools.partial(rebuild, config, INDEX, [nats.url]), wanted, pids))
    row, title = f"index.rebuild.{kind}", documents.ENGINES[kind].title
    return [
        result(
            row,
            f"documents/s of reindex ÷ plain bulks of the same from memory ({title})",
            [one.rate for one in found],
            [yard.rate for yard in yards],
        ),
        *(
            result(
                f"{row}.cpu.{name}",
                f"µs of processor a document ÷ {title}'s plain bulks",
                [float(getattr(one, field)) for one in found],
                [float(getattr(yard, field)) for yard in yards],
            )
            for name, field in (("bridge", "client"), ("engine", "engine"))
        ),
    ]


async def _timed(work: Any, count: int, pids: Sequence[int]) -> Run:
    started, ours, theirs = time.monotonic(), time.process_time(), sum(map(processor.used, pids))
    await work()
    seconds, mine = time.monotonic() - started, time.process_time() - ours
    return Run(count / seconds, mine / count * 1e6, (sum(map(processor.used, pids)) - theirs) / count * 1e6)


async def _ready(client: Engine, physical: str) -> Ready:
    """The documents of an index, as bulks that make them once more."""
    mapping = next(iter((await client.json("GET", f"/{physical}/_mapping")).values()))["mappings"]
    body: dict[str, Any] = {
        "size": PER_BULK, "version": True, "track_total_hits": False, "sort": [{"_bridge.version": "asc"}],
        "query": {"match_all": {}},
    }  # fmt: skip
    bulks = list[tuple[bytes, int]]()
    while True:
        answer = await client.ask("POST", f"/{physical}/_search", body)
        hits = msgspec.json.decode(answer, type=_Page).hits.hits
        if not hits:
            return Ready(mapping, bulks)
        bulks.append((b"".join(map(_line, hits)), len(hits)))
        body["search_after"] = hits[-1].sort


def _line(hit: _Hit) -> bytes:
    return b'{"index":{"_id":%s,"version":%d,"version_type":"external"}}\n%s\n' % (
        msgspec.json.encode(hit.id),
        hit.version,
        bytes(hit.source),
    )


async def _plain(client: Engine, ready: Ready, pids: Sequence[int]) -> Run:
    """Ready bulks, two on their way at a time, into an index without refresh and replicas."""
    index = f"yardstick-{secrets.token_hex(4)}"
    settings = {"refresh_interval": "-1", "number_of_replicas": 0, "number_of_shards": 1}
    body = {"settings": settings, "mappings": ready.mapping, "aliases": {f"{index}-w": {}}}
    left = list(reversed(ready.bulks))

    async def send() -> None:
        while left:
            await client.patiently(functools.partial(client.bulk, f"{index}-w", *left.pop()))

    async def all_of_them() -> None:
        await client.create(index, body)
        async with anyio.create_task_group() as senders:
            for _ in range(IN_FLIGHT):
                senders.start_soon(send)
        await client.refresh(index)

    run = await _timed(all_of_them, ready.documents, pids)
    if (held := await client.count(index)) != ready.documents:
        raise RuntimeError(f"the yardstick's index holds {held} documents of {ready.documents}")
    await client.delete(index)
    return run
