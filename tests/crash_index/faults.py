"""The faults, one function each. A fault happens once, at moments of chance, and leaves all parts running.

Each belongs to the part that it happens to: two at a time are chosen for different parts only.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Awaitable, Callable

import anyio
import nats.errors

from bridge.embedded import until
from bridge.errors import BridgeError, Unavailable
from bridge.index.generation import Generation
from bridge.stream.server import API, Broker
from tests.crash.process import is_stopped
from tests.crash.registry import Faults, moment
from tests.crash_index.points import (
    READER,
    REBUILD,
    nth,
    over,
    reader_at_failpoint,
    rebuilt,
    reindex_at_failpoint,
    start,
    target,
)
from tests.crash_index.world import Reader, World

FAULTS: Faults[World] = Faults()
fault = FAULTS.fault


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
    await reader.process.stop()
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


# -- rebuilds


@fault("rebuild", 4)
async def reindex(world: World, choose: random.Random) -> None:
    await rebuilt(world, choose)


@fault("rebuild", 4)
async def kill_reindex(world: World, choose: random.Random) -> None:
    """At any moment; then another one, or the reader is left with what there is."""
    name, keep = target(world, choose)
    async with world.rebuilding:
        process = await start(world, name, keep)
        await moment(choose, 4)
        if process.running:
            await process.end(signal.SIGKILL)
        await over(world, process)
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
    except (BridgeError, nats.errors.Error, TimeoutError):
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
