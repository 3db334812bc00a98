"""One scenario: load, faults, and a comparison of what is in the stream with what is in PostgreSQL.

All that is chosen follows from the seed. What the machine does meanwhile does not: a failure that hangs on a
millisecond may take its seed some more runs to show again.
"""

from __future__ import annotations

import random
import time
from functools import partial
from typing import NamedTuple, get_args, get_type_hints

import anyio

from bridge.config import Config, Stream
from bridge.event import Event, Position
from bridge.pipeline.between import LAST_LSN
from bridge.source import lsn
from bridge.stream.reader import Message
from tests.crash.faults import FAULTS, REACHED_WITHIN, SNAPSHOT, at_failpoint, nth
from tests.crash.registry import moment
from tests.crash.tally import Outcome
from tests.crash.world import SYNC_INTERVAL, Servers, World, loaded, world
from tests.oracle import agrees
from tests.running import checkpoint, complete, execute, settled

LONGEST = 180.0
BEGINNINGS = ["start", "snapshot", "snapshot failpoint", "streaming", "streaming"]


PUBLISHERS = get_args(get_type_hints(Stream)["publish"])


# So many at once that several batches are on their way.
MANY = "INSERT INTO accounts (id, balance) SELECT -({r} * 10000 + g), g FROM generate_series(1, 5000) g"


class Plan(NamedTuple):
    """What a seed chooses; `rounds` are the faults, those of one round at the same time."""

    seed: int
    synchronous_commit: str
    publish: str
    sync: str
    begin: str
    rounds: list[list[str]]

    def __str__(self) -> str:
        rounds = "; ".join(" with ".join(names) for names in self.rounds)
        return (
            f"synchronous_commit={self.synchronous_commit} publish={self.publish} sync={self.sync} "
            f"begin={self.begin}: {rounds}"
        )


def planned(seed: int) -> Plan:
    """What happens with this seed."""
    choose = random.Random(seed)
    synchronous_commit = choose.choice(["on", "off"])
    publish = choose.choice(["batch", "chain"])
    # A chain is for servers that do not sync each message, and slow on others.
    sync = choose.choice(
        ["always", "always", "always", SYNC_INTERVAL] if publish == "batch" else [*[SYNC_INTERVAL] * 3, "always"]
    )
    begin = choose.choice(BEGINNINGS)
    rounds = [_round(choose) for _ in range(choose.choice([1, 1, 2, 2, 3]))]
    if any("forget_last_second" in names for names in rounds):
        sync = SYNC_INTERVAL
    return Plan(seed, synchronous_commit, publish if publish in PUBLISHERS else "batch", sync, begin, rounds)


def _round(choose: random.Random) -> list[str]:
    names = list(FAULTS)
    weights = [FAULTS[name].weight for name in names]
    [first] = choose.choices(names, weights)
    if choose.random() < 0.7:
        return [first]
    others = [name for name in names if FAULTS[name].part != FAULTS[first].part]
    return [first, *choose.choices(others, [FAULTS[name].weight for name in others])]


async def run(servers: Servers, plan: Plan) -> Outcome:
    """Run it on servers that are up, and leave them so.

    Raises:
        AssertionError, TimeoutError: the stream differs, or the bridge did not do what it should; a note has all that
            the bridge said.
    """
    started = time.monotonic()
    choose = random.Random(f"{plan.seed}/moments")
    with anyio.fail_after(LONGEST):
        async with world(
            servers, plan.seed, synchronous_commit=plan.synchronous_commit, publish=plan.publish, sync=plan.sync
        ) as here:
            async with loaded(here, plan.seed):
                await begin(here, plan, choose)
                for number, names in enumerate(plan.rounds):
                    await execute(str(here.config.source.dsn), MANY.replace("{r}", str(number + 1)))
                    async with anyio.create_task_group() as tasks:
                        for name in names:
                            tasks.start_soon(_happen, here, name, random.Random(f"{plan.seed}/{number}/{name}"))
                    await here.whole()
                    await moment(choose, 0.5)
            events = await compare(here)
        return Outcome(events, here.done, time.monotonic() - started)


async def _happen(here: World, name: str, choose: random.Random) -> None:
    await moment(choose, 1)
    await FAULTS[name].happen(here, choose)
    if FAULTS[name].part != "bridge" or not name.endswith("failpoint"):
        here.done[name] += 1


async def begin(here: World, plan: Plan, choose: random.Random) -> None:
    """Start the bridge and go on to where the faults begin."""
    if plan.begin == "snapshot failpoint":
        point = choose.choice(SNAPSHOT)
        await snapshot_failpoint(here, choose, point, nth(choose, point))
        return
    await here.bridge.start()
    if plan.begin != "start":
        await here.bridge.said("slot created" if plan.begin == "snapshot" else "streaming")


async def snapshot_failpoint(
    here: World, choose: random.Random, point: str, nth: int, within: float = REACHED_WITHIN
) -> bool:
    """Kill the bridge at a point of its first snapshot."""
    if point == "slot.dropped":
        # Only an attempt that did not finish leaves a slot to drop.
        await at_failpoint(here, choose, "table.rows", "kill", 1, within)
    return await at_failpoint(here, choose, point, "kill", nth, within)


async def compare(here: World) -> int:
    """Wait until the stream has everything, end the bridge in order, and compare; the number of events."""
    await here.whole()
    await here.while_running(partial(settled, here.config, 90))
    await here.while_running(partial(_read, here.config))
    await here.bridge.stop()
    assert "Traceback" not in here.bridge.text, "the bridge printed a traceback"
    found = await agrees(here.config, f"oracle_{here.config.source.name}", interrupted=True)
    _told(here, found)
    kept = await checkpoint(here.config)
    assert kept is not None
    assert (kept.stream_seq, kept.position) == (found[-1][0].seq, found[-1][0].position), "the last checkpoint"
    slot = here.config.source.slot
    [(confirmed,)] = await execute(
        here.pg.dsn(), f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{slot}'"
    )
    assert lsn.parse(confirmed) <= lsn.parse(kept.lsn), f"PostgreSQL was told {confirmed}, the bucket has {kept.lsn}"
    return len(found)


async def _read(config: Config) -> None:
    """Wait until what an interrupted initial snapshot has left is read."""
    await complete(config, 90)


def _told(here: World, found: list[tuple[Message, Event]]) -> None:
    """Assert that a reader who saw what the broker forgot can tell: what stands there now is of a newer epoch, and the
    same change unless the snapshot began anew or a table was being read, whose rows are read once more. A dead writer's
    own message that came in once more is nothing to tell.
    """
    first = found[0][0].seq
    for tail, snapshots, kept, reading in here.forgotten:
        message = found[tail.seq - first][0]
        again = (message.epoch, message.position) == (tail.epoch, tail.position)
        assert again or message.epoch > tail.epoch, f"sequence {tail.seq}: forgotten, and written by {message.epoch}"
        anew = [message for message, _ in found[kept + 1 - first : tail.seq + 1 - first]]
        reading = reading or any(Position.parse(one.position).lsn == LAST_LSN for one in anew)
        if here.bridge.text.count("slot created") == snapshots and not reading:
            assert message.position == tail.position, f"sequence {tail.seq} had position {tail.position}"
