"""`bridge dlq NAME`: the dead letters of an index, shown, tried again or dropped, while its reader is at work.

A retry never replays the old event: it writes the row's latest state, as the log has it at its end, with the version of
that end. So what the reader writes of later events wins over it, and what of earlier ones is on its way loses. Where
the engine takes it, that row's letters up to that end are deleted; a newer letter stays.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence

import msgspec

from bridge import event
from bridge.config import Config
from bridge.errors import BridgeError, UsageError
from bridge.event import HEADER_POSITION
from bridge.index.engine import EngineError
from bridge.index.generation import FOLLOWED, Generation, members
from bridge.index.ground import Letter
from bridge.index.mending import Mending, Outcome
from bridge.index.naming import NO_KEY, UNREADABLE, Rejected, address, row
from bridge.index.place import Place, site
from bridge.index.rereading import in_use, looking, rereading
from bridge.stream import claims, deadletters
from bridge.stream.server import Servers
from bridge.waiting import Backoff, forever

GONE = "gone"
ROWS = 500


class Dead(msgspec.Struct, frozen=True):
    """A dead letter as it stands in its stream, at the sequence `number`; `state` is its generation's, "gone" where
    that is no more. A letter that cannot be read has none."""

    number: int
    state: str
    letter: Letter | None


class Refused(msgspec.Struct, frozen=True):
    """A letter that stays, and why."""

    number: int
    key: msgspec.Raw
    reason: str


class Retried(msgspec.Struct, kw_only=True):
    """What a retry did: rows `written`, `deleted` because the log has them no more, or found `newer` in the index than
    the log's end; `letters` deleted with that; `refused` letters stay, and so do those of generations that are `gone`.
    """

    written: int = 0
    deleted: int = 0
    newer: int = 0
    letters: int = 0
    refused: list[Refused] = []
    gone: int = 0


class Shown(msgspec.Struct):
    """One letter with its event as the log has it; None where it is not there any more, which `why` explains."""

    dead: Dead
    event: event.Event | None = None
    why: str = ""


async def dead_letters(config: Config, name: str, servers: Servers) -> AsyncIterator[Dead]:
    """The dead letters of an index, oldest first.

    Raises:
        ConfigError: there is no such index. ServerRefused: there is no stream. Unavailable: NATS is away.
    """
    async with looking(site(config, name), servers, "dlq") as place:
        async for dead in _letters(place):
            yield dead


async def _letters(place: Place) -> AsyncIterator[Dead]:
    states = {generation.number: str(generation.state) for generation in (await place.record()).generations}
    config = place.site.config
    async for number, data in deadletters.stored(place.broker, config.stream, config.source.name, place.site.name):
        yield _dead(number, data, states)


def _dead(number: int, data: bytes, states: dict[int, str]) -> Dead:
    try:
        letter = msgspec.json.decode(data, type=Letter)
    except (msgspec.DecodeError, ValueError):
        return Dead(number, GONE, None)
    return Dead(number, states.get(letter.generation, GONE), letter)


async def shown(config: Config, name: str, servers: Servers, number: int) -> Shown:
    """One letter, and its event.

    Raises:
        UsageError: there is no such letter.
    """
    async with looking(site(config, name), servers, "dlq") as place:
        dead = await _one(place, number)
        if dead.letter is None:
            return Shown(dead, None, "the letter cannot be read")
        found = await place.broker.message(config.stream.name, seq=dead.letter.seq)
        if found is None:
            return Shown(dead, None, "the log does not hold the event any more")
        if found.headers.get(HEADER_POSITION, "") != dead.letter.position:
            return Shown(dead, None, "a newer bridge has written another event in its place")
        try:
            ref = event.ref_of(found.data)
            data = found.data if ref is None else await claims.resolve(place.broker, ref, seq=found.seq)
            return Shown(dead, event.decode(data))
        except BridgeError as error:
            return Shown(dead, None, error.what)
        except UNREADABLE:
            return Shown(dead, None, "the event cannot be read")


async def _one(place: Place, number: int) -> Dead:
    config = place.site.config
    subject = deadletters.dead_subject(config.stream.prefix, config.source.name, place.site.name)
    stream = deadletters.dead_stream(config.stream)
    found = await place.broker.message(stream, seq=number) if await place.broker.stream(stream) is not None else None
    if found is None or found.subject != subject:
        raise UsageError(
            f"the index {place.site.name} has no dead letter {number}", f"see bridge dlq {place.site.name} list"
        )
    states = {generation.number: str(generation.state) for generation in (await place.record()).generations}
    return _dead(number, found.data, states)


async def dropped(config: Config, name: str, servers: Servers, numbers: Collection[int] | None) -> int:
    """Delete letters (None: all of the index); how many there were.

    Raises:
        UsageError: one of them is not there; then none is deleted.
    """
    async with looking(site(config, name), servers, "dlq") as place:
        if numbers is None:
            numbers = [dead.number async for dead in _letters(place)]
        else:
            for number in numbers:
                await _one(place, number)
        for number in numbers:
            await deadletters.discard(place.broker, config.stream, number)
        return len(numbers)


async def retried(config: Config, name: str, servers: Servers, numbers: Collection[int] | None) -> Retried:
    """Write the latest state of the rows of some letters (None: of all), and delete the letters where that succeeds.

    Raises:
        ConfigError: there is no such index. UsageError: there is no such letter.
        Gap: the stream does not reach back to a complete picture. IndexMismatch: a generation is gone.
        ServerRefused: credentials, privileges, no room for a temporary file.
    """
    where, result, known = site(config, name), Retried(), set[int]()

    async def attempt(backoff: Backoff) -> Retried:
        async with looking(where, servers, "dlq") as place:
            backoff.over()
            record = await place.record()
            dead = [one async for one in _letters(place)]
            if numbers is not None and not known:
                known.update(one.number for one in _chosen(dead, numbers, name))
            # A second attempt finds the letters of the first one's rows gone: they are counted already.
            chosen = dead if numbers is None else [one for one in dead if one.number in known]
            result.refused, result.gone = [], sum(one.letter is None or one.state == GONE for one in chosen)
            for generation in record.generations:
                ours = [one for one in dead if one.letter is not None and one.letter.generation == generation.number]
                asked = [one for one in chosen if one.letter and one.letter.generation == generation.number]
                if asked and generation.state not in FOLLOWED:
                    result.refused += [_refused(one, f"the generation is {generation.state}") for one in asked]
                elif asked:
                    await _retry(place, generation, ours, asked, result)
            return result

    return await forever(f"dlq {name}", attempt)


def _chosen(dead: list[Dead], numbers: Collection[int], name: str) -> list[Dead]:
    wrong = sorted(set(numbers) - {one.number for one in dead})
    if wrong:
        raise UsageError(f"the index {name} has no dead letter {wrong[0]}", f"see bridge dlq {name} list")
    return [one for one in dead if one.number in set(numbers)]


def _refused(dead: Dead, reason: str) -> Refused:
    assert dead.letter is not None
    return Refused(dead.number, dead.letter.key, reason)


async def _retry(place: Place, generation: Generation, ours: list[Dead], asked: list[Dead], result: Retried) -> None:
    """The letters of one generation: `ours` are all that there are."""
    by_row = dict[str, list[Dead]]()
    for one in ours:
        by_row.setdefault(_row(one, generation), []).append(one)
    rows = list(dict.fromkeys(_row(one, generation) for one in asked))
    if "" in rows:
        rows.remove("")
        result.refused += [
            _refused(one, "its event does not say which row it changes")
            for one in asked
            if one.letter is not None and not one.letter.id
        ]
    try:
        async with rereading(place, generation, wanted=rows) as reading:
            await reading.draw_all()
            mending = Mending(place, reading)
            for start in range(0, len(rows), ROWS):
                outcome = await mending.write(rows[start : start + ROWS])
                await reading.still_stands()
                await _settle(place, outcome, by_row, reading.end, result)
    except EngineError:
        await in_use(place, generation)
        raise


def _row(dead: Dead, generation: Generation) -> str:
    """The address of the row that a letter is about, which may have several documents; empty where that is unknown."""
    letter = dead.letter
    assert letter is not None
    for member in members(generation.shapes).values():
        if letter.table in (member.name, f"{member.schema}.{member.table}") and bytes(letter.key) != bytes(NO_KEY):
            with contextlib.suppress(*UNREADABLE, Rejected):
                return address(member.naming.id(row(letter.key)), letter.routing)
    return address(letter.id, letter.routing)


async def _settle(place: Place, outcome: Outcome, by_row: dict[str, list[Dead]], end: int, result: Retried) -> None:
    """Delete the letters of the rows that are in the index as of `end` now."""
    result.written += len(outcome.written)
    result.deleted += len(outcome.deleted)
    result.newer += len(outcome.newer)
    for where in outcome.written | outcome.deleted | outcome.newer:
        for one in by_row[where]:
            if one.letter is not None and one.letter.seq <= end:
                await deadletters.discard(place.broker, place.site.config.stream, one.number)
                result.letters += 1
    for where, reason in outcome.refused.items():
        result.refused += [_refused(one, reason) for one in by_row[where]]


def reasons(found: Sequence[Dead]) -> dict[str, int]:
    """How many letters name which reason, the most frequent first."""
    return dict(Counter(one.letter.reason if one.letter is not None else "not readable" for one in found).most_common())
