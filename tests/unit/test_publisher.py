"""The publisher's frames against the client library's own parser, and what it makes of the stream's end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nats.protocol.parser import Parser

from bridge.errors import Fenced, ForeignWriter
from bridge.event import Position
from bridge.stream import publisher
from bridge.stream.batch import Item, Link, batch, chain
from bridge.stream.intake import parse_headers
from bridge.stream.mode import Publishing
from bridge.stream.tail import StreamChanged, Tail, settle


def item(number: int, payload: bytes = b"{}") -> Item:
    position = str(Position(1, 100, number, 0, 0)).encode()
    return Item(b"cdc.main.public.t", b"Bridge-Op: insert\r\n", payload, position)


class Received:
    """What a server would see: the client's parser reads HMSG, which differs from HPUB in verb and subscription."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str, dict[str, str], bytes]] = []

    async def _process_msg(self, _sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self.messages.append((subject.decode(), reply.decode(), parse_headers(headers), data))


def received(data: bytes) -> list[tuple[str, str, dict[str, str], bytes]]:
    seen: Any = Received()

    async def parse() -> None:
        converted = data.replace(b"HPUB cdc.main.public.t ", b"HMSG cdc.main.public.t 1 ")
        await Parser(seen).parse(converted)

    asyncio.run(parse())
    found: list[tuple[str, str, dict[str, str], bytes]] = seen.messages
    return found


PAYLOADS = [b'{"a":1}', b"\r\nHPUB x 1 1\r\n", "é".encode()]


def test_a_batch_is_fenced_once_committed_once_and_whole_for_the_librarys_parser() -> None:
    found = received(batch([item(n, payload) for n, payload in enumerate(PAYLOADS)], b"id.1", 41, b"inbox.1"))
    assert [payload for *_, payload in found] == PAYLOADS
    assert [headers.get("Nats-Expected-Last-Sequence") for _, _, headers, _ in found] == ["41", None, None]
    assert [headers["Nats-Batch-Sequence"] for _, _, headers, _ in found] == ["1", "2", "3"]
    assert [headers.get("Nats-Batch-Commit") for _, _, headers, _ in found] == [None, None, "1"]
    assert [reply for _, reply, _, _ in found] == ["", "", "inbox.1"]
    assert {headers["Nats-Batch-Id"] for _, _, headers, _ in found} == {"id.1"}
    assert {headers["Bridge-Op"] for _, _, headers, _ in found} == {"insert"}


def test_a_single_event_is_a_fenced_message_without_a_batch() -> None:
    [(subject, reply, headers, payload)] = received(chain([item(1)], 0, Link(b"me.", 1, False), b"inbox.1"))
    assert (subject, reply, payload) == ("cdc.main.public.t", "inbox.1", b"{}")
    assert headers == {"Nats-Expected-Last-Sequence": "0", "Nats-Msg-Id": "me.000000000001", "Bridge-Op": "insert"}


@pytest.mark.parametrize("follows", [False, True])
def test_each_message_of_a_chain_names_the_one_before_and_the_last_asks_for_an_answer(follows: bool) -> None:
    items = [item(n, payload) for n, payload in enumerate(PAYLOADS)]
    found = received(chain(items, 41, Link(b"me.", 9, follows), b"inbox.1"))
    assert [payload for *_, payload in found] == PAYLOADS
    assert [headers["Nats-Msg-Id"] for _, _, headers, _ in found] == [
        "me.000000000009",
        "me.000000000010",
        "me.000000000011",
    ]
    before = [headers.get("Nats-Expected-Last-Msg-Id") for _, _, headers, _ in found]
    assert before == ["me.000000000008" if follows else None, "me.000000000009", "me.000000000010"]
    sequences = [headers.get("Nats-Expected-Last-Sequence") for _, _, headers, _ in found]
    assert sequences == [None if follows else "41", None, None]
    assert [reply for _, reply, _, _ in found] == ["", "", "inbox.1"]
    assert {headers["Bridge-Op"] for _, _, headers, _ in found} == {"insert"}


def test_a_transactions_last_event_says_so() -> None:
    last = item(2)
    last.close(77)
    found = received(chain([item(1), last], 0, Link(b"me.", 1, False), b"inbox.1"))
    assert [headers.get("Bridge-Last") for _, _, headers, _ in found] == [None, "1"]
    assert [payload for *_, payload in found] == [b"{}", b"{}"]


ITEMS = [item(n) for n in range(1, 6)]
ACKED = Tail(10, str(Position(1, 50, 0, 0, 0)), 3)


@pytest.mark.parametrize("arrived", range(6))
def test_what_the_stream_has_of_what_was_sent_is_not_sent_again(arrived: int) -> None:
    position = ITEMS[arrived - 1].position.decode() if arrived else ACKED.position
    assert settle(ACKED, Tail(10 + arrived, position, 3), ITEMS, 3, "s") == ITEMS[arrived:]


def test_a_predecessors_late_messages_that_continue_in_order_count() -> None:
    assert settle(ACKED, Tail(12, ITEMS[1].position.decode(), 2), ITEMS, 3, "s") == ITEMS[2:]


@pytest.mark.parametrize(
    ("tail", "error"),
    [
        (Tail(11, ITEMS[0].position.decode(), 4), Fenced),
        (Tail(11, "", 0), ForeignWriter),
        (Tail(12, ITEMS[0].position.decode(), 3), StreamChanged),
        (Tail(11, ITEMS[4].position.decode(), 2), StreamChanged),
        (Tail(9, ACKED.position, 3), StreamChanged),
    ],
)
def test_an_end_that_does_not_continue_ours_stops_the_writer(tail: Tail, error: type[Exception]) -> None:
    with pytest.raises(error):
        settle(ACKED, tail, ITEMS, 3, "s")


class Wire:
    """Stands where the broker's connection would be; keeps what is written."""

    class closed:  # noqa: N801 - an asyncio.Event's place
        @staticmethod
        def is_set() -> bool:
            return False

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.nc = self
        self._transport = self
        self.max_payload = 1 << 20
        self.where = "nowhere"

    def write(self, data: bytes) -> None:
        self.written.append(data)


def sizes(wire: Wire) -> list[int]:
    return [data.count(b"HPUB ") for data in wire.written]


def made(wire: Any, publishing: Publishing = "batch") -> publisher.Publisher:
    async def make() -> publisher.Publisher:
        return publisher.Publisher(wire, "s", 1, Tail(0, "", 0), publishing)

    return asyncio.run(make())


def add(writer: publisher.Publisher, number: int, payload: bytes = b"{}", *, joined: bool = False) -> None:
    writer.add(b"cdc.main.public.t", b"insert", b"%09d" % number, payload, joined=joined)


def test_small_transactions_share_a_batch_that_is_cut_at_their_end() -> None:
    wire = Wire()
    writer = made(wire)
    for number in range(1, 1300):
        add(writer, number)
        if number % 3 == 0:
            writer.commit(7)
    assert sizes(wire) == [999]
    writer.flush()
    assert sizes(wire) == [999, 300]


def test_a_transaction_that_does_not_fit_spans_batches() -> None:
    wire = Wire()
    writer = made(wire)
    for number in range(2500):
        add(writer, number)
    assert sizes(wire) == [1000, 1000]
    writer.flush()
    assert sizes(wire) == [1000, 1000], "half a transaction waits for its end"


def test_what_comes_while_batches_are_on_their_way_shares_the_next_one() -> None:
    wire = Wire()
    writer = made(wire)
    for number in range(1, 8):
        add(writer, number)
        writer.commit(7)
        writer.flush()
    assert sizes(wire) == [1, 1]
    acked(writer, 1, 1)
    assert sizes(wire) == [1, 1], "an atomic batch does not go behind a single event"
    acked(writer, 2, 2)
    assert sizes(wire) == [1, 1, 5], "the answer sends what was waiting for it"
    acked(writer, 3, 7)
    assert writer.idle
    assert writer.acked.seq == 7


@pytest.mark.parametrize("before", [998, 999, 1000])
def test_joined_events_share_a_batch(before: int) -> None:
    wire = Wire()
    writer = made(wire)
    for number in range(before):
        add(writer, number)
    add(writer, before)
    add(writer, before + 1, joined=True)
    writer.commit(7)
    writer.flush()
    assert sum(sizes(wire)) == before + 2
    assert before + 1 not in set(sizes(wire)[:-1]), "the pair was split"


def test_a_refused_chain_is_tried_again_with_one_message_whose_answer_tells_why() -> None:
    wire = Wire()
    writer = made(wire, "chain")
    for number in range(5):
        add(writer, number)
    writer.commit(7)
    writer.flush()
    [first] = writer._flying
    writer._fruitless = 2
    assert [len(part) for part in writer._parts(first.items)] == [1, 4]


def acked(writer: publisher.Publisher, batch: int, seq: int) -> None:
    message: Any = type("Message", (), {"subject": f"inbox.{batch}", "data": b'{"seq":%d}' % seq})
    asyncio.run(writer._answered(message))


def test_batches_are_bounded_in_bytes_and_so_is_what_is_on_its_way() -> None:
    wire = Wire()
    writer = made(wire)
    count = 0
    while not writer.full:
        add(writer, count, b"x" * 300_000)
        writer.commit(7)
        count += 1
    assert all(len(data) < publisher.BATCH_BYTES + 300_000 for data in wire.written)
    assert sum(map(len, wire.written)) <= publisher.WINDOW_BYTES + 2 * publisher.BATCH_BYTES


def test_on_a_replicated_stream_nothing_names_an_id_and_nothing_follows_a_single_event() -> None:
    wire = Wire()
    writer = made(wire)
    writer.replicated = True
    for number in range(1, 4):
        add(writer, number)
        writer.commit(7)
        writer.flush()
    assert sizes(wire) == [1], "the next waits for the answer to a single event"
    acked(writer, 1, 1)
    assert sizes(wire) == [1, 2]
    acked(writer, 2, 3)
    add(writer, 4)
    writer.commit(7)
    writer.flush()
    assert sizes(wire) == [1, 2, 1]
    assert not any(b"Nats-Expected-Last-Msg-Id" in data for data in wire.written)
    assert all(data.count(b"Nats-Expected-Last-Sequence") == 1 for data in wire.written)
