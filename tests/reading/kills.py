"""One seed: tables are read while they are written to, and parts are killed: the bridge at points of a reading, the
broker, PostgreSQL. Each reading goes on where it was, and the log is whole. `python -m tests.reading.kills` runs many.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import time
from collections import Counter
from itertools import takewhile
from typing import Any, NamedTuple

import anyio
import msgspec
import psycopg

from bridge import event
from bridge.config import Config
from bridge.embedded.process import throwaway_folder
from bridge.event import Event
from bridge.failpoints import POINTS
from bridge.stream import asking
from bridge.stream.reader import Message
from bridge.stream.state import Again, State
from bridge.waiting import until
from tests.crash import seeds
from tests.crash.process import Bridge
from tests.crash.tally import Outcome, Tally
from tests.oracle import agrees
from tests.reading.checker import from_last_begin, never_back, same
from tests.reading.scenario import TABLES, WRITERS, Servers, Writer, made, servers
from tests.running import broker_of, execute, settled, source, toml

ROWS = 360
AT = [name for name in POINTS if name.startswith("reading.")]
# Where a reading comes by once a table, or once at all if it has rows to read last.
SELDOM = {"reading.began": 3, "reading.ended": 3, "reading.moved": 1}
SERVERS = ["nats", "backend", "postmaster", "immediate"]
Found = list[tuple[Message, Event]]
Readings = dict[str, Again | None]


class Fault(NamedTuple):
    """A point of the reading and the how-many-eth time there; or a server, and after so many rows of all tables."""

    what: str
    nth: int


class Plan(NamedTuple):
    """What a seed does, one after the other."""

    seed: int
    faults: list[Fault]


def planned(seed: int) -> Plan:
    """The plan of a seed."""
    choose = random.Random(seed)
    chosen = choose.sample([*AT, *SERVERS], choose.randint(1, 3))
    return Plan(seed, [Fault(what, choose.randint(1, SELDOM.get(what, 25))) for what in chosen])


class Lasting(Writer):
    """A writer that PostgreSQL may go away from."""

    async def work(self, stop: anyio.Event) -> None:
        while not stop.is_set():
            try:
                await self._settle()
                await super().work(stop)
            except psycopg.OperationalError:
                await anyio.sleep(0.2)

    async def _settle(self) -> None:
        """What it had prepared when it was cut off would hold its locks for ever."""
        async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as connection:
            cursor = await connection.execute(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND gid LIKE %s",
                [f"p{self._number}\\_%"],
            )
            for (name,) in await cursor.fetchall():
                await connection.execute(f"ROLLBACK PREPARED '{name}'")


async def run(mine: Servers, plan: Plan) -> Outcome:
    """Run one seed; AssertionError where anything is not as it must be."""
    began = time.monotonic()
    name = f"kills_{plan.seed}_{secrets.token_hex(3)}"
    await execute(mine.pg.dsn(), f"CREATE DATABASE {name}")
    dsn, done, kept = mine.pg.dsn(name), Counter[str](), list[Readings]()
    config = source(dsn, mine.nats.url)
    await made(dsn, ROWS)
    bridge = Bridge(throwaway_folder(), toml(config), module="tests.reading.small")
    try:
        with anyio.fail_after(150):
            await bridge.start(_armed(plan.faults[:1]))
            await settled(config)
            async with anyio.create_task_group() as tasks:
                stop = anyio.Event()
                writers = [Lasting(dsn, n, random.Random(f"{plan.seed}/{n}"), ROWS) for n in range(WRITERS)]
                for writer in writers:
                    tasks.start_soon(writer.work, stop)
                await _ask(config)
                for number, fault in enumerate(plan.faults):
                    kept.append(await _happens(mine, config, bridge, fault))
                    if fault.what in AT or _armed(plan.faults[number + 1 :]):
                        await _started(bridge, _armed(plan.faults[number + 1 :]))
                    done[fault.what] += 1
                assert await until(lambda: _all_read(config), seconds=60, every=0.1), "the snapshots come to no end"
                stop.set()
            await settled(config)
            await bridge.stop()
        assert "Traceback" not in bridge.text, bridge.text[-3000:]
    finally:
        await bridge.close()
    found = await agrees(config)
    for table in TABLES:
        done["reads"] += never_back(found, table)
        _, rows = from_last_begin(found, table)
        await same(dsn, table, rows)
        for readings in kept:
            _resumed([one for one in found if one[1].table == table], readings[table])
    await execute(dsn, f"SELECT pg_drop_replication_slot('{config.source.slot}')")
    await execute(mine.pg.dsn(), f"DROP DATABASE {name} WITH (FORCE)")
    return Outcome(len(found), done, time.monotonic() - began)


def _armed(coming: list[Fault]) -> str:
    """The failpoint with which the bridge is started before a fault."""
    return f"{coming[0].what}:kill:{coming[0].nth}" if coming and coming[0].what in AT else ""


async def _started(bridge: Bridge, failpoint: str) -> None:
    if bridge.running:
        await bridge.end(signal.SIGKILL)
    await bridge.start(failpoint)


async def _ask(config: Config) -> None:
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        for table in TABLES:
            await asking.ask(state, config.source.name, ("public", table))


async def _happens(mine: Servers, config: Config, bridge: Bridge, fault: Fault) -> Readings:
    """Wait for a fault's moment and let it happen; how far each reading was then. Tables that have been read before it
    came are asked for once more."""
    rows = fault.nth * 25 if fault.what in SERVERS else 9 * ROWS

    async def there() -> bool:
        found = await _readings(config)
        if not any(found.values()) and bridge.running:
            await _ask(config)
            return False
        return not bridge.running or sum(one.rows if one else ROWS for one in found.values()) >= rows

    assert await until(there, seconds=60, every=0.02), f"{fault} does not come"
    kept = await _readings(config)
    if fault.what == "nats":
        await mine.nats.kill()
        await mine.nats.start()
    elif fault.what == "backend":
        [(pid,)] = await execute(
            str(config.source.dsn),
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'bridge' AND datname = current_database()"
            " ORDER BY backend_type = 'walsender', query_start DESC LIMIT 1",
        )
        os.kill(pid, signal.SIGKILL)
    elif fault.what == "postmaster":
        await mine.pg.kill()
        await mine.pg.start()
    elif fault.what == "immediate":
        await mine.pg.restart("immediate")
    else:
        assert await bridge.ended() == -signal.SIGKILL
    return kept


async def _readings(config: Config) -> Readings:
    async with broker_of(config) as broker:
        known = await asking.tables(await State.open(broker, config.state.bucket), config.source.name)
    found = {table: known["public", table].again for table in TABLES}
    assert not [one for one in found.values() if one is not None and one.state == "failed"], found
    return found


async def _all_read(config: Config) -> bool:
    return not any((await _readings(config)).values())


def _resumed(found: Found, kept: Again | None) -> None:
    """Assert that a reading went on behind what was noted of it when something was killed, and did not begin anew."""
    if kept is None or not kept.first_seq:
        return
    later = [one for one in found if one[0].seq > kept.first_seq]
    phases = [one.phase for _, one in later if one.phase]
    assert phases[0] == "end", f"begun anew: {kept}"
    mine = list(takewhile(lambda one: one[1].phase != "begin", later))
    moved = {key.encode() for key in kept.moved} | {
        bytes(one.key) for _, one in mine if one.unchanged and event.old_key(one) != bytes(one.key)
    }
    reads = (one for message, one in mine if one.op == "read" and message.seq > kept.seq)
    first = next((one for one in reads if bytes(one.key) not in moved), None)
    if kept.after and not kept.last and first is not None and first.partition is None:
        assert _place(first.key, kept) > _place(dict(zip(kept.key, kept.after, strict=True)), kept), kept


def _place(key: Any, kept: Again) -> list[Any]:
    """A key as its index sorts it: numbers, and words of ASCII."""
    values = key if isinstance(key, dict) else msgspec.json.decode(key)
    return [int(values[name]) if name in ("id", "n") else values[name] for name in kept.key]


if __name__ == "__main__":
    chosen = seeds.parser("python -m tests.reading.kills", seeds=20, jobs=2).parse_args()
    tally = Tally("events", "python -m tests.reading.kills --seeds 1 --seed")
    sys.exit(seeds.go(chosen, tally, servers, planned, run))
