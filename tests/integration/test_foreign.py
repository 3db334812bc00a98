"""Names in the engine that somebody else has: aliases, users' indexes, what another index of a bridge has built."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from bridge.config import Config
from bridge.errors import BridgeError, IndexMismatch
from bridge.index import rebuild as rebuilding
from bridge.index.back import back
from bridge.index.bulk import Tally
from bridge.index.feed import Feed
from bridge.index.indexer import run_index
from bridge.index.past import build_until
from bridge.index.place import site
from bridge.index.plan import Options, plan
from bridge.index.rebuild import rebuild
from bridge.stream.lease import Busy
from tests.integration.feeding import Log

pytestmark = pytest.mark.anyio


def another(log: Log, name: str, **changes: Any) -> Config:
    """The configuration with the index under another name alone."""
    index = msgspec.structs.replace(log.config.index[log.name], **{"alias": name, **changes})
    return msgspec.structs.replace(log.config, index={name: index})


async def begun(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild that ends when its generation is recorded and nothing of it is made."""

    async def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(rebuilding._Rebuild, "_make", breaks)
        with pytest.raises(RuntimeError, match="broken off"):
            await log.rebuild()


# Aliases and indexes that are called like a generation


@pytest.mark.parametrize("of", ["", "4"])
async def test_numbers_whose_names_are_aliases_of_others_are_passed_over(log: Log, of: str) -> None:
    await log.posts(1, 5)
    await log.rebuild()
    theirs = f"{log.name}x"
    await log.engine.create(theirs, {"aliases": {f"{log.name}-000002": {}, f"{log.name}-000003-w{of}": {}}})
    found = await plan(site(log.config, log.name), log.servers, Options())
    assert found.generation.physical == f"{log.name}-000004"
    made = await log.rebuild()
    assert (made.physical, made.documents) == (f"{log.name}-000004", 5)
    assert len(await log.documents()) == 5
    assert sorted((await log.engine.indexes(theirs))[theirs]) == [f"{log.name}-000002", f"{log.name}-000003-w{of}"]


@pytest.mark.parametrize("tail", ["", "-w"])
async def test_a_generation_whose_name_became_an_alias_since_is_begun_under_another(
    log: Log, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    await log.posts(1, 5)
    await begun(log, monkeypatch)
    theirs = f"{log.name}x"
    await log.engine.create(theirs, {"aliases": {f"{log.name}-000001{tail}": {}}})
    made = await log.rebuild()
    assert (made.physical, made.documents) == (f"{log.name}-000002", 5)
    assert await log.engine.indexes(theirs) == {theirs: [f"{log.name}-000001{tail}"]}
    assert [one.number for one in (await log.record()).generations] == [2]


async def test_an_index_of_somebody_else_in_a_generations_place_is_left_alone(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 5)
    await begun(quick, monkeypatch)
    theirs = f"{quick.name}-000001"
    await quick.engine.create(theirs, {})
    with capture_logs() as said:
        assert (await quick.rebuild()).physical == f"{quick.name}-000002"
    assert [line["name"] for line in said if line["event"] == "left alone"] == [theirs]
    assert await quick.engine.exists(theirs)


# What another index has built


async def test_a_first_build_under_another_name_leaves_the_alias_until_it_is_asked_for(quick: Log) -> None:
    await quick.posts(1, 5)
    await quick.rebuild()
    renamed = f"{quick.name}b"
    config = another(quick, renamed, alias=quick.name)
    with pytest.raises(IndexMismatch, match=f"index {quick.name} has built, not index {renamed}") as refused:
        await run_index(config, [renamed], quick.servers)
    assert f"bridge reindex {renamed}" in refused.value.remedy
    assert list(await quick.engine.indexes(quick.name)) == [f"{quick.name}-000001"]
    assert (await rebuild(config, renamed, quick.servers)).documents == 5
    assert list(await quick.engine.indexes(quick.name)) == [f"{renamed}-000001"]


async def test_an_index_that_a_bridge_has_built_is_not_replaced(quick: Log) -> None:
    await quick.posts(1, 5)
    other = f"{quick.name}-other"
    theirs = another(quick, other)
    await rebuild(theirs, other, quick.servers)
    await rebuild(theirs, other, quick.servers, keep_old=True)
    await build_until(theirs, other, quick.servers, 3)
    for index, remedy in {
        f"{other}-000001": f"bridge reindex {other} --drop-old",
        f"{other}-000002": f"bridge reindex {other}",
        f"{other}-until-3-000001": f"bridge reindex {other} --until 3 --drop-old",
    }.items():
        quick.with_index(alias=index)
        for replace in (False, True):
            with pytest.raises(IndexMismatch, match=f"built by a bridge, for index {other}") as refused:
                await quick.rebuild(replace_index=replace)
            assert refused.value.remedy.endswith(remedy)
        with pytest.raises(IndexMismatch, match="built by a bridge"):
            await plan(site(quick.config, quick.name), quick.servers, Options(replace_index=True))
        assert await quick.engine.exists(index)
    await back(theirs, other, quick.servers)
    assert await quick.documents(other)


async def test_an_index_that_came_into_the_alias_place_during_a_rebuild_is_looked_at_before_it_goes(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 5)
    check = rebuilding._Rebuild._check
    meta = {"source": "another", "stream": "cdc_another", "index": "theirs"}

    async def meanwhile(self: Any, *args: Any, **kwargs: Any) -> int:
        await quick.engine.create(quick.name, {"mappings": {"_meta": meta}})
        return await check(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rebuilding._Rebuild, "_check", meanwhile)
        with pytest.raises(IndexMismatch, match="for index theirs of source another") as refused:
            await quick.rebuild(replace_index=True)
    assert f"DELETE /{quick.name}" in refused.value.remedy
    await quick.engine.delete(quick.name)
    assert (await quick.rebuild()).physical == f"{quick.name}-000001"


# Indexes of the past


async def until(log: Log, point: int = 5) -> None:
    await build_until(log.config, log.name, log.servers, point)


async def test_the_alias_of_an_index_of_the_past_is_taken_from_nobody(quick: Log) -> None:
    await quick.posts(1, 8)
    alias, theirs = f"{quick.name}-until-5", f"{quick.name}x"
    await quick.engine.create(theirs, {"aliases": {alias: {}}})
    with pytest.raises(IndexMismatch, match=f"is on the index {theirs}") as refused:
        await until(quick)
    assert refused.value.remedy == f"take the alias {alias} off {theirs}, or name another sequence"
    assert list(await quick.engine.indexes(alias)) == [theirs]
    await quick.engine.delete(theirs)
    await quick.engine.create(alias, {})
    with pytest.raises(IndexMismatch, match="an index has that name") as refused:
        await until(quick)
    assert refused.value.remedy == f"delete it (DELETE /{alias}), or name another sequence"


async def test_what_stops_an_index_of_the_past_names_the_command_that_builds_it(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 8)
    right, wrong = f"bridge reindex {quick.name} --until 5", f"bridge reindex {quick.name}-until-5"
    count = rebuilding._Rebuild._count
    met: list[BridgeError] = []

    async def less(self: Any, *_: Any, **__: Any) -> int:
        raise self._mismatch("too few")

    async def gone(self: Any, generation: Any, **kwargs: Any) -> int:
        # Another one is refused meanwhile; and the index goes before it is written to again.
        with pytest.raises(Busy, match=f"index {quick.name} --until 5 is being rebuilt") as busy:
            await until(quick)
        met.append(busy.value)
        await quick.engine.delete(generation.physical)
        await Feed(self._place, generation, Tally()).run()
        return await count(self, generation, **kwargs)

    for step in (less, gone):
        monkeypatch.setattr(rebuilding._Rebuild, "_count", step)
        with pytest.raises(IndexMismatch) as refused:
            await until(quick)
        assert right in refused.value.remedy
        met.append(refused.value)
    assert not [str(error) for error in met if wrong in str(error)]


async def test_a_past_whose_documents_are_rejected_names_the_command_that_builds_it(quick: Log) -> None:
    for number in range(120):
        await quick.put("insert", {"id": number}, {"id": "no number", "title": "x"})
    with pytest.raises(IndexMismatch, match=f"the rebuild of index {quick.name} --until 120 ends") as refused:
        await until(quick, 120)
    assert refused.value.remedy.endswith(f"bridge reindex {quick.name} --until 120")
