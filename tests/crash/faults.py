"""The faults, one function each. A fault happens once, at moments of chance, and leaves all parts running.

Each belongs to the part that it happens to: two at a time are chosen for different parts only.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread

from bridge.embedded import until
from bridge.errors import Unavailable
from bridge.failpoints import POINTS
from bridge.stream.tail import Tail, read_tail
from tests.crash.process import SAID, is_stopped
from tests.crash.registry import Faults, moment
from tests.crash.world import Forgotten, World
from tests.running import broker_of, execute

FAULTS: Faults[World] = Faults()
fault = FAULTS.fault


# -- the bridge


@fault("bridge", 4)
async def kill_bridge(world: World, choose: random.Random) -> None:
    await world.bridge.end(signal.SIGKILL)
    await moment(choose, 0.5)
    await world.bridge.start()


@fault("bridge")
async def end_bridge(world: World, choose: random.Random) -> None:
    await world.bridge.stop()
    await moment(choose, 0.5)
    await world.bridge.start()


@fault("bridge")
async def pause_bridge(world: World, choose: random.Random) -> None:
    world.bridge.send(signal.SIGSTOP)
    await moment(choose, 3)
    world.bridge.send(signal.SIGCONT)


@fault("bridge", 3)
async def kill_while_refused(world: World, choose: random.Random) -> None:
    """Long enough for a checkpoint that tells of more than the stream has."""
    async with refusing(world):
        await anyio.sleep(choose.uniform(1, 3))
        await world.bridge.end(signal.SIGKILL)
    await world.bridge.start()


@fault("bridge", 3)
async def kill_and_send_late(world: World, choose: random.Random) -> None:
    """What the killed bridge had sent to the broker arrives when its successor is at work."""
    world.broker.hold_present()
    await moment(choose, 1)
    await world.bridge.end(signal.SIGKILL)
    await world.bridge.start()
    await moment(choose, 2.5)
    world.broker.release()


@fault("bridge", 3)
async def kill_and_send_between(world: World, choose: random.Random) -> None:
    """What the killed bridge had sent arrives when its successor has read the stream's end, and sent nothing yet."""
    bridge = world.bridge
    world.broker.hold_present()
    await moment(choose, 1)
    await bridge.end(signal.SIGKILL)
    said = bridge.text.count(SAID)
    await bridge.start("replication.started:stop")
    hit = await _hit(world, said, REACHED_WITHIN)
    world.broker.release()
    await anyio.sleep(0.5)
    if hit:
        bridge.send(signal.SIGCONT)
    else:  # within a long snapshot: it must not stop later on, when nobody wakes it
        await bridge.end(signal.SIGKILL)
        await bridge.start()


@fault("bridge", 10)
async def kill_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(STREAMING)
    await at_failpoint(world, choose, point, "kill", nth(choose, point))


@fault("bridge")
async def stop_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(STREAMING)
    await at_failpoint(world, choose, point, "stop", nth(choose, point))


@fault("bridge")
async def cut_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(STREAMING)
    await at_failpoint(world, choose, point, "cut", nth(choose, point))


ONCE_A_SNAPSHOT = ("snapshot.", "slot.", "table.")
SNAPSHOT = [name for name in POINTS if name.startswith(ONCE_A_SNAPSHOT)]
COMPACT = [name for name in POINTS if name.startswith("purge.")]
# Of tables that are read while the stream flows, and of what DDL does: tests/integration kills there
# (test_incremental.py, test_rewrites_meet.py).
READING = [name for name in POINTS if name.startswith(("reading.", "rewrite."))]
# Of search indexes, which a bridge has nothing to do with (tests/crash_index).
INDEX = [name for name in POINTS if name.startswith(("index.", "rebuild.", "switch.", "back."))]
STREAMING = [name for name in POINTS if name not in (*SNAPSHOT, *COMPACT, *READING, *INDEX)]
# The highest time that is chosen, by what comes before the point's dot; all others are reached once a start.
OFTEN = {"batch": 20, "transaction": 200, "checkpoint": 2, "doubt": 2}
REACHED_WITHIN = 6.0


def nth(choose: random.Random, point: str) -> int:
    """At which time of reaching the point something happens."""
    if point in ("table.rows", "table.began", "table.read"):
        return choose.randint(1, 5)
    return choose.randint(1, OFTEN.get(point.partition(".")[0], 1))


async def at_failpoint(
    world: World, choose: random.Random, point: str, action: str, nth: int, within: float = REACHED_WITHIN
) -> bool:
    """Start the bridge with a failpoint armed, see it hit, and go on with none; whether it was reached in time.

    A snapshot's points are reached only where no snapshot is finished yet: there the bridge must not run yet, or be
    within its snapshot.
    """
    bridge = world.bridge
    if bridge.running:
        await bridge.end(signal.SIGKILL)
    said = bridge.text.count(SAID)
    await bridge.start(f"{point}:{action}:{nth}")
    async with _circumstances(world, point):
        hit = await _hit(world, said, within)
        if bridge.stopped:
            await moment(choose, 1.5)
            bridge.send(signal.SIGCONT)
    if action == "kill" and hit:
        assert await bridge.ended() == -signal.SIGKILL
    elif bridge.running:
        await moment(choose, 0.3)
        await bridge.end(signal.SIGKILL)
    world.done[f"{action} at {point}" if hit else "failpoint not reached"] += 1
    await bridge.start()
    return hit


async def _hit(world: World, said: int, within: float) -> bool:
    """Whether the armed point is reached in time; the bridge may then be stopped, dead, or at work again."""
    return await world.bridge.reached(said, within)


async def _streaming_or_hit(world: World) -> None:
    """On a busy machine a start can be in doubt by itself, and reach the point before it streams."""
    bridge = world.bridge
    streaming, said = bridge.text.count("streaming"), bridge.text.count(SAID)
    await until(
        lambda: bridge.text.count("streaming") > streaming or bridge.text.count(SAID) > said or not bridge.running,
        30,
        "the bridge streams",
    )


@asynccontextmanager
async def _circumstances(world: World, point: str) -> AsyncIterator[None]:
    """What it takes to reach some points."""
    if point.startswith("doubt."):
        await _streaming_or_hit(world)
        async with refusing(world):
            yield
    elif point == "drain.done":
        await _streaming_or_hit(world)
        world.bridge.send(signal.SIGTERM)
        yield
    else:
        yield


# -- the broker


@fault("broker", 4)
async def kill_broker(world: World, choose: random.Random) -> None:
    await world.nats.kill()
    await moment(choose, 1)
    await world.nats.start()


@fault("broker")
async def restart_broker(world: World, choose: random.Random) -> None:
    await world.nats.stop()
    await moment(choose, 0.5)
    await world.nats.start()


@fault("broker")
async def pause_broker(world: World, choose: random.Random) -> None:
    world.nats.signal(signal.SIGSTOP)
    # At times longer than an answer is waited for.
    await anyio.sleep(choose.choice([choose.uniform(0, 2), choose.uniform(5.5, 7)]))
    world.nats.signal(signal.SIGCONT)


@fault("broker", 4)
async def forget_last_second(world: World, choose: random.Random) -> None:
    """What a power failure does to a broker that does not sync always: what it has acked since a moment ago is gone,
    from the stream and from the state bucket."""
    bridge, store = world.bridge, world.nats.store_dir
    # Not `said`: another fault may have killed the bridge just now.
    await until(lambda: "streaming" in bridge.text, 60, "the bridge streams")
    kept, before = store.with_name("kept"), bridge.text
    world.nats.signal(signal.SIGSTOP)
    await until(lambda: is_stopped(world.nats.pid), 5, "nats-server is stopped")
    await anyio.to_thread.run_sync(shutil.copytree, store, kept)
    world.nats.signal(signal.SIGCONT)
    until_here = (await _tail(world)).seq
    await moment(choose, hold_back(world) - 0.1)
    tail = await _tail(world)
    await world.nats.kill()
    if tail.seq > until_here:
        said = bridge.text
        reading = _reads(before) or "snapshot begins" in said[len(before) :]
        world.forgotten.append(Forgotten(tail, said.count("slot created"), until_here, reading))
    shutil.rmtree(store)
    kept.rename(store)
    await moment(choose, 0.5)
    await world.nats.start()


def _reads(said: str) -> bool:
    """Whether the bridge's last session has begun to read a table that it has not read to its end."""
    session = said[said.rfind(" streaming ") :]
    return session.count("snapshot begins") > session.count("snapshot done")


async def _tail(world: World) -> Tail:
    async with broker_of(world.config) as broker:
        return await read_tail(broker, world.config.stream.name)


def hold_back(world: World) -> float:
    """Seconds that PostgreSQL is held back at least."""
    seconds = world.config.stream.hold_back
    assert seconds, "a broker that syncs always forgets nothing"
    return seconds


@fault("broker")
async def refuse_messages(world: World, choose: random.Random) -> None:
    async with refusing(world):
        await moment(choose, 2)


@asynccontextmanager
async def refusing(world: World) -> AsyncIterator[None]:
    """The stream takes no message meanwhile, as if it were full."""
    await _largest(world, 10)
    try:
        yield
    finally:
        await _largest(world, -1)


async def _largest(world: World, size: int) -> None:
    async def set_it() -> bool:
        try:
            async with broker_of(world.config) as broker:
                if (stream := await broker.stream(world.config.stream.name)) is not None:
                    await broker.api(f"STREAM.UPDATE.{stream.name}", stream.config | {"max_msg_size": size})
        except Unavailable:
            return False
        return True

    await until(set_it, 30, "the broker is there")  # another fault may have taken it away


# -- PostgreSQL


@fault("postgres", 4)
async def crash_postgres(world: World, choose: random.Random) -> None:
    await world.pg.stop(mode="immediate")
    await moment(choose, 1)
    await world.pg.start()


@fault("postgres")
async def kill_postmaster(world: World, choose: random.Random) -> None:
    await world.pg.kill()
    await moment(choose, 1)
    await world.pg.start()


@fault("postgres")
async def restart_postgres(world: World, choose: random.Random) -> None:
    await world.pg.stop(mode="fast")
    await moment(choose, 0.5)
    await world.pg.start()


@fault("postgres")
async def pause_postmaster(world: World, choose: random.Random) -> None:
    world.pg.signal(signal.SIGSTOP)
    await moment(choose, 3)
    world.pg.signal(signal.SIGCONT)


@fault("postgres")
async def pause_walsender(world: World, choose: random.Random) -> None:
    for pid in await _walsender(world):
        os.kill(pid, signal.SIGSTOP)
        try:
            await moment(choose, 3)
        finally:
            os.kill(pid, signal.SIGCONT)


@fault("postgres")
async def end_walsender(world: World, choose: random.Random) -> None:
    for pid in await _walsender(world):
        await moment(choose, 0.5)
        await execute(world.pg.dsn(), f"SELECT pg_terminate_backend({pid})")


async def _walsender(world: World) -> list[int]:
    slot = world.config.source.slot
    found = await execute(
        world.pg.dsn(),
        f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{slot}' AND active_pid IS NOT NULL",
    )
    return [pid for (pid,) in found]


# -- the network


@fault("network", 4)
async def cut(world: World, choose: random.Random) -> None:
    for _ in range(choose.randint(1, 3)):
        await choose.choice(world.proxies).cut()
        await moment(choose, 0.7)


@fault("network")
async def refuse(world: World, choose: random.Random) -> None:
    proxy = choose.choice(world.proxies)
    await proxy.refuse()
    await moment(choose, 1.5)
    proxy.accept()


@fault("network")
async def hold(world: World, choose: random.Random) -> None:
    proxy = choose.choice(world.proxies)
    proxy.hold()
    await moment(choose, 2.5)
    proxy.release()


@fault("network")
async def delay(world: World, choose: random.Random) -> None:
    for proxy in choose.sample(world.proxies, choose.randint(1, 2)):
        proxy.delay = choose.uniform(0.01, 0.3)
    await moment(choose, 3)
    for proxy in world.proxies:
        proxy.delay = 0


@fault("network")
async def throttle(world: World, choose: random.Random) -> None:
    proxy = choose.choice(world.proxies)
    proxy.rate = choose.choice([5_000, 50_000, 500_000])
    await moment(choose, 3)
    proxy.rate = 0


@fault("network")
async def strand(world: World, choose: random.Random) -> None:
    """Half-open in one direction or both; a reset ends it, as when a firewall remembers."""
    proxy = choose.choice(world.proxies)
    way = choose.choice(["both", "server", "client"])
    proxy.strand(to_server=way != "client", to_client=way != "server")
    await moment(choose, 3)
    await proxy.cut()
