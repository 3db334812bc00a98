"""That a soak would tell what grows, and one short lap of it."""

from __future__ import annotations

import random

import pytest

from tests.crash_index.world import ENGINES, QUICK
from tests.soak import leaks
from tests.soak.laps import chosen, kinds, soak
from tests.soak.leaks import Held
from tests.soak.report import report
from tests.soak.world import servers

pytestmark = pytest.mark.anyio

MB = 1 << 20


def rests(*memory: int, pid: int = 7) -> list[Held]:
    return [Held(pid, megabytes * MB, 20, 3, 40) for megabytes in memory]


def test_memory_that_goes_up_and_down_has_not_grown() -> None:
    assert leaks.grown("bridge", rests(70, 82, 75, 84, 73, 80, 82, 71, 83)) == []


def test_memory_that_only_goes_up_has_grown() -> None:
    assert leaks.grown("bridge", rests(*range(70, 100, 3))) == ["bridge: its memory grew from 76 MB to 91 MB"]


def test_descriptors_that_are_never_given_back_have_grown() -> None:
    found = [one._replace(descriptors=20 + number) for number, one in enumerate(rests(*[70] * 9))]
    assert leaks.grown("reader", found) == ["reader: its descriptors grew from 22 to 26"]


def test_tasks_that_never_end_have_grown() -> None:
    found = [one._replace(tasks=40 + number) for number, one in enumerate(rests(*[70] * 9))]
    assert leaks.grown("reader", found) == ["reader: its tasks grew from 42 to 46"]


def test_what_a_process_held_that_is_gone_says_nothing_of_its_successor() -> None:
    assert leaks.grown("bridge", [*rests(*[50] * 6, pid=6), *rests(*[90] * 5)]) == []
    assert leaks.grown("bridge", [*rests(*[50] * 9, pid=6), *rests(*[90] * 9)]) == []


def test_every_fault_of_both_suites_comes_up_and_none_that_kills_where_all_is_to_stay() -> None:
    engine = next(iter(ENGINES))
    choose = random.Random(1)
    rounds = [chosen(choose, engine, kills=True) for _ in range(2000)]
    assert {kind.name for one in rounds for kind in one} == {kind.name for kind in kinds(engine)}
    assert all(len({kind.part for kind in one}) == len(one) for one in rounds)
    stays = [kind for _ in range(500) for kind in chosen(choose, engine, kills=False)]
    assert not [kind.name for kind in stays if kind.kills]
    assert {"kill_broker", "crash_postgres", "index: reindex", "snapshot"} <= {kind.name for kind in stays}


@pytest.mark.crash
async def test_after_a_lap_of_load_and_faults_log_and_indexes_are_as_the_tables() -> None:
    async with servers() as mine:
        found = await soak(mine, seed=3, engine=QUICK, seconds=0, lap=8, say=print)
    [lap] = found.laps
    assert lap.events > 500
    assert lap.documents > 300
    assert all(one.tasks > 3 for one in lap.held.values())
    text = report(found)
    assert "0 differences" in text
    assert "reader 1, 1 laps" in text
