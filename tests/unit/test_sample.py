"""The sample of a rebuild, and the pace of its progress."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from bridge.index.document import Operation, Put, Remove
from bridge.index.pace import Pace
from bridge.index.sample import Sample


class Held(NamedTuple):
    version: int
    source: bytes


def put(number: int, version: int, title: str = "a") -> Put:
    return Put(str(number), version, b'{"id": %d, "title": "%b"}' % (number, title.encode()))


def holding(*ops: Put) -> dict[str, Held]:
    return {op.id: Held(op.version, op.doc) for op in ops}


def test_it_stays_small_and_spread_over_all_that_was_sent() -> None:
    sample = Sample(20)
    for start in range(0, 10_000, 250):
        sample.sent([put(n, n + 1) for n in range(start, start + 250)])
    chosen = sorted(int(doc_id) for doc_id in sample.ids)
    assert 10 <= len(chosen) <= 20
    assert chosen[0] < 1_000
    assert chosen[-1] > 9_000
    assert max(b - a for a, b in pairwise(chosen)) < 2_000


def test_the_last_operation_counts_and_other_spellings_of_a_document_are_the_same() -> None:
    sample = Sample()
    sample.sent([put(1, 1), put(2, 2), put(3, 3)])
    sample.sent([put(1, 4, "b"), Remove("2", 5)])
    same = {"1": Held(4, b'{"title":"b","id":1}'), "3": Held(3, put(3, 3).doc)}
    assert sample.differing(same, verbatim=True) == []


def test_what_is_missing_left_over_old_or_other_is_named() -> None:
    sample = Sample()
    ops: list[Operation] = [put(1, 1), put(2, 2), put(3, 3), put(4, 4)]
    sample.sent(ops)
    sample.sent([Remove("2", 5), put(3, 6)])
    found = holding(put(2, 2), put(3, 3), put(4, 4, "x"))
    assert sample.differing(found, verbatim=True) == ["1", "2", "3", "4"]
    assert sample.differing(found, verbatim=False) == ["1", "2", "3"]


def test_ids_in_doubt_are_not_compared() -> None:
    sample = Sample()
    sample.sent([put(1, 5), put(2, 6)])
    sample.doubt([put(1, 5), put(2, 3)])
    assert sample.ids == ["2"]


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace(10.0)
    assert pace.at(0.0, 0) == 0.0
    assert pace.at(1.0, 100) == 100.0
    rates = [pace.at(float(second), 100 + 1_000 * (second - 1)) for second in range(2, 31)]
    assert rates[-1] == 1_000.0
    assert pace.at(31.0, 0) == 0.0


def test_a_document_that_was_made_anew_before_it_was_taken_is_what_counts() -> None:
    sample = Sample()
    sample.sent([put(1, 5, "a"), put(2, 6, "a"), put(2, 7, "b")])
    sample.changed(put(1, 5, "c"))
    sample.changed(put(2, 6, "c"))
    sample.changed(put(3, 8, "c"))
    assert sample.ids == ["1", "2"]
    held = holding(put(1, 5, "c"), put(2, 7, "b"))
    assert sample.differing(held, verbatim=True) == []
