"""The faults, one function each. A fault happens once, at moments of chance, and leaves all parts running.

Each belongs to the part that it happens to: two at a time are chosen for different parts only.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import anyio

from bridge.embedded import until
from bridge.errors import EXIT_CONTRADICTION, BridgeError, Unavailable
from bridge.failpoints import POINTS
from bridge.index.generation import Generation
from bridge.stream.server import API, Broker
from tests.crash.process import Bridge, is_stopped
from tests.crash_index.load import KINDS, added
from tests.crash_index.world import Reader, World
from tests.running import execute

Happen = Callable[[World, random.Random], Awaitable[None]]


class Fault(NamedTuple):
    """`weight`: how often it is chosen among all."""

    part: str
    happen: Happen
    weight: int


FAULTS: dict[str, Fault] = {}


def fault(part: str, weight: int = 2) -> Callable[[Happen], Happen]:
    """Enter a function as the fault of its name."""

    def enter(happen: Happen) -> Happen:
        FAULTS[happen.__name__] = Fault(part, happen, weight)
        return happen

    return enter


async def moment(choose: random.Random, longest: float) -> None:
    """Some time: nothing is waited for, what follows may hit anything."""
    await anyio.sleep(choose.uniform(0, longest))


# -- the readers


@fault("reader", 4)
async def kill_reader(world: World, choose: random.Random) -> None:
    reader = choose.choice(world.readers)
    await reader.process.end(signal.SIGKILL)
    await moment(choose, 0.5)
    await reader.process.start()


@fault("reader")
async def end_reader(world: World, choose: random.Random) -> None:
    reader = choose.choice(world.readers)
    early = reader.process.silent
    code = await reader.process.end()
    assert code == 0 or (early and code == -signal.SIGTERM), f"a reader ended with code {code} on SIGTERM"
    await moment(choose, 0.5)
    await reader.process.start()


@fault("reader", 3)
async def pause_reader(world: World, choose: random.Random) -> None:
    """At times for longer than its lease: where another stands by, it wakes up as a zombie."""
    process = choose.choice(world.readers).process
    process.send(signal.SIGSTOP)
    await anyio.sleep(choose.choice([choose.uniform(0, 3), choose.uniform(10.5, 14)]))
    process.send(signal.SIGCONT)


@fault("reader", 3)
async def kill_and_send_late(world: World, choose: random.Random) -> None:
    """What a killed reader had sent to the search engine arrives when its successor is at work."""
    reader = choose.choice(world.readers)
    reader.search.hold_present()
    await moment(choose, 1.5)
    await reader.process.end(signal.SIGKILL)
    await reader.process.start()
    await moment(choose, 4)
    reader.search.release()


@fault("reader", 8)
async def kill_reader_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(READER)
    await reader_at_failpoint(world, choose, point, "kill", nth(choose, point))


@fault("reader", 3)
async def stop_reader_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(READER)
    await reader_at_failpoint(world, choose, point, "stop", nth(choose, point))


@fault("reader")
async def cut_reader_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(READER)
    await reader_at_failpoint(world, choose, point, "cut", nth(choose, point))


READER = [name for name in POINTS if name.startswith("index.") and name not in ("index.begun", "index.buried")]
FIRST = [name for name in POINTS if name.startswith(("rebuild.", "switch.", "index.begun"))]
# A first build has no older generation to remove.
FIRST = [name for name in FIRST if name not in ("switch.consumer", "switch.index", "switch.forgotten")]
REBUILD = [name for name in POINTS if name.startswith(("rebuild.", "switch."))]
OFTEN = ("index.sending", "index.sent", "index.reached", "index.acked", "index.stored", "rebuild.replaying")
REACHED_WITHIN = 15.0
SAID = "failpoint "
HELD = "is held by"


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
    hit = await reached(first.process, said)
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


async def reached(process: Bridge, said: int) -> bool:
    """Whether the armed point is reached in time; the process may then be stopped, dead, or at work again."""
    try:
        await until(lambda: process.text.count(SAID) > said or not process.running, REACHED_WITHIN, "a point")
    except TimeoutError:
        return False
    if process.text.count(SAID) == said:
        return False
    if process.text.rpartition(SAID)[2].partition("\n")[0].endswith(": stop"):
        await until(lambda: process.stopped, 5, "the process is stopped")
    return True


# -- rebuilds


@fault("rebuild", 4)
async def reindex(world: World, choose: random.Random) -> None:
    await rebuilt(world, choose)


@fault("rebuild", 4)
async def kill_reindex(world: World, choose: random.Random) -> None:
    """At any moment; then another one, or the reader is left with what there is."""
    name, keep = _target(world, choose)
    async with world.rebuilding:
        process = await _start(world, name, keep)
        await moment(choose, 4)
        if process.running:
            await process.end(signal.SIGKILL)
        await _over(world, process)
    if choose.random() < 0.6:
        await rebuilt(world, choose)


@fault("rebuild", 8)
async def kill_reindex_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(REBUILD)
    await reindex_at_failpoint(world, choose, point, "kill", nth(choose, point))


@fault("rebuild", 4)
async def stop_reindex_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(REBUILD)
    await reindex_at_failpoint(world, choose, point, "stop", nth(choose, point))


@fault("rebuild")
async def cut_reindex_at_failpoint(world: World, choose: random.Random) -> None:
    point = choose.choice(REBUILD)
    await reindex_at_failpoint(world, choose, point, "cut", nth(choose, point))


async def reindex_at_failpoint(world: World, choose: random.Random, point: str, action: str, nth: int) -> bool:
    """Let a rebuild come to a failpoint; whether it was reached."""
    name, keep = _target(world, choose)
    again = choose.random() < 0.6
    # A reader's own first build would keep it out.
    await world.built(name)
    async with world.rebuilding:
        process = await _start(world, name, keep, f"{point}:{action}:{nth}")
        hit = await _until_hit(process)
        overtaken = False
        if process.stopped:
            await anyio.sleep(choose.choice([choose.uniform(0, 2), 11]))
            if choose.random() < 0.6:
                other = await _start(world, name, keep)
                overtaken = await _ended(world, other) == 0
                await _over(world, other)
            process.send(signal.SIGCONT)
        code = await process.ended(120)
        # A zombie whose lease another has had meanwhile may say so; a reader may be at the switch of one before.
        fine = {-signal.SIGKILL} if action == "kill" and hit else {0, 3} if overtaken or HELD in process.text else {0}
        assert code in fine, f"reindex with {action} at {point} ended with code {code}:\n{process.text[-1500:]}"
        await _over(world, process)
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
    name, keep = _target(world, choose)
    async with world.rebuilding:
        while True:
            process = await _start(world, name, keep)
            code = await _ended(world, process)
            busy = code == EXIT_CONTRADICTION and HELD in process.text
            assert code == 0 or busy, f"reindex ended with code {code}:\n{process.text[-1500:]}"
            await _over(world, process)
            if not busy:
                return
            await anyio.sleep(0.5)


def _target(world: World, choose: random.Random) -> tuple[str, bool]:
    """The index to rebuild, and whether to keep what it had."""
    return choose.choice(list(world.config.index)), choose.random() < 0.3


async def _ended(world: World, process: Bridge) -> int:
    try:
        return await process.ended(120)
    except TimeoutError:
        world.said.append(process.text)
        raise


async def _start(world: World, name: str, keep: bool, failpoint: str = "") -> Bridge:
    process = world.rebuilder.command("reindex", name, *["--keep-old"] * keep)
    await process.start(failpoint)
    return process


async def _over(world: World, process: Bridge) -> None:
    world.said.append(process.text)
    await process.close()


# -- the bridge


@fault("bridge")
async def kill_bridge(world: World, choose: random.Random) -> None:
    await world.bridge.end(signal.SIGKILL)
    await moment(choose, 0.5)
    await world.bridge.start()


@fault("bridge", 1)
async def end_bridge(world: World, choose: random.Random) -> None:
    await world.bridge.end()
    await moment(choose, 2)
    await world.bridge.start()


# -- the search engine


@fault("engine")
async def kill_engine(world: World, choose: random.Random) -> None:
    await world.node.kill()
    await moment(choose, 1)
    await world.node.start()


@fault("engine", 1)
async def restart_engine(world: World, choose: random.Random) -> None:
    await world.node.stop()
    await moment(choose, 0.5)
    await world.node.start()


@fault("engine")
async def pause_engine(world: World, choose: random.Random) -> None:
    stopped = world.node_pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    await until(lambda: all(map(is_stopped, stopped)), 5, "the engine is stopped")
    await anyio.sleep(choose.choice([choose.uniform(0, 2), choose.uniform(7, 12)]))
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


# -- the broker


@fault("broker", 3)
async def kill_broker(world: World, choose: random.Random) -> None:
    await world.nats.kill()
    await moment(choose, 1)
    await world.nats.start()


@fault("broker", 1)
async def restart_broker(world: World, choose: random.Random) -> None:
    await world.nats.stop()
    await moment(choose, 0.5)
    await world.nats.start()


@fault("broker", 1)
async def pause_broker(world: World, choose: random.Random) -> None:
    world.nats.signal(signal.SIGSTOP)
    await anyio.sleep(choose.choice([choose.uniform(0, 2), choose.uniform(5.5, 7)]))
    world.nats.signal(signal.SIGCONT)


# -- the network


def _anyone(world: World, choose: random.Random) -> Reader:
    return choose.choice([*world.readers, *world.readers, world.rebuilder])


@fault("network", 4)
async def cut(world: World, choose: random.Random) -> None:
    for _ in range(choose.randint(1, 4)):
        await choose.choice(_anyone(world, choose).proxies).cut()
        await moment(choose, 0.7)


@fault("network")
async def refuse(world: World, choose: random.Random) -> None:
    proxy = choose.choice(_anyone(world, choose).proxies)
    await proxy.refuse()
    await moment(choose, 2)
    proxy.accept()


@fault("network", 3)
async def hold(world: World, choose: random.Random) -> None:
    """At times for longer than a lease: what was held then comes after what the successor did."""
    proxy = choose.choice(_anyone(world, choose).proxies)
    proxy.hold()
    await anyio.sleep(choose.choice([choose.uniform(0, 2.5), choose.uniform(8, 13)]))
    proxy.release()


@fault("network")
async def delay(world: World, choose: random.Random) -> None:
    proxies = choose.sample(_anyone(world, choose).proxies, choose.randint(1, 2))
    for proxy in proxies:
        proxy.delay = choose.uniform(0.01, 0.3)
    await moment(choose, 4)
    for proxy in proxies:
        proxy.delay = 0


@fault("network")
async def strand(world: World, choose: random.Random) -> None:
    """Half-open in one direction or both; a reset ends it, as when a firewall remembers."""
    proxy = choose.choice(_anyone(world, choose).proxies)
    way = choose.choice(["both", "server", "client"])
    proxy.strand(to_server=way != "client", to_client=way != "server")
    await moment(choose, 4)
    await proxy.cut()


# -- the consumers, behind their readers' backs


async def _behind(world: World, choose: random.Random, act: Callable[[Broker, Generation], Awaitable[None]]) -> None:
    """Do something to the consumer of a generation that is followed, if there is one and the broker is there."""
    try:
        async with world.connected() as (broker, state):
            followed = await world.followed(state)
            if followed:
                await act(broker, choose.choice(followed))
    except (BridgeError, TimeoutError):
        world.done["consumer not there"] += 1  # another fault may have taken away what it needs


@fault("consumer", 3)
async def delete_consumer(world: World, choose: random.Random) -> None:
    async def act(broker: Broker, generation: Generation) -> None:
        await broker.api(f"CONSUMER.DELETE.{generation.stream}.{generation.consumer}")

    await _behind(world, choose, act)


@fault("consumer", 3)
async def steal(world: World, choose: random.Random) -> None:
    """Somebody else pulls from the durable consumer, and may ack what he got, and with it all before it."""

    async def act(broker: Broker, generation: Generation) -> None:
        inbox = broker.nc.new_inbox()
        got = await broker.nc.subscribe(inbox)
        request = b'{"batch":%d,"expires":1500000000}' % choose.randint(1, 40)
        await broker.nc.publish(f"{API}.CONSUMER.MSG.NEXT.{generation.stream}.{generation.consumer}", request, inbox)
        acks = choose.random() < 0.5
        with anyio.move_on_after(2):
            while True:
                message = await got.next_msg(timeout=5)
                if acks and message.reply.startswith("$JS.ACK."):
                    await broker.nc.publish(message.reply)
        await broker.nc.flush()

    await _behind(world, choose, act)


@fault("consumer", 3)
async def reset_consumer(world: World, choose: random.Random) -> None:
    """Back, so that all comes again, or ahead, so that something is left out."""

    async def act(broker: Broker, generation: Generation) -> None:
        stream = await broker.stream(generation.stream)
        if stream is None:
            raise Unavailable("no stream", "")
        target = choose.randint(generation.first, max(generation.first, stream.last_seq))
        await broker.api(f"CONSUMER.RESET.{generation.stream}.{generation.consumer}", {"seq": target})

    await _behind(world, choose, act)
