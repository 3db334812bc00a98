"""What is wrong with an index's alias, and when that cannot be told."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.config import Config, Index, Source
from bridge.index.generation import Generation, IndexRecord
from bridge.index.sight import misled
from bridge.operate.status import engines

ALIAS = "messages"


def record(live: int, switching: int = 0, alias: str = ALIAS) -> IndexRecord:
    """A record with one live generation, and another that the alias is about to move to."""
    made: dict[str, Any] = {
        "consumer": "c", "shapes": {}, "settings": {}, "mapping": {}, "origin": {}, "stream": "s",
        "stream_created": "", "first": 1, "seq": 1,
    }  # fmt: skip
    states = {live: "live", switching: "switching"}
    return IndexRecord(alias=alias).of(
        [Generation(number=n, physical=f"m-{n}", state=states[n], **made) for n in sorted(states) if n]  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("records", "holders", "why"),
    [
        ([record(1)], ["m-1"], ""),
        ([record(1)], ["x"], "somebody has put the alias messages on x: searches see that"),
        ([record(1)], ["m-1", "x"], "somebody has put the alias messages on x: searches see that as well"),
        ([record(1)], [ALIAS], "an index has the name of the alias messages: searches see that index"),
        ([record(1)], [], "no index has the alias messages: searches find nothing"),
        ([record(1)], None, ""),
        ([IndexRecord(alias=ALIAS)], ["x"], ""),
        ([], ["x"], ""),
        ([record(1, alias="other")], [], ""),
        ([record(1), record(2)], ["m-1"], ""),
        ([record(1), record(2)], ["m-2"], ""),
        ([record(1), record(2)], ["x"], "somebody has put the alias messages on x: searches see that"),
        ([record(1, switching=2)], ["m-2"], ""),
        ([record(1, switching=2), record(2)], ["m-2"], ""),
    ],
)
def test_an_alias_is_astray_only_by_every_record_that_was_read(
    records: list[IndexRecord], holders: list[str] | None, why: str
) -> None:
    found = misled("messages", records, ALIAS, holders)
    assert (found.why if found is not None else "") == why


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (["m-1"], "no index has the alias messages: searches find nothing"),
        (None, "no index has the alias messages: searches find nothing"),
        (["m-2"], "the index m-1 is gone: searches find nothing"),
        ([], "the index m-1 is gone: searches find nothing"),
    ],
)
def test_an_index_that_is_gone_is_no_lost_alias(there: list[str] | None, why: str) -> None:
    found = misled("messages", [record(1)], ALIAS, [], there)
    assert found is not None
    assert found.why == why
    assert found.remedy.endswith("bridge reindex messages")


def test_the_aliases_of_many_indexes_are_asked_for_in_paths_that_an_engine_takes() -> None:
    index = {f"i{n}": Index(table="public.t", url=["http://e"], alias=f"{'ä' * 30}{n}") for n in range(100)}
    [group] = engines.groups(Config(source=Source(dsn="x", tables=["t"]), index=index))  # type: ignore[arg-type]
    parts = list(engines.portions(group.aliases))
    assert [one for part in parts for one in part] == group.aliases
    assert max(len(part) for part in parts) < 30
