"""A bounded share of the crash suite: a kill at every failpoint, and the first seeds."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import pytest

from bridge.failpoints import POINTS
from tests.crash import scenario
from tests.crash.faults import COMPACT, FAULTS, INDEX, READING, SNAPSHOT, STREAMING, at_failpoint
from tests.crash.scenario import planned
from tests.crash.world import SYNC_INTERVAL, Servers, loaded, servers, world
from tests.running import execute

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

T = TypeVar("T")
# Late enough that something has happened before, soon enough that a slow machine comes so far.
# Seconds: a point that must be reached may take its time on a busy machine.
SURELY = 40.0
LATER = {"table.rows": 3, "table.began": 3, "batch.closed": 5, "batch.written": 5, "batch.acked": 5}
LATER |= {"transaction.began": 20, "transaction.ended": 20}


@pytest.fixture(scope="module")
async def mine() -> AsyncIterator[Servers]:
    async with servers() as started:
        yield started


@pytest.mark.parametrize("point", SNAPSHOT)
async def test_a_kill_at_each_failpoint_of_the_snapshot_loses_and_doubles_nothing(mine: Servers, point: str) -> None:
    async with world(mine, 0, synchronous_commit="on", publish="batch", sync="always") as here:
        async with loaded(here, 0):
            assert await scenario.snapshot_failpoint(here, random.Random(0), point, LATER.get(point, 1), SURELY)
        await scenario.compare(here)


@pytest.mark.parametrize("point", STREAMING)
async def test_a_kill_at_each_failpoint_of_the_stream_loses_and_doubles_nothing(mine: Servers, point: str) -> None:
    async with world(mine, 0, synchronous_commit="on", publish="batch", sync="always") as here:
        async with loaded(here, 0):
            await here.bridge.start()
            await here.bridge.said("streaming")
            assert await at_failpoint(here, random.Random(0), point, "kill", LATER.get(point, 1), SURELY)
        await scenario.compare(here)


@pytest.mark.parametrize("publish", ["batch", "chain"])
@pytest.mark.parametrize("name", ["kill_while_refused", "kill_and_send_late", "kill_and_send_between"])
async def test_what_is_on_its_way_to_the_broker_is_neither_lost_nor_doubled(
    mine: Servers, name: str, publish: str
) -> None:
    sync = "always" if publish == "batch" else SYNC_INTERVAL
    async with world(mine, 0, synchronous_commit="on", publish=publish, sync=sync) as here:
        async with loaded(here, 0):
            await here.bridge.start()
            await here.bridge.said("streaming")
            await execute(str(here.config.source.dsn), scenario.MANY.replace("{r}", "1"))
            await FAULTS[name].happen(here, Longest())
        await scenario.compare(here)


class Longest(random.Random):
    """Chooses what lasts longest."""

    def uniform(self, _: float, b: float) -> float:
        return b

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        return seq[-1]


@pytest.mark.parametrize("seed", range(1, 4))
async def test_faults_of_a_seed_lose_and_double_nothing(mine: Servers, seed: int) -> None:
    await scenario.run(mine, planned(seed))


def test_a_seed_always_plans_the_same_and_all_faults_come_up() -> None:
    plans = [planned(seed) for seed in range(1, 200)]
    assert plans == [planned(seed) for seed in range(1, 200)]
    assert {name for plan in plans for names in plan.rounds for name in names} == set(FAULTS)
    assert {plan.begin for plan in plans} == set(scenario.BEGINNINGS)
    assert {*SNAPSHOT, *STREAMING, *COMPACT, *READING, *INDEX} == set(POINTS)
