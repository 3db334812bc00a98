"""Laps: load and faults for a while, then rest, comparison, and a look at what the processes hold.

What is chosen follows from the seed; what the machine does meanwhile does not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

import anyio

from tests.crash.faults import FAULTS as LOG_FAULTS
from tests.crash.registry import moment
from tests.crash_index import scenario
from tests.crash_index.faults import FAULTS as INDEX_FAULTS
from tests.crash_index.world import QUICK, Servers
from tests.running import complete, execute, settled
from tests.soak import leaks, load
from tests.soak.leaks import Held
from tests.soak.log import Log
from tests.soak.world import World, world

LAP = 75.0
# Of a lap's end: waiting, reading, comparing; on a machine that has much else to do.
REST = 420.0
KILLING = 1 / 3
# What the log's suite does to these is enough; and no process is killed in the second part.
ONCE = ("bridge", "broker")
HARMLESS = ("pause_bridge",)
SNAPSHOTS = [*(f"public.{table}" for table in load.INDEXED), "log.notes", "log.accounts", "log.pairs", "log.days"]


class Kind(NamedTuple):
    """A fault of one of the suites, or a command that is run in between. `kills`: bridge or readers."""

    name: str
    part: str
    weight: int
    kills: bool
    happen: Callable[[World, random.Random], Awaitable[None]]


class Lap(NamedTuple):
    """What a lap has come to: `compared` events and documents; `held` of each process at its end."""

    seconds: float
    transactions: int
    events: int
    documents: int
    backends: int
    held: dict[str, Held]


class Soaked(NamedTuple):
    """What a soak has come to. `staying`: the number of the first lap without kills."""

    seed: int
    engine: str
    seconds: float
    laps: list[Lap]
    staying: int
    done: dict[str, int]
    large: int
    grown: list[str]


def kinds(engine: str) -> list[Kind]:
    """All that may happen; an engine that holds everything in memory is not to die."""
    found = [
        Kind(
            name, fault.part, fault.weight, fault.part == "bridge" and name not in HARMLESS,
            partial(_log_fault, name=name),
        )
        for name, fault in LOG_FAULTS.items()
    ]  # fmt: skip
    found += [
        Kind(
            f"index: {name}", f"index {fault.part}", fault.weight, fault.part == "reader",
            partial(_index_fault, name=name),
        )
        for name, fault in INDEX_FAULTS.items()
        if fault.part not in ONCE and not (engine == QUICK and name in scenario.DEADLY)
    ]  # fmt: skip
    return [*found, Kind("snapshot", "snapshot", 12, kills=False, happen=_snapshot)]


async def _log_fault(here: World, choose: random.Random, *, name: str) -> None:
    await LOG_FAULTS[name].happen(here.log, choose)
    if not name.endswith("failpoint"):
        here.log.done[name] += 1


async def _index_fault(here: World, choose: random.Random, *, name: str) -> None:
    await INDEX_FAULTS[name].happen(here.index, choose)
    if not name.endswith("failpoint"):
        here.index.done[f"index: {name}"] += 1


async def _snapshot(here: World, choose: random.Random) -> None:
    """Ask for a snapshot of some tables, until it is taken down: another fault may have the broker away."""
    process = here.index.rebuilder.command("snapshot", *choose.sample(SNAPSHOTS, choose.randint(1, 3)))
    try:
        with anyio.fail_after(120):
            while True:
                await process.start()
                if await process.ended(60) == 0:
                    break
                await anyio.sleep(1)
        here.log.done["snapshot"] += 1
    finally:
        here.index.said.append(process.text)
        await process.close()


def chosen(choose: random.Random, engine: str, *, kills: bool) -> list[Kind]:
    """One round: one to three faults of different parts at the same time."""
    left = [kind for kind in kinds(engine) if kills or not kind.kills]
    found: list[Kind] = []
    for _ in range(choose.choice([1, 1, 2, 3])):
        [one] = choose.choices(left, [kind.weight for kind in left])
        found.append(one)
        left = [kind for kind in left if kind.part != one.part]
    return found


async def soak(
    mine: Servers, *, seed: int, engine: str, seconds: float, lap: float = LAP, say: Callable[[str], None]
) -> Soaked:
    """Go round until the time is over, at least once.

    Raises:
        AssertionError, TimeoutError: log or index differ from the tables, or something did not do what it should.
    """
    began, laps, staying = time.monotonic(), list[Lap](), 0
    async with world(mine, engine) as here:
        for process in here.processes.values():
            await process.start()
        await here.while_running(partial(settled, here.config, 90))
        await here.while_running(here.index.built)
        log = Log(here.config)
        while not laps or time.monotonic() - began < seconds:
            kills = time.monotonic() - began < seconds * KILLING
            staying += kills
            choose = random.Random(f"{seed}/{len(laps)}")
            laps.append(await _lap(here, log, choose, lap, kills=kills))
            say(_told(len(laps), laps[-1], kills=kills))
        await scenario.end(here.index)
        done = dict(here.done)
    held = {name: [one.held[name] for one in laps[staying:]] for name in here.processes}
    grown = [text for name, found in held.items() for text in leaks.grown(name, found)]
    return Soaked(seed, engine, time.monotonic() - began, laps, staying, done, log.large, grown)


async def _lap(here: World, log: Log, choose: random.Random, seconds: float, *, kills: bool) -> Lap:
    began, events = time.monotonic(), log.events
    with anyio.fail_after(seconds + 300):
        async with load.writing(str(here.config.source.dsn), str(choose.random())) as written:
            while time.monotonic() - began < seconds:
                await _round(here, chosen(choose, here.index.choice.engine, kills=kills), choose)
    with anyio.fail_after(REST):
        await execute(str(here.config.source.dsn), *load.TRIMMED)
        await here.while_running(partial(settled, here.config, 120))
        await here.while_running(partial(complete, here.config, 120))
        await log.compare()
        documents = await scenario.compare(here.index, forgetful=True)
        held = {name: await leaks.held(process) for name, process in here.processes.items()}
        [(backends,)] = await execute(
            here.pg.dsn(), "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'bridge%'"
        )
    seconds = time.monotonic() - began
    return Lap(seconds, written.transactions, log.events - events, documents, backends, held)


async def _round(here: World, kinds: list[Kind], choose: random.Random) -> None:
    async with anyio.create_task_group() as tasks:
        for kind in kinds:
            tasks.start_soon(_happens, here, kind, random.Random(choose.random()))
    await here.whole()
    await moment(choose, 2)


async def _happens(here: World, kind: Kind, choose: random.Random) -> None:
    await moment(choose, 1.5)
    await kind.happen(here, choose)


def _told(number: int, lap: Lap, *, kills: bool) -> str:
    held = ", ".join(
        f"{name} {one.memory >> 20} MB {one.descriptors} fds {one.tasks} tasks" for name, one in lap.held.items()
    )
    return (
        f"lap {number}{' with kills' if kills else ''}: {lap.transactions:,} transactions, {lap.events:,} events and "
        f"{lap.documents:,} documents the same, {lap.seconds:.0f} s; {held}"
    )
