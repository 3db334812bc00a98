"""One scenario: load, faults, rebuilds, and a comparison of every index with its table.

All that is chosen follows from the seed. What the machine does meanwhile does not: a failure that hangs on a
millisecond may take its seed some more runs to show again.
"""

from __future__ import annotations

import random
import signal
import time
from functools import partial
from typing import Any, NamedTuple

import anyio
import msgspec

from bridge.embedded import until
from bridge.index.document import load
from bridge.index.engine import Engine
from bridge.index.generation import IndexRecord, is_consumer, number_of, writes
from bridge.stream.deadletters import letters
from bridge.stream.reader import consumers
from bridge.stream.state import State
from tests.crash.registry import moment
from tests.crash.tally import Outcome
from tests.crash_index import oracle
from tests.crash_index.faults import FAULTS
from tests.crash_index.load import KEYS
from tests.crash_index.points import FIRST, REACHED_WITHIN, nth, rebuilt
from tests.crash_index.world import ENGINES, QUICK, TRANSFORMS, Choice, Servers, World, loaded, world
from tests.running import settled

LONGEST = 600.0
LOOKED_WITHIN = 30
IN_STEP_WITHIN = 120.0
DEADLY = ("kill_engine", "restart_engine")
BEGINNINGS = ["start", "first build failpoint", "built", "built", "built"]


class Plan(NamedTuple):
    """What a seed chooses; `rounds` are the faults, those of one round at the same time."""

    seed: int
    choice: Choice
    begin: str
    rounds: list[list[str]]
    rebuilt_last: bool

    def __str__(self) -> str:
        rounds = "; ".join(" with ".join(names) for names in self.rounds)
        tables = " ".join(f"{table}:{shape}" for table, shape in self.choice.shapes.items())
        extra = f"{' full' * self.choice.full}{' poison' * self.choice.poison}{' rebuilt-last' * self.rebuilt_last}"
        return (
            f"{self.choice.engine} mode={self.choice.mode} {tables} readers={self.choice.readers}{extra} "
            f"begin={self.begin}: {rounds}"
        )


def planned(seed: int, engines: tuple[str, ...] = tuple(ENGINES)) -> Plan:
    """What happens with this seed."""
    choose = random.Random(seed)
    kind = choose.choice(sorted(ENGINES))
    mode = choose.choice(["log", "log", "log", "compact"])
    tables = choose.choice([["posts"], ["posts", "days"], ["posts", "words"], ["days", "words"], ["days"]])
    shapes = {}
    for table in tables:
        able = ["plain", "plain", "exclude", "rename", "both"] + ["transform"] * 2 * (table in TRANSFORMS)
        shapes[table] = choose.choice(able)
    poison = shapes.get("posts") == "transform" and choose.random() < 0.4
    full = mode == "compact" or choose.random() < 0.2
    choice = Choice(kind if kind in engines else engines[0], mode, shapes, choose.choice([1, 2, 2]), full, poison)
    begin = choose.choice(BEGINNINGS)
    rounds = [_round(choose) for _ in range(choose.choice([1, 2, 2, 3]))]
    if engines == (QUICK,):
        rounds = [["pause_engine" if name in DEADLY else name for name in names] for names in rounds]
    if not any(FAULTS[name].part == "rebuild" for names in rounds for name in names):
        rounds[choose.randrange(len(rounds))].append("reindex")
    return Plan(seed, choice, begin, rounds, choose.random() < 0.5)


def _round(choose: random.Random) -> list[str]:
    names = list(FAULTS)
    [first] = choose.choices(names, [FAULTS[name].weight for name in names])
    if choose.random() < 0.5:
        return [first]
    others = [name for name in names if FAULTS[name].part != FAULTS[first].part]
    return [first, *choose.choices(others, [FAULTS[name].weight for name in others])]


async def run(servers: Servers, plan: Plan) -> Outcome:
    """Run it on servers that are up, and leave them so.

    Raises:
        AssertionError, TimeoutError: an index differs, or something did not do what it should; a note has all that
            every process said.
    """
    started = time.monotonic()
    choose = random.Random(f"{plan.seed}/moments")
    node = await servers.node(plan.choice.engine)
    if not node.running:
        await node.start()
    with anyio.fail_after(LONGEST):
        async with world(servers, plan.seed, plan.choice) as here:
            async with loaded(here, plan.seed):
                await begin(here, plan.begin, choose)
                for number, names in enumerate(plan.rounds):
                    async with anyio.create_task_group() as tasks:
                        for name in names:
                            tasks.start_soon(_happen, here, name, random.Random(f"{plan.seed}/{number}/{name}"))
                    await here.whole()
                    await moment(choose, 1)
            documents = await compare(here)
            if plan.rebuilt_last:
                await rebuilt(here, choose)
                documents += await compare(here)
            await end(here)
        return Outcome(documents, here.done, time.monotonic() - started)


async def _happen(here: World, name: str, choose: random.Random) -> None:
    await moment(choose, 1.5)
    await FAULTS[name].happen(here, choose)
    if not name.endswith("at_failpoint"):
        here.done[name] += 1


async def begin(here: World, beginning: str, choose: random.Random) -> None:
    """Start bridge and readers, and go on to where the faults begin."""
    await here.bridge.start()
    if beginning == "first build failpoint":
        point = choose.choice(FIRST)
        await first_build_failpoint(here, point, nth(choose, point))
    for reader in here.readers:
        if not reader.process.running:
            await reader.process.start()
    if beginning == "built":
        await here.while_running(here.built)


async def first_build_failpoint(here: World, point: str, nth: int) -> bool:
    """Kill the only reader at a point of its first build; whether it came there."""
    process = here.readers[0].process
    await process.start(f"{point}:kill:{nth}")
    hit = await process.reached(0, REACHED_WITHIN)
    if hit:
        assert await process.ended() == -signal.SIGKILL
    else:
        await process.end(signal.SIGKILL)
    here.done[f"first build: kill at {point}" if hit else f"first build: {point} not reached"] += 1
    return hit


async def compare(here: World, *, forgetful: bool = False) -> int:
    """Wait until everything is in step, and compare; the number of documents.

    Args:
        forgetful: the broker may have forgotten that a generation was begun: its index is removed as `check` says.
    """
    await here.whole()
    await here.while_running(partial(settled, here.config, 90))
    await here.while_running(partial(_in_step, here))
    documents = 0
    async with here.connected() as (broker, state), here.engine() as engine:
        for name, record in (await here.records(state)).items():
            index = here.config.index[name]
            transform = load(index.transform) if index.transform else None
            key = KEYS[index.table.removeprefix("public.")]
            live = record.get(record.generation)
            assert live is not None
            holders = await engine.indexes(index.alias)
            assert sorted(holders) == [live.physical], f"the alias is on {sorted(holders)}, live is {live.physical}"
            failing: set[str] = set()
            for generation in record.having("live", "kept"):
                target = index.alias if generation is live else generation.physical
                found = await oracle.documents(engine, target)
                failing |= await oracle.same(here.dsn, index, key, found, transform)
                documents += len(found)
            if forgetful:
                await _forgotten_removed(here, name, record, engine)
            await _nothing_left(here, name, record, engine, broker)
            await _same_letters(here, name, failing, broker)
    return documents


async def _in_step(here: World) -> None:
    try:
        await until(here.in_step, IN_STEP_WITHIN, "every index is in step with the stream")
    except TimeoutError:
        async with here.connected() as (broker, state):
            stream = await broker.stream(here.config.stream.name)
            records = await here.records(state)
        seqs = {name: [(g.number, g.state, g.seq) for g in record.generations] for name, record in records.items()}
        raise TimeoutError(f"not in step within {IN_STEP_WITHIN:g} s: {stream and stream.last_seq}, {seqs}") from None


async def _forgotten_removed(here: World, name: str, record: IndexRecord, engine: Engine) -> None:
    """Remove what is named as a generation and that the broker knows nothing of: no searches see it."""
    known = {g.physical for g in record.generations}
    for physical, aliases in (await engine.indexes(f"{name}-0*")).items():
        if number_of(name, physical) and physical not in known:
            assert here.config.index[name].alias not in aliases, f"searches see {physical}, which nobody knows"
            await engine.delete(physical)
            here.done["forgotten generation removed"] += 1


async def _nothing_left(here: World, name: str, record: IndexRecord, engine: Engine, broker: Any) -> None:
    """Assert that engine and stream hold what the record names, and nothing else of this index.

    A rebuild that was killed and not begun again has left a generation that is being built. A delete that the engine
    has worked off after its index was gone has made one, which the reader finds where it looks every few seconds.
    """
    known = {g.physical for g in record.generations}
    followed = {g.physical for g in record.having("live", "kept")}

    state = await State.open(broker, here.config.state.bucket)

    async def right() -> bool:
        made = await engine.indexes(f"{name}-0*")
        now = (await here.records(state))[name].having("live", "kept")
        written = [[one for one in made.get(g.physical, ()) if writes(name).fullmatch(one)] for g in now]
        return followed <= made.keys() <= known and written == [[g.write_alias] for g in now]

    await until(right, LOOKED_WITHIN, f"the engine has of {name} only what the record has: {sorted(known)}")

    async def right_consumers() -> bool:
        # The readers run: each has deleted the consumers before its own. Of a rebuild that was killed some may be left.
        now = (await here.records(state))[name]
        listed = {one for one in await consumers(broker, here.config.stream.name) if one.startswith(f"{name}-")}
        fed = {g.consumer for g in now.having("live", "kept")}
        building = [g.physical for g in now.having("building")]
        return fed <= listed and all(any(is_consumer(one, g) for g in building) for one in listed - fed)

    await until(right_consumers, LOOKED_WITHIN, f"the stream has of {name} only the consumers that the record has")
    assert not record.having("switching", "retired"), f"left: {[(g.number, g.state) for g in record.generations]}"


async def _same_letters(here: World, name: str, failing: set[str], broker: Any) -> None:
    """Assert a dead letter for each row that could be no document, and none where no reject is planned."""
    config = here.config
    found = [msgspec.json.decode(data) async for data in letters(broker, config.stream, config.source.name, name)]
    if not here.choice.poison:
        assert not found, f"{len(found)} dead letters, such as {found[0]}"
    wrong = [letter for letter in found if "ValueError" not in letter["reason"]]
    assert not wrong, f"{len(wrong)} dead letters that were not planned, such as {wrong[0]}"
    unsaid = failing - {letter["id"] for letter in found}
    assert not unsaid, f"no dead letter for {sorted(unsaid)[:5]}"


async def end(here: World) -> None:
    """End all of it in order, and assert that nothing broke without being said."""
    for process in (*(reader.process for reader in here.readers), here.bridge):
        await process.stop()
    assert "Traceback" not in here.texts, "a process printed a traceback"
