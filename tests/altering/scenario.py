"""One seed: a table that is altered between its changes, while a bridge is stopped or runs, and its log compared."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio

from bridge.config import Config, Table
from bridge.embedded import until
from bridge.errors import Contradiction
from bridge.pipeline import judging
from bridge.source import connection
from bridge.source.shapes import read
from bridge.stream import state, subjects
from tests.altering.checker import MOST, Comparison, shown
from tests.altering.steps import EXCLUDED, OTHER, Shape, Writer, made
from tests.crash.tally import Outcome
from tests.oracle import agrees
from tests.reading.scenario import Servers
from tests.reading.steps import ask
from tests.running import bridge, complete, execute, messages, settled, source, state_of, statuses

ROOT = ("public", "t")


class Plan(NamedTuple):
    """What a seed does: with which table, and how many transactions while the bridge first runs, in each time that it
    is stopped, and in each that it runs again."""

    seed: int
    shape: Shape
    savepoints: bool
    first: int
    away: list[int]
    back: int


def planned(seed: int) -> Plan:
    """The plan of a seed."""
    choose = random.Random(seed)
    shape = Shape(parted=choose.random() < 0.4, full=choose.random() < 0.4, excluded=choose.random() < 0.4)
    savepoints, live = choose.random() < 0.5, choose.random() < 0.35
    away = [choose.randint(3, 9) for _ in range(choose.randint(1, 2))]
    first, back = (choose.randint(3, 10), 3) if live else (0, 0)
    shape = shape._replace(again=choose.random() < 0.25)
    return Plan(seed, shape, savepoints, first, away, back)


async def run(mine: Servers, plan: Plan) -> Outcome:
    """Run one seed; AssertionError where anything is not as it must be."""
    began, name = time.monotonic(), f"altering_{plan.seed}_{secrets.token_hex(3)}"
    await execute(mine.pg.dsn(), f"CREATE DATABASE {name}")
    dsn = mine.pg.dsn(name)
    names = [".".join(ROOT), *([f"public.{OTHER}"] if plan.shape.again else [])]
    tables = dict.fromkeys(names, Table(exclude=[EXCLUDED])) if plan.shape.excluded else {}
    config = source(dsn, mine.nats.url, table=tables)
    await execute(dsn, *made(plan.shape))
    writer = Writer(plan.shape, random.Random(f"{plan.seed}/writer"), savepoints=plan.savepoints)
    try:
        async with writer.connected(dsn):
            first = await writer.catalogue()
            with anyio.fail_after(150):
                refused = await _written(config, writer, plan)
        comparison = Comparison(first, writer.ever, plan.shape, savepoints=plan.savepoints, replaced=writer.replaced)
        await _compared(config, writer, comparison, part=refused)
    except Exception as error:
        error.add_note("\n".join(["what was done:", *writer.said]))
        raise
    await execute(dsn, f"SELECT pg_drop_replication_slot('{config.source.slot}')")
    await execute(mine.pg.dsn(), f"DROP DATABASE {name} WITH (FORCE)")
    return Outcome(len(writer.truth), writer.done, time.monotonic() - began)


async def _written(config: Config, writer: Writer, plan: Plan) -> bool:
    """Let the writer work, and the bridge put all of it into the log; whether the bridge refused to go on, for another
    column may be the excluded one."""
    try:
        async with _running(config, writer):
            await writer.work(plan.first)
        for transactions in plan.away:
            await writer.work(transactions)
            async with _running(config, writer):
                await writer.work(plan.back)
    except Contradiction as error:
        if not plan.shape.excluded or not _refuses(str(error)):
            raise
        writer.done["contradiction"] += 1
        return True
    return False


def _refuses(why: str) -> bool:
    """Whether the bridge goes on only once a person has said which column may leave."""
    return f"no column {EXCLUDED} any more" in why


@asynccontextmanager
async def _running(config: Config, writer: Writer) -> AsyncIterator[None]:
    """A bridge during the block, and until the log has all of it and what must be read again has been."""
    writer.said.append("-- the bridge starts")
    async with bridge(config):
        if not writer.truth:
            await settled(config)
        yield
        await settled(config)
        failed = await _read_again(config)
    writer.said.append("-- the bridge is stopped")
    if failed:
        raise Contradiction(failed, "a reading has failed of it")


async def _read_again(config: Config) -> str:
    """Waits until the bridge has judged the table as it is now, and has read it once more where it must; why that has
    failed, if it has."""
    key = subjects.shape_key(config.source.name, *ROOT)

    async def judged() -> bool:
        async with connection.connect(config.source.dsn) as sql:
            _, [today] = await read(sql, ROOT)
        async with state_of(config) as bucket:
            found = await bucket.get(key, state.Shape)
        return found is not None and judging.shape(today, found[0]) == found[0]

    async def over() -> bool:
        again = (await statuses(config))[ROOT[1]].again
        return again is None or again.state == "failed"

    await until(judged, 30, "the table is judged as it is now")
    await until(over, 60, "the table has been read again")
    again = (await statuses(config))[ROOT[1]].again
    if again is not None and again.state == "failed":
        return again.why
    await complete(config)
    return ""


async def _compared(config: Config, writer: Writer, comparison: Comparison, *, part: bool) -> None:
    """AssertionError where the log is not as it must be; `part`: the bridge refused to go on."""
    found = await messages(config)
    lines = list(comparison.differences(found, writer.truth, part=part))
    if comparison.uncertain:
        writer.done["uncertain"] += comparison.uncertain
    if comparison.withheld:
        writer.done["withheld"] += comparison.withheld
    try:
        if not part:
            await _replayed(config, writer, withheld=comparison.withheld > 0)
    except AssertionError as unlike:
        lines.append(f"replayed: {unlike}")
    if lines:
        error = AssertionError("\n".join([f"{len(lines)} differences", *lines[:MOST]]))
        events = [f"{message.seq} {shown(one)}" for message, one in found if one.table == ROOT[1]]
        error.add_note("\n".join(["the log has:", *events]))
        raise error


async def _replayed(config: Config, writer: Writer, *, withheld: bool) -> None:
    """The log gives the table: where values were withheld, once somebody has had it read again, if it may be."""
    if withheld:
        async with bridge(config):
            await settled(config)
            await ask(config, ROOT[1])
            failed = await _read_again(config)
        assert not failed or _refuses(failed), failed
        if failed:
            writer.done["contradiction"] += 1
            return
    await agrees(config, strict=False, rewritten=[ROOT[1], OTHER])
