"""The commands that make and alter a slot, as each version of PostgreSQL reads them."""

from __future__ import annotations

import pytest

from bridge.source.slot import Slot, alteration, creation


def test_only_a_failover_slot_is_asked_for_in_the_way_that_older_servers_do_not_read() -> None:
    assert creation("s", failover=False) == "CREATE_REPLICATION_SLOT s LOGICAL wal2json EXPORT_SNAPSHOT"
    assert creation("s", failover=True) == "CREATE_REPLICATION_SLOT s LOGICAL wal2json (SNAPSHOT 'export', FAILOVER)"


@pytest.mark.parametrize(
    ("found", "wanted", "command"),
    [
        (False, True, "ALTER_REPLICATION_SLOT s (FAILOVER true)"),
        (True, False, "ALTER_REPLICATION_SLOT s (FAILOVER false)"),
        (True, True, None),
        (False, False, None),
        (True, None, None),  # somebody made it one by hand, and the configuration says nothing
        (None, False, None),  # a server before 17
        (None, True, None),  # refused before
    ],
)
def test_a_slot_is_altered_where_the_configuration_says_otherwise(
    found: bool | None, wanted: bool | None, command: str | None
) -> None:
    slot = Slot("s", "wal2json", "app", 0, 1, 1, "reserved", found)
    assert alteration(slot, wanted) == command
