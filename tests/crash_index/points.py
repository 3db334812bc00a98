"""Readers and rebuilds that come to an armed failpoint, and rebuilds as such."""

from __future__ import annotations

import random
import signal

import anyio

from bridge.embedded import until
from bridge.errors import EXIT_CONTRADICTION
from bridge.failpoints import POINTS
from tests.crash.process import SAID, Bridge
from tests.crash.registry import moment
from tests.crash_index.load import KINDS, added
from tests.crash_index.world import World
from tests.running import execute

READER = [name for name in POINTS if name.startswith("index.") and name not in ("index.begun", "index.buried")]
FIRST = [name for name in POINTS if name.startswith(("rebuild.", "switch.", "index.begun"))]
# A first build has no older generation to remove.
FIRST = [name for name in FIRST if name not in ("switch.consumer", "switch.index", "switch.forgotten")]
REBUILD = [name for name in POINTS if name.startswith(("rebuild.", "switch."))]
OFTEN = ("index.sending", "index.sent", "index.reached", "index.acked", "index.stored", "rebuild.replaying")
REACHED_WITHIN = 15.0
HELD = ("is being rebuilt by", "is being built for", "has taken lease.reindex")


def nth(choose: random.Random, point: str) -> int:
    """At which time of reaching the point something happens."""
    return choose.randint(1, 6) if point in OFTEN else 1


async def reader_at_failpoint(world: World, choose: random.Random, point: str, action: str, nth: int) -> bool:
    """Let one reader alone come to an armed failpoint, and go on with all; whether it was reached in time."""
    for reader in world.readers:
        if reader.process.running:
            await reader.process.end(signal.SIGKILL)
    first, *others = world.readers
    said = first.process.text.count(SAID)
    await first.process.start(f"{point}:{action}:{nth}")
    following = first.process.text.count("following")
    with anyio.move_on_after(REACHED_WITHIN):
        await until(
            lambda: first.process.text.count("following") > following or not first.process.running, 60, "it follows"
        )
    await circumstances(world, choose, point)
    hit = await first.process.reached(said, REACHED_WITHIN)
    for other in others:
        await other.process.start()
    if first.process.stopped:
        # A process that is only stopped loses its lease after ten seconds to another that stands by.
        await anyio.sleep(choose.choice([choose.uniform(0, 2), choose.uniform(11, 14)]))
        first.process.send(signal.SIGCONT)
    if action == "kill" and hit:
        assert await first.process.ended() == -signal.SIGKILL
        await moment(choose, 0.5)
        await first.process.start()
    elif not hit:
        await first.process.end(signal.SIGKILL)
        await first.process.start()
    world.done[f"{action} at {point}" if hit else f"{point} not reached"] += 1
    return hit


async def circumstances(world: World, choose: random.Random, point: str) -> None:
    """What it takes to reach some points."""
    table = choose.choice(list(world.choice.shapes))
    if point == "index.sweeping":
        await execute(world.dsn, f"TRUNCATE {table}")
    elif point == "index.grown":
        await execute(world.dsn, added(table, choose.randrange(len(KINDS))))


async def reindex_at_failpoint(world: World, choose: random.Random, point: str, action: str, nth: int) -> bool:
    """Let a rebuild come to a failpoint; whether it was reached."""
    name, keep = target(world, choose)
    again = choose.random() < 0.6
    # A reader's own first build would keep it out.
    await world.built(name)
    async with world.rebuilding:
        process = await start(world, name, keep, f"{point}:{action}:{nth}")
        hit = await _until_hit(process)
        overtaken = False
        if process.stopped:
            await anyio.sleep(choose.choice([choose.uniform(0, 2), 11]))
            if choose.random() < 0.6:
                other = await start(world, name, keep)
                overtaken = await _ended(world, other) == 0
                await over(world, other)
            process.send(signal.SIGCONT)
        code = await process.ended(120)
        # A zombie whose lease another has had meanwhile may say so; a reader may be at the switch of one before.
        fine = {-signal.SIGKILL} if action == "kill" and hit else {0, 3} if overtaken or _refused(process) else {0}
        assert code in fine, f"reindex with {action} at {point} ended with code {code}:\n{process.text[-1500:]}"
        await over(world, process)
    world.done[f"{action} at {point}" if hit else f"{point} not reached"] += 1
    if again:
        await rebuilt(world, choose)
    return hit


async def _until_hit(process: Bridge) -> bool:
    await until(lambda: SAID in process.text or not process.running, 90, "a rebuild comes to a point or ends")
    if SAID in process.text and process.text.rpartition(SAID)[2].partition("\n")[0].endswith(": stop"):
        await until(lambda: process.stopped, 5, "the process is stopped")
    return SAID in process.text


async def rebuilt(world: World, choose: random.Random) -> None:
    """A rebuild from its start to its end; one that meets a reader's own first build or repair waits for that."""
    name, keep = target(world, choose)
    async with world.rebuilding:
        while True:
            process = await start(world, name, keep)
            code = await _ended(world, process)
            busy = code == EXIT_CONTRADICTION and _refused(process)
            assert code == 0 or busy, f"reindex ended with code {code}:\n{process.text[-1500:]}"
            await over(world, process)
            if not busy:
                return
            await anyio.sleep(0.5)


def _refused(process: Bridge) -> bool:
    """Whether it has met another one, or a reader that has ended a switch in its place while it was stopped."""
    return any(text in process.text for text in HELD)


def target(world: World, choose: random.Random) -> tuple[str, bool]:
    """The index to rebuild, and whether to keep what it had."""
    return choose.choice(list(world.config.index)), choose.random() < 0.3


async def _ended(world: World, process: Bridge) -> int:
    try:
        return await process.ended(120)
    except TimeoutError:
        world.said.append(process.text)
        raise


async def start(world: World, name: str, keep: bool, failpoint: str = "") -> Bridge:
    process = world.rebuilder.command("reindex", name, *["--keep-old"] * keep)
    await process.start(failpoint)
    return process


async def over(world: World, process: Bridge) -> None:
    world.said.append(process.text)
    await process.close()
