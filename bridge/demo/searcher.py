"""Those who search while everything else goes on: one that never pauses, one that times commits, one that looks at
the hits which the rebuild changes."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

import anyio
import msgspec

from bridge.demo.board import Board, Lag
from bridge.demo.writer import Writer
from bridge.errors import BridgeError
from bridge.index.engine import Engine
from bridge.structured import group

PAUSE = 0.01
PROBE_PAUSE = 0.25
PROBE_POLL = 0.004
PROBE_SHARE = 0.1
PROBE_LONGEST = 20.0
SAMPLE_EVERY = 0.5
SAMPLES = 3


async def search(engine: Engine, alias: str, body: dict[str, Any]) -> dict[str, Any]:
    """One search's `hits`, in one try: an error is an error here."""
    answer = msgspec.json.decode(await engine.ask("POST", f"/{alias}/_search", body, seconds=10))
    return dict(answer["hits"])


async def loop(engine: Engine, alias: str, words: list[str], board: Board) -> None:
    """Search word after word until cancelled; every word has hits, so an empty answer is a failure."""
    seen = board.searches
    for word in itertools.cycle(words):
        begun = time.monotonic()
        try:
            hits = await search(engine, alias, {"size": 3, "_source": ["subject"], "query": {"match": {"body": word}}})
        except BridgeError as error:
            seen.failed += 1
            seen.failure = error.what
        else:
            seen.empty += not hits["hits"]
            seen.times.append(time.monotonic() - begun)
        await anyio.sleep(PAUSE)


async def probe(engine: Engine, alias: str, writer: Writer, board: Board) -> None:
    """Measure the seconds from a post's commit until a search finds it, of one post in each `PROBE_PAUSE`, also while
    earlier ones are waited for and a search takes long: a standstill counts for every post that it holds up."""
    waiting: dict[int, float] = {}
    async with group() as tasks:
        tasks.start_soon(_pick, writer, waiting)
        while True:
            for number in await _found(engine, alias, list(waiting)):
                committed = waiting.pop(number)
                board.lags.append(Lag(committed, time.monotonic() - committed))
            for number in [one for one, committed in waiting.items() if time.monotonic() - committed > PROBE_LONGEST]:
                del waiting[number]
                board.unfound += 1
            # Each look makes the engine work, which is measured with it: the longer nothing comes, the less often.
            youngest = time.monotonic() - max(waiting.values(), default=time.monotonic())
            await anyio.sleep(max(PROBE_POLL, PROBE_SHARE * youngest))


async def _pick(writer: Writer, waiting: dict[int, float]) -> None:
    """Put a post that was just committed, and when, to those that are waited for, one in each `PROBE_PAUSE`."""
    seen, due = 0, 0.0
    while True:
        if writer.newest is not None and writer.newest[0] != seen:
            seen, committed = writer.newest
            if committed >= due:
                waiting[seen], due = committed, committed + PROBE_PAUSE
        await anyio.sleep(PROBE_POLL)


async def _found(engine: Engine, alias: str, numbers: list[int]) -> list[int]:
    """Those of the posts that a search finds now."""
    if not numbers:
        return []
    try:
        found = await search(
            engine, alias, {"size": len(numbers), "_source": ["id"], "query": {"terms": {"id": numbers}}}
        )
    except BridgeError:
        return []  # the searcher above counts failures
    return [hit["_source"]["id"] for hit in found["hits"]]


async def sample(engine: Engine, alias: str, board: Board) -> None:
    """Keep the board's sample up to date until cancelled."""
    while True:
        # What fails here is counted by the searcher above.
        with contextlib.suppress(BridgeError):
            await look(engine, alias, board)
        await anyio.sleep(SAMPLE_EVERY)


async def look(engine: Engine, alias: str, board: Board) -> None:
    """The hits of the sample's word now, those that match by another form of it first, one of each author."""
    word = board.sample.word
    body = {
        "size": 40,
        "_source": ["author"],
        "track_total_hits": True,
        "query": {"match": {"body": word}},
        "highlight": {"fields": {"body": {"fragment_size": 60, "number_of_fragments": 1}}},
    }
    found = await search(engine, alias, body)
    hits: dict[str, str] = {}
    for hit in sorted(found["hits"], key=lambda hit: f"<em>{word}</em>" in _fragment(hit).lower()):
        hits.setdefault(hit["_source"]["author"], _fragment(hit))
    board.sample.count = found["total"]["value"]
    board.sample.hits = list(hits.items())[:SAMPLES]


def _fragment(hit: dict[str, Any]) -> str:
    return " ".join(str(hit.get("highlight", {}).get("body", [""])[0]).split())
