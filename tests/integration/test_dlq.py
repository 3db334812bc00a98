"""Dead letters: listed, shown, tried again and dropped, while the index's reader is at work."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest

from bridge.embedded import NatsServer, SearchEngine
from bridge.errors import UsageError
from bridge.index import mending
from bridge.index.bulk import Sender
from bridge.index.letters import Dead, Retried, dead_letters, dropped, retried, shown
from bridge.index.verify import verify
from bridge.operate.show import index as show_index
from bridge.stream import deadletters
from bridge.waiting import until
from tests.integration.feeding import COLUMNS, Log, fed, row

pytestmark = pytest.mark.anyio

SCORED = {**COLUMNS, "score": "integer"}
refusing = True


def careful(found: dict[str, Any]) -> dict[str, Any]:
    """A transform with a defect that is mended later."""
    if refusing and "secret" in str(found.get("title")):
        raise ValueError(found["title"])
    return {"title": found["title"]}


@pytest.fixture
async def transformed(nats: NatsServer, osmem: SearchEngine) -> AsyncIterator[Log]:
    global refusing
    refusing = True
    async with fed(nats.url, osmem.url, transform="tests.integration.test_dlq:careful") as found:
        yield found


def mend() -> None:
    """Mend the transform."""
    global refusing
    refusing = False


def post(number: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"id": number}, row(number, **changes)


async def dead(log: Log) -> list[Dead]:
    return [one async for one in dead_letters(log.config, log.name, log.servers)]


async def retry(log: Log, *numbers: int) -> Retried:
    with anyio.fail_after(60):
        return await retried(log.config, log.name, log.servers, numbers or None)


async def test_the_latest_state_of_refused_rows_is_tried_again(log: Log) -> None:
    await log.columns(SCORED)
    await log.put("insert", *post(1, score="planted secret"))
    await log.put("insert", *post(2, score="planted secret"))
    await log.put("insert", *post(3, score="planted secret"))
    await log.put("insert", *post(4, score=4))
    async with log.reading():
        await log.done()
        assert await log.documents() == {"4": row(4, score=4)}
        await log.put("update", *post(1, score=1))
        await log.put("delete", {"id": 2})
        await log.done()
        found = await dead(log)
        assert [(one.number, one.state, msgspec.json.decode(one.letter.key)) for one in found if one.letter] == [
            (1, "live", {"id": 1}), (2, "live", {"id": 2}), (3, "live", {"id": 3})
        ]  # fmt: skip
        subject = deadletters.dead_subject(log.config.stream.prefix, log.config.source.name, log.name)
        assert await deadletters.counts(log.broker, log.config.stream, log.config.source.name) == {subject: 3}
        [report] = await verify(log.config, log.name, log.servers)
        assert report.counts == {"refused": 1}
        result = await retry(log)
        assert (result.written, result.deleted, result.letters) == (1, 1, 2)
        [left] = result.refused
        assert (left.number, msgspec.json.decode(left.key)) == (3, {"id": 3})
        assert "[score" in left.reason
        assert "planted" not in left.reason
        assert [one.number for one in await dead(log)] == [3]
        assert await log.documents() == {"1": row(1, score=1), "4": row(4, score=4)}
        await log.put("update", *post(3, score=3))
        await log.done()
        assert (await retry(log, 3)).refused == []
        assert await dead(log) == []
        assert await log.documents() == {n: row(int(n), score=int(n)) for n in ("1", "3", "4")}
        [report] = await verify(log.config, log.name, log.servers)
        assert report.same


async def test_a_row_whose_transform_was_mended_is_written_and_later_events_build_on_it(transformed: Log) -> None:
    await transformed.put("insert", *post(1, title="secret"))
    await transformed.put("insert", *post(2, title="secret two"))
    async with transformed.reading():
        await transformed.done()
        assert {one.letter.id for one in await dead(transformed) if one.letter} == {"1", "2"}
        mend()
        result = await retry(transformed, 1)
        assert (result.written, result.letters) == (1, 1)
        assert await transformed.documents() == {"1": {"title": "secret"}}
        update = {"id": 1, "body": "b", "price": 1}
        await transformed.put("update", {"id": 1}, update, unchanged=["title"])
        await transformed.put("update", {"id": 2}, {**update, "id": 2}, unchanged=["title"])
        await transformed.done()
        assert await transformed.documents() == {"1": {"title": "secret"}, "2": {"title": "secret two"}}
        assert (await retry(transformed)).refused == []
        assert await dead(transformed) == []
        [report] = await verify(transformed.config, transformed.name, transformed.servers)
        assert report.same


async def test_a_retry_never_brings_back_what_later_events_have_changed(
    transformed: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader writes newer events between the moment the retry has read the log and the moment that it writes."""
    for number in (1, 2, 3):
        await transformed.put("insert", *post(number, title="secret"))
    async with transformed.reading():
        await transformed.done()
        mend()
        send = Sender.send

        async def late(self: Sender, ops: Any) -> Any:
            await transformed.put("update", *post(1, title="newer"))
            await transformed.put("delete", {"id": 2})
            await transformed.put("update", *post(33, title="moved"), before={"id": 3})
            await transformed.done()
            return await send(self, ops)

        class Late(Sender):
            send = late

        monkeypatch.setattr(mending, "Sender", Late)
        result = await retry(transformed)
        assert (result.newer, result.written, result.deleted, result.letters) == (3, 0, 0, 3)
        assert await transformed.documents() == {"1": {"title": "newer"}, "33": {"title": "moved"}}
        monkeypatch.undo()
        [report] = await verify(transformed.config, transformed.name, transformed.servers)
        assert report.same


async def test_a_retry_that_is_ahead_of_the_reader_holds_against_what_that_one_has_still_to_write(
    transformed: Log,
) -> None:
    """The reader is stopped: it takes the events that the retry has read already only afterwards."""
    await transformed.put("insert", *post(1, title="secret"))
    await transformed.put("insert", *post(2, title="secret"))
    async with transformed.reading():
        await transformed.done()
    mend()
    await transformed.put("update", *post(1, title="second"))
    await transformed.put("update", {"id": 1}, {"id": 1, "body": "b", "price": 1}, unchanged=["title"])
    await transformed.put("delete", {"id": 2})
    result = await retry(transformed)
    assert (result.written, result.deleted) == (1, 1)
    assert await transformed.documents() == {"1": {"title": "second"}}
    async with transformed.reading():
        await transformed.put("insert", *post(3))
        await transformed.done()
    assert await transformed.documents() == {"1": {"title": "second"}, "3": {"title": "post 3"}}
    assert await dead(transformed) == []


async def test_a_letter_of_a_newer_event_stays(transformed: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await transformed.put("insert", *post(1, title="secret"))
    async with transformed.reading():
        await transformed.done()
        send = Sender.send

        async def late(self: Sender, ops: Any) -> Any:
            global refusing
            refusing = True
            await transformed.put("update", *post(1, title="newer secret"))
            await transformed.done()
            return await send(self, ops)

        class Late(Sender):
            send = late

        mend()
        monkeypatch.setattr(mending, "Sender", Late)
        assert (await retry(transformed)).letters == 1
        assert await transformed.documents() == {"1": {"title": "secret"}}
        monkeypatch.undo()
        [left] = await dead(transformed)
        assert left.letter is not None
        assert left.letter.seq == transformed.last
        [report] = await verify(transformed.config, transformed.name, transformed.servers)
        assert report.counts == {"refused": 1}


async def test_letters_are_shown_without_values_and_dropped(quick: Log) -> None:
    await quick.columns(SCORED)
    quick.with_index(reject_limit=1)
    seq = await quick.put("insert", *post(1, score="planted secret"))
    await quick.publish("insert", b"not json")
    async with quick.reading():
        await quick.done()
        await quick.rebuild()
        await quick.done()
    config, name, servers = quick.config, quick.name, quick.servers
    found = await dead(quick)
    assert [(one.number, one.state) for one in found] == [(1, "gone"), (2, "gone"), (3, "live"), (4, "live")]
    out = io.StringIO()
    show_index.letters(found, name, 3, out)
    text = out.getvalue() + show_index.letters_as_json(found)
    [refused] = [one.number for one in found if one.state == "live" and one.letter and one.letter.seq == seq]
    text += show_index.letter(await shown(config, name, servers, refused), values=False)
    assert "1 (gone)" in text
    assert "… and 1 more" in text
    assert '"score": "…"' in text
    assert "planted" not in text
    assert "planted" in show_index.letter(await shown(config, name, servers, refused), values=True)
    assert f'"seq": {seq}' in text
    result = await retry(quick)
    assert (sorted(one.number for one in result.refused), result.gone) == ([3, 4], 2)
    with pytest.raises(UsageError, match="no dead letter 9"):
        await dropped(config, name, servers, [1, 9])
    assert await dropped(config, name, servers, [1, 2]) == 2
    assert await dropped(config, name, servers, None) == 2
    assert await dead(quick) == []


async def test_a_retry_waits_for_nothing_where_there_is_nothing(quick: Log) -> None:
    await quick.put("insert", *post(1))
    async with quick.reading():
        await quick.done()
    assert await retry(quick) == Retried()
    assert await until(lambda: _none(quick), seconds=1)


async def _none(log: Log) -> bool:
    return await dead(log) == []
