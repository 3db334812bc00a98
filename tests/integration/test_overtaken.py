"""Commands on an index that meet another one: refused at once, or told that they were overtaken while they slept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import anyio
import pytest

from bridge.failpoints import VARIABLE
from bridge.index import rebuild as rebuilding
from bridge.index import switch
from bridge.index.place import site
from bridge.index.plan import Options, plan
from bridge.stream.lease import Busy
from bridge.waiting import until
from tests.crash.process import is_stopped
from tests.integration.feeding import Log

pytestmark = pytest.mark.anyio

OWN = 1.5
PROGRAM = f"""
import sys, uvloop
from bridge.index.back import back
from bridge.index.rebuild import rebuild
from bridge.stream import lease
from tests.integration.feeding import configured
what, tag, nats, engine = sys.argv[1:]
lease.OWN = {OWN}
uvloop.run({{"back": back, "reindex": rebuild}}[what](configured(tag, nats, engine), f"posts{{tag}}", [nats]))
"""


async def test_a_rebuild_beside_a_first_build_says_that_the_reader_is_at_it(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 10)
    inside, go_on = anyio.Event(), anyio.Event()
    count = rebuilding._Rebuild._count

    async def slow(self: Any, *args: Any, **kwargs: Any) -> int:
        inside.set()
        await go_on.wait()
        return await count(self, *args, **kwargs)

    monkeypatch.setattr(rebuilding._Rebuild, "_count", slow)
    async with quick.reading():
        await inside.wait()
        for ask in (quick.rebuild(), plan(site(quick.config, quick.name), quick.servers, Options())):
            with pytest.raises(Busy, match="is being built for the first time, by its reader, process") as refused:
                await ask
            assert f"where that has changed since, then: bridge reindex {quick.name}" in refused.value.remedy
        go_on.set()
        await quick.done()
        assert (await quick.rebuild()).generation == 2


async def asleep(log: Log, what: str, point: str, *, taken: bool = True) -> Any:
    """A command in a process of its own, stopped at a failpoint, whose lease has run out meanwhile."""
    url = log.config.index[log.name].url[0]
    command = [sys.executable, "-c", PROGRAM, what, log.name.removeprefix("posts"), log.servers[0], url]
    process = await anyio.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, VARIABLE: f"{point}:stop"},
    )  # fmt: skip

    async def stopped() -> bool:
        return is_stopped(process.pid)

    assert await until(stopped, seconds=30)
    await anyio.sleep(OWN)
    if taken:
        # As if the next one had waited for its ten seconds.
        await log.state.delete(site(log.config, log.name).lease("reindex"))
    return process


async def woken(process: Any) -> str:
    """What it says when it goes on and ends with an error."""
    process.send_signal(signal.SIGCONT)
    try:
        with anyio.fail_after(30):
            said = b"".join([part async for part in process.stderr]).decode()
            assert await process.wait() == 1, said
    finally:
        if process.returncode is None:
            process.kill()
    return said.rpartition("bridge.errors.")[2]


POINTS = ["index.leased", "rebuild.recorded", "rebuild.replaying", "rebuild.counted", "switch.due", "switch.moved"]


@pytest.mark.parametrize("point", POINTS)
async def test_a_rebuild_that_was_overtaken_in_its_sleep_ends_and_builds_nothing(quick: Log, point: str) -> None:
    await quick.posts(1, 20)
    await quick.rebuild()
    process = await asleep(quick, "reindex", point)
    other = await quick.rebuild()
    said = await woken(process)
    assert said.startswith("Fenced: "), said
    assert "bridge status" in said
    record = await quick.record()
    assert [(one.physical, one.state) for one in record.generations] == [(other.physical, "live")]
    assert list(await quick.engine.indexes(f"{quick.name}*")) == [other.physical]
    assert list(await quick.engine.indexes(quick.name)) == [other.physical]
    assert len(await quick.documents()) == 20


@pytest.mark.parametrize("point", ["back.chosen", "back.level", "back.recorded", "switch.due"])
async def test_a_way_back_that_was_overtaken_in_its_sleep_ends(quick: Log, point: str) -> None:
    await quick.posts(1, 20)
    await quick.rebuild()
    await quick.rebuild(keep_old=True)
    process = await asleep(quick, "back", point)
    other = await quick.rebuild(keep_old=True)
    said = await woken(process)
    assert said.startswith("Fenced: "), said
    assert list(await quick.engine.indexes(quick.name)) == [other.physical]
    assert (await quick.record()).physical == other.physical


async def test_a_rebuild_whose_lease_ran_out_while_nobody_wanted_it_goes_on(quick: Log) -> None:
    await quick.posts(1, 20)
    process = await asleep(quick, "reindex", "rebuild.replaying", taken=False)
    process.send_signal(signal.SIGCONT)
    with anyio.fail_after(30):
        assert await process.wait() == 0
    assert [(one.number, one.state) for one in (await quick.record()).generations] == [(1, "live")]
    assert len(await quick.documents()) == 20


async def test_a_connection_lost_behind_the_switch_builds_no_second_generation(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 10)
    await quick.rebuild()
    finish = switch.finish
    cut: list[int] = []

    async def lost(place: Any, number: int, **kwargs: Any) -> None:
        await finish(place, number, **kwargs)
        if not cut:
            cut.append(number)
            await place.broker.nc.close()
            await anyio.sleep_forever()

    monkeypatch.setattr(rebuilding, "finish", lost)
    made = await quick.rebuild()
    assert cut == [made.generation] == [2]
    assert [one.number for one in (await quick.record()).generations] == [2]
