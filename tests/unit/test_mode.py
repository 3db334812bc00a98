"""Which way events are published, and why."""

from __future__ import annotations

import pytest

from bridge.errors import ConfigError, OtherStream
from bridge.stream.mode import choose


@pytest.mark.parametrize(
    ("publish", "sync", "mode", "atomic", "expected", "word"),
    [
        ("auto", "always", "log", True, "batch", "always"),
        ("auto", "always", "log", False, "chain", "atomic"),
        ("auto", "2m", "log", True, "chain", "2m"),
        ("auto", "replicated", "log", True, "chain", "replicated"),
        ("auto", "2m", "compact", True, "batch", "compact"),
        ("batch", "2m", "log", True, "batch", "publish"),
        ("chain", "always", "log", True, "chain", "publish"),
        ("chain", "always", "compact", True, "batch", "compact"),
    ],
)
def test_how_is_chosen_and_said_why(publish: str, sync: str, mode: str, atomic: bool, expected: str, word: str) -> None:
    found, why = choose(publish, sync, mode, atomic)
    assert found == expected
    assert word in why


@pytest.mark.parametrize(("publish", "mode"), [("batch", "log"), ("auto", "compact")])
def test_a_batch_that_the_stream_does_not_take_is_refused(publish: str, mode: str) -> None:
    with pytest.raises(OtherStream, match="allow-batch"):
        choose(publish, "always", mode, False)


@pytest.mark.parametrize("sync", ["always", "replicated", "2m"])
def test_a_replicated_stream_gets_batches(sync: str) -> None:
    found, why = choose("auto", sync, "log", True, replicas=3)
    assert found == "batch"
    assert "3 replicas" in why
    with pytest.raises(OtherStream, match="allow-batch"):
        choose("auto", sync, "log", False, replicas=3)
    with pytest.raises(ConfigError, match="3 replicas"):
        choose("chain", sync, "log", True, replicas=3)
