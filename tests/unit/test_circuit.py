"""When rejected documents are no longer buried one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.index.circuit import LEAST, WINDOW, Circuit


def test_a_few_rejected_documents_are_buried_however_bad_the_share() -> None:
    circuit = Circuit(0.5)
    assert all(circuit.admits(0, ["bad"]) for _ in range(LEAST - 1))
    assert not circuit.admits(0, ["bad"])
    assert circuit.open
    assert str(circuit) == "100 of the last 100 documents were rejected, most often: bad"


def test_the_share_counts_of_the_last_documents() -> None:
    circuit = Circuit(0.5)
    assert circuit.admits(5_000, [])
    assert circuit.admits(0, ["bad"] * (WINDOW // 2))
    assert not circuit.admits(0, ["bad"])
    assert (circuit.rejected, circuit.of) == (501, 1_000)
    assert circuit.admits(600, ["bad"])


def test_a_bulk_larger_than_the_window_counts_whole() -> None:
    circuit = Circuit(0.5)
    assert circuit.admits(1_100, ["bad"] * 900)
    assert not circuit.admits(900, ["bad"] * 1_100)
    assert (circuit.rejected, circuit.of) == (1_100, 2_000)


def test_what_was_not_admitted_does_not_count_and_is_asked_again() -> None:
    circuit = Circuit(0.5)
    for _ in range(50):
        assert not circuit.admits(100, ["bad"] * 300)
    assert circuit.admits(300, ["bad"] * 100)
    assert not circuit.open


def test_good_documents_beside_a_bulk_that_is_held_let_it_go() -> None:
    circuit = Circuit(0.5)
    assert not circuit.admits(0, ["bad"] * 300)
    assert circuit.admits(400, [])
    assert circuit.admits(0, ["bad"] * 300)


def test_the_commonest_reason_is_named() -> None:
    circuit = Circuit(0.0)
    assert not circuit.admits(0, ["a"] * 40 + ["b"] * 60)
    assert circuit.reason == "b"


def test_a_limit_of_one_never_opens() -> None:
    assert Circuit(1.0).admits(0, ["bad"] * 10_000)


def test_a_bulk_in_which_all_is_taken_is_always_admitted() -> None:
    circuit = Circuit(0.5)
    assert not circuit.admits(0, ["bad"] * 5_000)
    assert circuit.admits(1, [])
    assert circuit.admits(0, [])


@pytest.mark.parametrize("ends", [True, False])
def test_of_a_rebuild_it_stays_known_that_it_opened(ends: bool) -> None:
    circuit = Circuit(0.5, ends=ends)
    assert not circuit.admits(0, ["bad"] * 500)
    assert circuit.admits(1_000, [])
    assert circuit.open is ends


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=40), st.floats(0, 1))
def test_never_more_is_buried_than_the_limit_allows(bulks: list[tuple[int, int]], limit: float) -> None:
    circuit = Circuit(limit)
    for taken, rejected in bulks:
        if not circuit.admits(taken, ["bad"] * rejected):
            assert rejected
            assert circuit.rejected >= LEAST
            assert circuit.rejected > limit * circuit.of
            assert circuit.of >= taken + rejected
        elif taken + rejected >= WINDOW:
            assert rejected < LEAST or rejected <= limit * (taken + rejected)
