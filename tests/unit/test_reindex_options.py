"""Which options of `reindex` go together, and how it says what it would do."""

from __future__ import annotations

import pytest

from bridge.config import Config
from bridge.errors import UsageError
from bridge.reindex import Asked, command


@pytest.mark.parametrize(
    "asked",
    [
        Asked("a", back=True, keep_old=True),
        Asked("a", back=True, until="5"),
        Asked("a", back=True, dry_run=True),
        Asked("a", drop_old=True, keep_old=True),
        Asked("a", drop_old=True, dry_run=True),
        Asked("a", until="5", keep_old=True),
        Asked("a", until="5", replace_index=True),
    ],
)
def test_options_that_contradict_each_other_are_refused(asked: Asked) -> None:
    with pytest.raises(UsageError, match="do not go together"):
        command(Config(), asked, [])


@pytest.mark.parametrize("text", ["start", "yesterday", "0", "-5", ""])
def test_until_is_a_sequence_or_a_time(text: str) -> None:
    with pytest.raises(UsageError, match=f"--until '{text}' is neither"):
        command(Config(), Asked("a", until=text), [])
