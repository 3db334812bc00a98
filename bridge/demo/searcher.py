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

PAUSE = 0.01
PROBE_PAUSE = 0.25
PROBE_POLL = 0.004
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
            seen.answered += 1
            seen.empty += not hits["hits"]
            seen.times.append(time.monotonic() - begun)
        await anyio.sleep(PAUSE)


async def probe(engine: Engine, alias: str, writer: Writer, board: Board) -> None:
    """Again and again take the newest post and measure the seconds from its commit until a search finds it."""
    last = 0
    while True:
        if writer.newest is not None and writer.newest[0] != last:
            last, committed = writer.newest
            found = await _found(engine, alias, last, committed)
            if found is not None:
                board.lags.append(Lag(committed, found - committed))
        await anyio.sleep(PROBE_PAUSE)


async def _found(engine: Engine, alias: str, number: int, committed: float) -> float | None:
    """When the post was found; None where it was not in time (it may have been deleted meanwhile)."""
    while time.monotonic() - committed < PROBE_LONGEST:
        try:
            if (await search(engine, alias, {"size": 1, "query": {"term": {"id": number}}}))["hits"]:
                return time.monotonic()
        except BridgeError:
            pass  # the searcher above counts failures
        await anyio.sleep(PROBE_POLL)
    return None


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
