"""Tests of one engine go to one worker, whatever worker that is."""

from __future__ import annotations

import pytest

from tests.scheduling import ENGINES, scope


def test_every_test_of_an_engine_is_in_its_piece(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        for engine in ENGINES:
            if engine in getattr(item, "fixturenames", ()):
                assert scope(item.nodeid) == engine, "its name must say which engine it starts"


def test_tests_of_no_engine_are_pieces_of_their_own() -> None:
    names = [f"tests/test_{engine}.py::test_{how}" for engine in ENGINES for how in ("one", "two[1]")]
    assert [scope(name) for name in names] == names
