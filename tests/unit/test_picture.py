"""The picture of an index's rows against a simple model in memory, over random events."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import msgspec
import pytest

from bridge import event
from bridge.errors import ServerRefused
from bridge.index import picture as module
from bridge.index.document import Builder, Shape, version
from bridge.index.naming import Naming
from bridge.index.picture import Note, Picture, Standing, Table

DEEP = "[" * 600 + "]" * 600
BUILDERS = {("public", "posts"): Builder(Shape(), "public.posts", Naming(), lambda _: True)}
PARTITIONS = (None, "public.posts_a", "public.posts_b")


class Sent(NamedTuple):
    """A message as a picture takes it."""

    seq: int
    epoch: int
    position: str
    data: bytes


def wire(op: event.Op, key: int | None = None, after: Any = None, **more: Any) -> bytes:
    """An event's bytes; `after` as text is taken as it is."""
    data = event.head(op, "main", "public", "posts")
    if key is not None:
        data += b',"key":{"id":%d}' % key
    for name, value in ({"after": after} | more).items():
        if value is not None:
            data += b',"%s":%s' % (name.encode(), value.encode() if isinstance(value, str) else _json(value))
    return data + b',"lsn":"0/1"' + event.transaction("0/2", 7, None)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


class Row(NamedTuple):
    """A row of the model; `data` is None where it cannot be known."""

    data: dict[str, Any] | None
    missing: frozenset[str]
    partition: str | None
    version: int


class Model:
    """Makes random events and follows them in the plainest way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rows: dict[int, Row] = {}
        self.seq = 0
        self.epoch = 1
        self.begin = 0

    @property
    def at(self) -> int:
        """The version of what is written now."""
        return version(self.epoch, self.seq)

    def messages(self, count: int) -> Iterator[Sent]:
        for _ in range(count):
            self.seq += self.random.choice((1, 1, 1, 5))
            epoch = self.epoch
            if self.random.random() < 0.002:
                self.epoch = epoch = self.epoch + 1
            elif self.random.random() < 0.01:
                # What a killed writer sent comes in late.
                epoch = max(self.epoch - 1, 1)
            yield Sent(self.seq, epoch, "", self._event())

    def _event(self) -> bytes:
        kind = self.random.choices(
            ("insert", "update", "toasted", "moved", "delete", "truncate", "begin", "end", "broken", "other"),
            (30, 20, 15, 12, 10, 0.4, 0.5, 0.5, 2, 1),
        )[0]
        return bytes(getattr(self, f"_{kind}")())

    def _some(self) -> int:
        if self.rows and self.random.random() < 0.8:
            return self.random.choice(list(self.rows))
        return self.random.randrange(200)

    def _full(self, key: int) -> dict[str, Any]:
        return {"id": key, "title": f"t{self.random.randrange(99)}", "body": "b" * self.random.randrange(40), "n": 1.50}

    def _insert(self) -> bytes:
        key, partition = self._some(), self.random.choice(PARTITIONS)
        data = self._full(key)
        self.rows[key] = Row(data, frozenset(), partition, self.at)
        op: event.Op = self.random.choice(("insert", "read"))
        return wire(op, key, data, partition=_json(partition).decode() if partition else None)

    def _update(self) -> bytes:
        key = self._some()
        data = self._full(key)
        self.rows[key] = Row(data, frozenset(), None, self.at)
        return wire("update", key, data)

    def _toasted(self) -> bytes:
        key = self._some()
        return self._left_out(key, key)

    def _moved(self) -> bytes:
        old, new = self._some(), self.random.randrange(200)
        if self.random.random() < 0.5:
            return self._left_out(old, new)
        data = self._full(new)
        self.rows.pop(old, None)
        self.rows[new] = Row(data, frozenset(), None, self.at)
        return wire("update", new, data, before={"id": old})

    def _left_out(self, old: int, new: int) -> bytes:
        data, names = self._full(new), self.random.choice((["body"], ["body", "title"]))
        before = self.rows.pop(old, None)
        for name in names:
            del data[name]
        sent = dict(data)
        known = before.data if before is not None and before.data is not None else {}
        data |= {name: known[name] for name in names if name in known}
        self.rows[new] = Row(data, frozenset(names) - known.keys(), None, self.at)
        return wire("update", new, sent, before={"id": old} if old != new else None, unchanged=names)

    def _delete(self) -> bytes:
        key = self._some()
        self.rows.pop(key, None)
        return wire("delete", key)

    def _truncate(self) -> bytes:
        partition = self.random.choice(PARTITIONS)
        self.rows = {k: r for k, r in self.rows.items() if partition is not None and r.partition != partition}
        return wire("truncate", partition=_json(partition).decode() if partition else None)

    def _begin(self) -> bytes:
        self.begin = self.at
        return wire("snapshot", phase='"begin"')

    def _end(self) -> bytes:
        if self.begin:
            self.rows = {key: row for key, row in self.rows.items() if row.version >= self.begin}
        return wire("snapshot", phase='"end"')

    def _broken(self) -> bytes:
        key = self._some()
        before = self.rows.get(key)
        self.rows[key] = Row(None, frozenset(), before.partition if before is not None else None, self.at)
        return wire("update", key, f'{{"id":{key},"body":{DEEP}}}')

    def _other(self) -> bytes:
        return wire("schema")


def keys(_: Table) -> list[str]:
    return ["id"]


def batches(messages: list[Sent], size: int) -> Iterator[list[Sent]]:
    return (messages[start : start + size] for start in range(0, len(messages), size))


def shown(standing: Standing | None) -> Row | None:
    """A row of the picture as the model has it."""
    if standing is None:
        return None
    data = None if standing.problem else msgspec.json.decode(standing.data)
    return Row(data, frozenset(standing.missing), standing.partition, standing.version)


@pytest.mark.parametrize("seed", range(4))
def test_random_events_leave_the_rows_of_the_model(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 37)
    model = Model(seed)
    with Picture(BUILDERS, keys, epoch=1) as picture:
        for _ in range(6):
            for batch in batches(list(model.messages(500)), 100):
                picture.take(batch)
            whole = [standing for chunk in picture.chunks(50, 5_000) for standing in chunk]
            assert {int(one.id): shown(one) for one in whole} == model.rows
            assert picture.count() == len(model.rows)
            for key in range(200):
                assert shown(picture.get(str(key))) == model.rows.get(key)
            for doc_id in ("1", "2", "nobody's"):
                assert picture.lacks(doc_id) == (doc_id not in map(str, model.rows))


@pytest.mark.parametrize("seed", range(4))
def test_restricted_to_some_ids_it_has_their_rows_after_two_passes(seed: int) -> None:
    model = Model(seed + 100)
    messages = list(model.messages(3_000))
    wanted = {str(key) for key in range(0, 200, 9)}
    with Picture(BUILDERS, keys, epoch=1, wanted=wanted) as picture:
        picture.take(messages)
        assert picture.again()
        picture.take(messages)
        assert not picture.again()
        for doc_id in wanted:
            assert shown(picture.get(doc_id)) == model.rows.get(int(doc_id))


def test_an_end_that_names_its_begin_sweeps_from_there() -> None:
    end = wire("snapshot", phase='"end"', begin_seq=2)
    with Picture(BUILDERS, keys) as picture:
        picture.take([Sent(n, 1, "", wire("insert", n, {"id": n})) for n in (1, 3)])
        picture.take([Sent(4, 1, "", end)])
        assert [picture.get("1") is None, picture.get("3") is None] == [True, False]


def test_what_is_touched_later_is_no_longer_noted() -> None:
    with Picture(BUILDERS, keys) as picture:
        picture.take([Sent(n, 1, "", wire("insert", n, {"id": n})) for n in range(1, 6)])
        picture.note(Note(str(n), str(n), "missing") for n in range(1, 6))
        moved = wire("update", 2, {"id": 2}, before={"id": 3})
        picture.touch([Sent(6, 1, "", wire("delete", 1)), Sent(7, 1, "", moved)])
        assert [note.id for note in next(picture.notes(9))] == ["4", "5"]
        assert picture.noted() == {"missing": 2}
        assert picture.get("1") is not None
        picture.touch([Sent(8, 2, "", wire("truncate")), Sent(9, 1, "", wire("delete", 7))])
        assert picture.noted() == {}
        assert (picture.seq, picture.epoch) == (9, 2)


def test_notes_can_be_changed_between_two_pages_of_them() -> None:
    with Picture(BUILDERS, keys) as picture:
        picture.note(Note(f"{n:03d}", "x", "extra") for n in range(10))
        seen = []
        for page in picture.notes(3):
            seen += [note.id for note in page]
            picture.forget(note.id for note in page)
        assert seen == [f"{n:03d}" for n in range(10)]
        assert picture.noted() == {}


def test_a_complete_read_that_has_not_ended_is_known() -> None:
    with Picture(BUILDERS, keys) as picture:
        picture.take([Sent(5, 1, "", wire("snapshot", phase='"begin"'))])
        assert picture.open == {("public", "posts"): version(1, 5)}
        picture.touch([Sent(9, 1, "", wire("snapshot", phase='"end"'))])
        assert picture.open == {}


def test_events_that_do_not_say_their_row_are_counted() -> None:
    with Picture(BUILDERS, lambda _: []) as picture:
        picture.take([Sent(1, 1, "", b"no event"), Sent(2, 1, "", wire("insert", None, {"id": 1}))])
        assert (picture.lost, picture.count()) == (2, 0)


def _files() -> list[str]:
    """What this process has open that has no name any more."""
    found = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [name for name in found if "(deleted)" in name and "etilqs" in name]


@pytest.mark.anyio
async def test_memory_is_bounded_by_a_file_that_goes_with_a_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    monkeypatch.setattr(module, "CACHE_KIB", 256)
    open_in_block: list[str] = []
    with anyio.CancelScope() as scope:
        with Picture(BUILDERS, keys) as picture:
            rows = [Sent(n, 1, "", wire("insert", n, {"id": n, "body": "x" * 9_000})) for n in range(500)]
            await anyio.to_thread.run_sync(picture.take, rows)
            assert picture.count() == 500
            open_in_block += _files()
            scope.cancel()
            await anyio.sleep_forever()
    assert open_in_block
    assert not _files()
    assert os.listdir(tmp_path) == []


def test_a_file_without_room_is_said_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with Picture(BUILDERS, keys) as picture:
        picture._run("PRAGMA max_page_count = 20")
        rows = [Sent(n, 1, "", wire("insert", n, {"id": n, "body": "x" * 9_000})) for n in range(500)]
        monkeypatch.setattr(module, "MOST", 100)
        with pytest.raises(ServerRefused, match="SQLITE_FULL") as error:
            picture.take(rows)
        assert "TMPDIR" in error.value.remedy


def test_a_note_goes_with_the_row_that_it_belongs_to() -> None:
    with Picture(BUILDERS, keys) as picture:
        picture.take([Sent(1, 1, "", wire("insert", 5, {"id": 5}))])
        picture.expect(["5||1"])
        assert [picture.lacks(one) for one in ("5", "5||1", "5||2")] == [False, False, True]
        picture.note([Note("5||2", "5", "extra"), Note("6", "6", "extra")])
        picture.touch([Sent(2, 1, "", wire("update", 5, {"id": 5}))])
        assert [bool(picture.noted_as(one)) for one in ("5||2", "6")] == [False, True]
