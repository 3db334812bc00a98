"""A bounded share of the random readings: a few seeds, and that a seed is a plan."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.reading import scenario
from tests.reading.scenario import Servers, planned, servers

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

SEEDS = (3, 8, 12)


@pytest.fixture(scope="module")
async def mine() -> AsyncIterator[Servers]:
    async with servers() as started:
        yield started


@pytest.mark.parametrize("seed", SEEDS)
async def test_tables_that_are_read_while_they_are_written_are_whole_and_never_go_back(
    mine: Servers, seed: int
) -> None:
    await scenario.run(mine, planned(seed))


def test_a_seed_always_plans_the_same_and_the_chosen_ones_kill() -> None:
    assert [planned(seed) for seed in SEEDS] == [planned(seed) for seed in SEEDS]
    assert {planned(seed).kills for seed in SEEDS} == {True, False}
