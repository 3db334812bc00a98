"""A row's key as the log has it, and as PostgreSQL is asked for it."""

from __future__ import annotations

import pytest

from bridge.pipeline import pace
from bridge.pipeline.pace import Pace
from bridge.source import chunks


@pytest.mark.parametrize(
    ("key", "names", "found"),
    [
        (b'{"id":7}', ["id"], {"id": "7"}),
        (b'{"b":"x\\"y","a":1.50}', ["a", "b"], {"a": "1.50", "b": 'x"y'}),
        (b'{"f":true,"n":"NaN"}', ["n", "f"], {"f": "true", "n": "NaN"}),
        (b'{"id":7}', ["id", "more"], None),
        (b'{"n":null}', ["n"], None),
    ],
)
def test_the_values_of_a_key_are_texts_by_column(key: bytes, names: list[str], found: dict[str, str] | None) -> None:
    assert chunks.texts(key, names) == found


def test_chunks_grow_to_a_second_or_some_megabytes_and_shrink_where_they_are_cut_off() -> None:
    here = Pace()
    here.begin(0)
    assert here.rows == pace.FIRST_UNKNOWN
    here.begin(1 << 10)
    assert here.rows == (1 << 20) >> 10
    here.took(1000, 100_000, 0.001)
    assert here.rows == 4000
    here.took(4000, 400_000, 2.0)
    assert here.rows == 2000
    here.took(2000, 80 << 20, 0.1)
    assert here.rows == 200
    here.took(0, 0, 1.0)
    assert here.rows == 200
    for _ in range(3):
        here.interrupted()
    assert here.rows == pace.FEWEST
    here.took(10, 1000, 0.001)
    # No more than a little above what passed.
    assert here.rows == 12
    for _ in range(200):
        here.took(here.rows, 100, 0.001)
    assert here.rows == pace.MOST
