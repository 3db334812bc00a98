"""What an operator is told when JetStream takes no more."""

from __future__ import annotations

import pytest

from bridge.stream.refusal import FULL, remedy


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (10077, "maximum bytes exceeded", "nats stream edit cdc_main --max-bytes"),
        (10077, "maximum messages exceeded", "--discard=old"),
        (10077, "write /srv/nats/3.blk: no space left on device", "make room and restart it"),
        (0, "no answer in time", "make room and restart it"),
        (10176, "atomic publish batch is incomplete", "make room and restart it"),
        (10002, "resource limits exceeded for account", "max_file"),
        (10023, "insufficient resources", "max_file_store"),
        (10047, "insufficient storage resources available", "max_file_store"),
        (10054, "message size exceeds maximum allowed", "nats stream edit cdc_main --max-msg-size=-1"),
        (12345, "something new", "trying again"),
    ],
)
def test_the_remedy_fits_the_reason(code: int, reason: str, words: str) -> None:
    assert words in remedy(code, reason, "cdc_main")


def test_a_conflict_is_no_lack_of_room() -> None:
    assert not {10071, 10164} & set(FULL)
