"""A bounded share of the kills within a reading: each kind once, early or late."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.reading import kills
from tests.reading.kills import AT, SERVERS, Fault, Plan, planned
from tests.reading.scenario import Servers, servers

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

PLANS = [
    [Fault("reading.began", 2), Fault("reading.read", 17), Fault("reading.noted", 1), Fault("reading.moved", 1)],
    [Fault("reading.published", 2), Fault("reading.noted", 16), Fault("reading.ended", 1)],
    [Fault("nats", 3), Fault("backend", 9), Fault("postmaster", 18), Fault("immediate", 25)],
]


@pytest.fixture(scope="module")
async def mine() -> AsyncIterator[Servers]:
    async with servers() as started:
        yield started


@pytest.mark.parametrize("number", range(len(PLANS)))
async def test_a_reading_goes_on_where_it_was_whatever_is_killed(mine: Servers, number: int) -> None:
    await kills.run(mine, Plan(number, PLANS[number]))


def test_every_point_is_among_them_and_a_seed_always_plans_the_same() -> None:
    assert {fault.what for plan in PLANS for fault in plan} == {*AT, *SERVERS}
    plans = [planned(seed) for seed in range(200)]
    assert plans == [planned(seed) for seed in range(200)]
    assert {fault.what for plan in plans for fault in plan.faults} == {*AT, *SERVERS}
