"""Who stands by, as a status counts them."""

from __future__ import annotations

from datetime import UTC, datetime

from bridge.stream.lease import lease_key
from bridge.stream.standby import Waiting, standby_key, waiting


def test_the_list_of_those_who_wait_has_the_leases_own_name() -> None:
    assert standby_key(lease_key("bridge", "main")) == "standby.bridge.main"
    assert standby_key(lease_key("index", "main", "a.b")) == "standby.index.main.a=2Eb"


def test_who_has_been_silent_is_not_counted_and_the_longest_wait_comes_first() -> None:
    def one(holder: str, since: int, at: int) -> Waiting:
        return Waiting(holder, "host", 1, f"2026-01-31T11:00:{since:02}+00:00", f"2026-01-31T11:00:{at:02}+00:00")

    listed = [one("late", 20, 50), one("silent", 1, 30), one("early", 10, 45)]
    found = waiting(listed, datetime(2026, 1, 31, 11, 0, 50, tzinfo=UTC))
    assert [w.holder for w in found] == ["early", "late"]
