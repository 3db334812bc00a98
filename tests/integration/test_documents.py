"""Documents of more than one table, called, routed, left out and multiplied as configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.config import Part
from bridge.errors import ConfigError
from bridge.index import apply
from bridge.index.feed import Feed
from bridge.index.naming import Template
from bridge.stream.reader import delete_consumer
from bridge.stream.subjects import index_key
from tests.integration.feeding import COLUMNS, SCHEMA, TABLE, Log, row

pytestmark = pytest.mark.anyio

PAGES = {"id": "bigint", "title": "text", "words": "text"}
BOTH = [f"{SCHEMA}.{TABLE}", f"{SCHEMA}.pages"]


def page(number: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"id": number}, {"id": number, "title": f"page {number}", "words": "a b c", **changes}


def post(number: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"id": number}, row(number, **changes)


async def ids(log: Log) -> list[str]:
    await log.done()
    return sorted(await log.documents())


# Several tables


async def test_two_tables_share_an_index_and_never_an_id(log: Log) -> None:
    log.with_index(
        table="", tables=BOTH, constants={"kind": "post"},
        of={BOTH[1]: Part(constants={"kind": "page"}, rename={"words": "body"})},
    )  # fmt: skip
    await log.columns(PAGES, table="pages")
    for number in (1, 2):
        await log.put("insert", *post(number))
        await log.put("insert", *page(number), table="pages")
    async with log.reading():
        await log.put("update", {"id": 1}, {"id": 1, "title": "changed"}, unchanged=["words"], table="pages")
        await log.done()
        found = await log.documents()
        assert found["public.pages|1"] == {"id": 1, "title": "changed", "body": "a b c", "kind": "page"}
        assert found["public.posts|1"] == {**row(1), "kind": "post"}
        assert len(found) == 4
        await log.put("truncate", table="pages")
        await log.put("insert", *page(3), table="pages")
        assert await ids(log) == ["public.pages|3", "public.posts|1", "public.posts|2"]
        # A complete read of one table sweeps that one.
        await log.put("snapshot", phase="begin")
        await log.put("snapshot", phase="begin", table="pages")
        await log.put("read", *post(2))
        await log.put("snapshot", phase="end")
        assert await ids(log) == ["public.pages|3", "public.posts|2"]
        await log.put("snapshot", phase="end", table="pages")
        assert await ids(log) == ["public.posts|2"]


async def test_unchanged_columns_of_two_tables_come_from_the_log(log: Log) -> None:
    log.with_index(table="", tables=BOTH)
    await log.columns(PAGES, table="pages")
    await log.put("insert", *post(1, body="of the post"))
    await log.put("insert", *page(1, words="of the page"), table="pages")
    async with log.reading():
        await log.done()
        for name in BOTH:
            await log.engine.json("DELETE", f"/{log.name}/_doc/{name}%7C1?refresh=true")
        # A delete by hand leaves a version that is newer by one: it is some events later that it counts for nothing.
        await log.put("insert", *post(2))
        await log.put("update", {"id": 1}, {"id": 1, "title": "x", "price": 2}, unchanged=["body"])
        await log.put("update", {"id": 1}, {"id": 1, "title": "y"}, unchanged=["words"], table="pages")
        await log.done()
        found = await log.documents()
    assert found["public.posts|1"]["body"] == "of the post"
    assert found["public.pages|1"] == {"id": 1, "title": "y", "words": "of the page"}


async def test_a_field_of_two_types_is_refused_with_the_remedy(quick: Log) -> None:
    quick.with_index(table="", tables=BOTH)
    await quick.columns({**PAGES, "body": "bigint"}, table="pages")
    with pytest.raises(ConfigError, match="the field body is of another type"):
        await quick.rebuild()


@pytest.mark.parametrize("rename", [{"title": "body"}, {"title": "x", "price": "x"}])
async def test_two_columns_in_one_field_are_refused(quick: Log, rename: dict[str, str]) -> None:
    quick.with_index(rename=rename)
    with pytest.raises(ConfigError, match="would both be the field"):
        await quick.rebuild()


# Ids and routing


async def test_ids_by_a_template(log: Log) -> None:
    log.with_index(id="post-{id}")
    await log.put("insert", *post(1))
    await log.put("insert", *post(2))
    async with log.reading():
        await log.put("delete", {"id": 1})
        moved = {"id": 3, "title": "moved", "price": 1}
        await log.put("update", {"id": 3}, moved, before={"id": 2}, unchanged=["body"])
        await log.done()
        assert await log.documents() == {"post-3": {**row(2), **moved}}


@pytest.mark.parametrize(("template", "key"), [("{id}", ("id", "title")), ("{title}-{id}", ("id",))])
async def test_a_template_that_is_not_the_key_is_refused(quick: Log, template: str, key: tuple[str, ...]) -> None:
    assert Template(template).columns
    await quick.columns(COLUMNS, key)
    quick.with_index(id=template)
    with pytest.raises(ConfigError, match="all columns of its key and no others"):
        await quick.rebuild()


@pytest.fixture
def sharded(log: Log) -> Log:
    log.with_index(routing="title", settings={"number_of_shards": 5})
    return log


async def test_routed_documents_move_with_their_routing(sharded: Log) -> None:
    def titled(number: int, title: str, **more: Any) -> dict[str, Any]:
        return {"id": number, "title": title, "body": "kept", **more}

    for number in range(1, 30):
        await sharded.put("insert", {"id": number}, titled(number, f"t{number}"))
    async with sharded.reading():
        await sharded.done()
        assert len(await sharded.documents()) == 29
        # To another shard, which would otherwise hold the row a second time; with a column that was not sent.
        for number in range(1, 20):
            old = titled(number, f"t{number}")
            new = {"id": number, "title": f"other {number}"}
            await sharded.put("update", {"id": number}, new, before=old, unchanged=["body"])
        for number in range(20, 25):
            await sharded.put("delete", {"id": number}, before=titled(number, f"t{number}"))
        await sharded.done()
        await sharded.engine.refresh(sharded.name)
        found = await sharded.engine.json("POST", f"/{sharded.name}/_search", {"size": 100})
        assert sorted(int(hit["_id"]) for hit in found["hits"]["hits"]) == [*range(1, 20), *range(25, 30)]
        moved = next(hit for hit in found["hits"]["hits"] if hit["_id"] == "7")
        assert (moved["_routing"], moved["_source"]["body"]) == ("other 7", "kept")
        await sharded.put("truncate")
        assert await ids(sharded) == []


async def test_a_row_that_cannot_be_routed_is_a_dead_letter(sharded: Log) -> None:
    await sharded.put("insert", *post(1))
    await sharded.put("delete", {"id": 1})
    async with sharded.reading():
        await sharded.done()
    [letter] = await sharded.letters()
    assert "REPLICA IDENTITY FULL" in letter["reason"]


# Rows without a document


async def test_soft_deleted_rows_go_and_come_back_with_what_was_not_sent(log: Log) -> None:
    log.with_index(soft_delete="price", exclude=["price"])
    await log.put("insert", *post(1, price=None, body="long"))
    await log.put("insert", *post(2, price=5))
    async with log.reading():
        assert await ids(log) == ["1"]
        await log.put("update", {"id": 1}, {"id": 1, "title": "gone", "price": 1}, unchanged=["body"])
        assert await ids(log) == []
        await log.put("update", {"id": 1}, {"id": 1, "title": "back", "price": None}, unchanged=["body"])
        await log.done()
        assert await log.documents() == {"1": {"id": 1, "title": "back", "body": "long"}}


FILTER = """
def shown(row):
    if row["title"] == "bad":
        raise ValueError
    return None if row["title"] == "hidden" else row
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Up to which sequences the log was read for rows, each time that it was."""
    found: list[int] = []
    history = Feed.history

    def watched(self: Feed, upto: int) -> Any:
        found.append(upto)
        return history(self, upto)

    monkeypatch.setattr(Feed, "history", watched)
    return found


async def test_rows_without_a_document_do_not_ask_the_log_for_what_an_update_leaves_out(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    (tmp_path / "filter_of_posts.py").write_text(FILTER)
    monkeypatch.syspath_prepend(str(tmp_path))
    log.with_index(transform="filter_of_posts:shown")
    await log.put("insert", *post(1, title="hidden", body="first"))
    await log.put("insert", *post(2, title="bad", body="second"))
    await log.put("insert", *post(3, body="third"))
    async with log.reading():
        await log.done()
        for title in ("hidden", "bad", "hidden", "shown"):
            if title == "bad":
                # Once a process and row: until then nothing is known of those that were not shown before it.
                asked.clear()
            for number in (1, 2, 3):
                await log.put("update", {"id": number}, {"id": number, "title": title}, unchanged=["body", "price"])
                await log.done()
        moved = {"id": 9, "title": "hidden"}
        await log.put("update", {"id": 9}, moved, before={"id": 3}, unchanged=["body", "price"])
        await log.put("update", {"id": 9}, {"id": 9, "title": "shown"}, unchanged=["body", "price"])
        await log.put("update", {"id": 1}, {"id": 1, "title": "hidden"}, unchanged=["body", "price"])
        await log.put("delete", {"id": 1})
        await log.done()
        found = {doc_id: (doc["title"], doc["body"]) for doc_id, doc in (await log.documents()).items()}
    assert found == {"2": ("shown", "second"), "9": ("shown", "third")}
    assert asked == []


async def test_a_row_that_is_shown_again_does_not_ask_the_log_for_what_its_soft_delete_left_out(
    log: Log, asked: list[int]
) -> None:
    log.with_index(soft_delete="gone")
    await log.columns({**COLUMNS, "gone": "boolean"})
    for number in (1, 2, 3):
        await log.put("insert", *post(number, gone=False))

    async def update(number: int, to: int = 0, **changes: Any) -> None:
        found = {"id": to or number, "title": "again", "price": 1, **changes}
        before = {"id": number} if to else None
        await log.put("update", {"id": to or number}, found, unchanged=["body"], before=before)

    async with log.reading():
        await log.done()
        for settled in (True, False):
            for number in (1, 2):
                await update(number, gone=True)
                await update(number, gone=True)
            if settled:
                await log.done()
                assert sorted(await log.documents()) == ["3"]
            for number in (1, 2):
                await update(number, gone=False)
        await log.done()
        await update(3, to=4, gone=True)
        await log.done()
        await update(4, gone=False)
        await log.done()
        found = await log.documents()
    assert {doc_id: (doc["title"], doc["body"]) for doc_id, doc in found.items()} == dict.fromkeys(
        ["1", "2", "4"], ("again", row(1)["body"])
    )
    assert asked == []
    assert await log.letters() == []


# Lists


WORDS = """
def words(row):
    if row["body"] == "raise":
        raise ValueError
    if row["body"] == "none":
        return None
    return [{"word": word, "of": row["id"]} for word in row["body"].split()]
"""


@pytest.fixture
def listed(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    (tmp_path / "words_of_posts.py").write_text(WORDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    log.with_index(transform="words_of_posts:words")
    return log


async def found_words(log: Log) -> dict[str, str]:
    await log.done()
    return {doc_id: document["word"] for doc_id, document in (await log.documents()).items()}


async def test_a_list_that_shrinks_deletes_what_is_gone(listed: Log) -> None:
    async with listed.reading():
        await listed.put("insert", *post(1, body="a b c"))
        await listed.put("insert", *post(2, body="x"))
        assert await found_words(listed) == {"1": "a", "1||1": "b", "1||2": "c", "2": "x"}
        await listed.put("update", *post(1, body="d"))
        await listed.put("update", *post(2, body="y z"))
        assert await found_words(listed) == {"1": "d", "2": "y", "2||1": "z"}
        await listed.put("update", *post(1, body="e f"))
        await listed.put("update", {"id": 9}, {"id": 9}, before={"id": 2}, unchanged=["body"])
        assert await found_words(listed) == {"1": "e", "1||1": "f", "9": "y", "9||1": "z"}
        await listed.put("update", *post(1, body=""))
        await listed.put("delete", {"id": 9})
        assert await found_words(listed) == {}


async def test_many_changes_of_lists_in_one_go_end_as_the_last(listed: Log) -> None:
    for number in range(1, 6):
        await listed.put("insert", *post(number, body="a b c d"))
        await listed.put("update", *post(number, body="a"))
        await listed.put("update", *post(number, body="b c"))
    await listed.put("update", *post(1, body="none"))
    await listed.put("delete", {"id": 2})
    await listed.put("insert", *post(2, body="again"))
    await listed.put("update", *post(3, body="raise"))
    async with listed.reading():
        found = await found_words(listed)
    assert {k: v for k, v in found.items() if k[0] != "3"} == {
        "2": "again", "4": "b", "4||1": "c", "5": "b", "5||1": "c",
    }  # fmt: skip
    [letter] = await listed.letters()
    assert letter["key"] == {"id": 3}


async def test_a_truncate_takes_all_documents_of_every_row(listed: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "PAGE", 10)
    async with listed.reading():
        for number in range(1, 40):
            await listed.put("insert", *post(number, body="a b c d e"[: 2 * (number % 5) + 1]))
        await listed.put("insert", *post(40, body="word " * 35))
        await listed.put("truncate")
        await listed.put("insert", *post(41, body="x y"))
        assert await found_words(listed) == {"41": "x", "41||1": "y"}


async def test_lists_that_come_again_change_nothing(listed: Log) -> None:
    async with listed.reading():
        await listed.put("insert", *post(1, body="a b c"))
        await listed.put("update", *post(1, body="d"))
        await listed.put("insert", *post(2, body="x y"))
        await listed.put("delete", {"id": 2})
        await listed.done()
    record = await listed.record()
    [generation] = record.generations
    assert generation.longest == 3
    # As if nothing had ever been acked.
    await delete_consumer(listed.broker, generation.stream, generation.consumer)
    again = record.having_changed(generation.number, seq=0)
    await listed.state.put(index_key(listed.config.source.name, listed.name), again)
    async with listed.reading():
        await listed.put("insert", *post(3, body="z"))
        assert await found_words(listed) == {"1": "d", "3": "z"}
