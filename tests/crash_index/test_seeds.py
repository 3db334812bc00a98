"""A bounded share of the index crash suite: a few seeds, and that a seed is a plan."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.crash_index import scenario
from tests.crash_index.faults import FAULTS
from tests.crash_index.scenario import planned
from tests.crash_index.world import NODE, Servers, servers
from tests.servers import Elasticsearch, OpenSearch

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

# Without faults of the engine: the session's is used, which other tests need.
SEEDS = {"opensearch": 23, "elasticsearch": 46}


@pytest.fixture(scope="module")
async def mine() -> AsyncIterator[Servers]:
    async with servers() as started:
        yield started


async def run(mine: Servers, kind: str, node: NODE) -> None:
    mine.use(kind, node)
    plan = planned(SEEDS[kind], (kind,))
    assert not {name for names in plan.rounds for name in names if FAULTS[name].part == "engine"}
    await scenario.run(mine, plan)


async def test_an_index_on_opensearch_is_its_table_after_the_faults_of_a_seed(
    mine: Servers, opensearch: OpenSearch
) -> None:
    await run(mine, "opensearch", opensearch)


async def test_an_index_on_elasticsearch_is_its_table_after_the_faults_of_a_seed(
    mine: Servers, elasticsearch: Elasticsearch
) -> None:
    await run(mine, "elasticsearch", elasticsearch)


def test_a_seed_always_plans_the_same_and_all_faults_come_up() -> None:
    plans = [planned(seed) for seed in range(1, 200)]
    assert plans == [planned(seed) for seed in range(1, 200)]
    assert {name for plan in plans for names in plan.rounds for name in names} == set(FAULTS)
    assert {plan.begin for plan in plans} == set(scenario.BEGINNINGS)
    assert all(any(FAULTS[name].part == "rebuild" for names in p.rounds for name in names) for p in plans)
    assert {plan.choice.engine for plan in plans} == {"opensearch", "elasticsearch"}
    assert {plan.choice.mode for plan in plans} == {"log", "compact"}
    assert {plan.choice.poison for plan in plans} == {True, False}
