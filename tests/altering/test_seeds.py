"""That a seed is a plan, and that the plans have every kind of table; the seeds themselves are run by hand."""

from __future__ import annotations

from itertools import product

from tests.altering.scenario import planned


def test_a_seed_always_plans_the_same_and_every_kind_of_table_is_among_them() -> None:
    plans = [planned(seed) for seed in range(1500)]
    assert plans == [planned(seed) for seed in range(1500)]
    kinds = {(*plan.shape, plan.savepoints, plan.first > 0) for plan in plans}
    assert kinds == set(product([True, False], repeat=6))
