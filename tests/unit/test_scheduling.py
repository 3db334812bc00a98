"""What is costly to prepare is prepared by one worker, whatever worker that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scheduling import ENGINES, scope


def test_every_test_of_an_engine_is_in_its_piece(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        for engine in ENGINES:
            if engine in getattr(item, "fixturenames", ()):
                assert scope(item.nodeid) == engine, "its name must say which engine it starts"


def test_every_test_of_what_a_module_prepares_is_in_its_piece(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        if isinstance(item, pytest.Function):
            fixtures = [one for found in item._fixtureinfo.name2fixturedefs.values() for one in found]
            if any(one.scope == "module" and one.baseid == item.nodeid.partition("::")[0] for one in fixtures):
                assert scope(item.nodeid) in (item.nodeid.partition("::")[0], *ENGINES)


def test_other_tests_are_pieces_of_their_own() -> None:
    here = Path(__file__).relative_to(Path(__file__).parents[2])
    names = [
        *(f"tests/test_{engine}.py::test_{how}" for engine in ENGINES for how in ("one", "two[1]")),
        f"{here}::one",
    ]
    assert [scope(name) for name in names] == names
