"""The publisher's frames against the client library's own parser, and what it makes of the stream's end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nats.protocol.parser import Parser

from bridge.errors import Fenced, ForeignWriter
from bridge.event import Position
from bridge.stream import publisher
from bridge.stream.batch import Item, frames
from bridge.stream.publisher import StreamChanged, Tail, settle
from bridge.stream.server import parse_headers


def item(number: int, end: int = 0, payload: bytes = b"{}") -> Item:
    return Item(b"cdc.main.public.t", b"Bridge-Op: insert\r\n", payload, str(Position(1, 100, number, 0, 0)), end)


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


def test_a_batch_is_fenced_once_committed_once_and_whole_for_the_librarys_parser() -> None:
    items = [item(1, payload=b'{"a":1}'), item(2, payload=b"\r\nHPUB x 1 1\r\n"), item(3, payload="é".encode())]
    found = received(frames(items, b"id.1", 41, b"inbox.1"))
    assert [payload for *_, payload in found] == [i.payload for i in items]
    assert [headers.get("Nats-Expected-Last-Sequence") for _, _, headers, _ in found] == ["41", None, None]
    assert [headers["Nats-Batch-Sequence"] for _, _, headers, _ in found] == ["1", "2", "3"]
    assert [headers.get("Nats-Batch-Commit") for _, _, headers, _ in found] == [None, None, "1"]
    assert [reply for _, reply, _, _ in found] == ["", "", "inbox.1"]
    assert {headers["Nats-Batch-Id"] for _, _, headers, _ in found} == {"id.1"}
    assert {headers["Bridge-Op"] for _, _, headers, _ in found} == {"insert"}


def test_a_single_event_is_a_fenced_message_without_a_batch() -> None:
    [(subject, reply, headers, payload)] = received(frames([item(1)], b"id.1", 0, b"inbox.1"))
    assert (subject, reply, payload) == ("cdc.main.public.t", "inbox.1", b"{}")
    assert headers == {"Nats-Expected-Last-Sequence": "0", "Bridge-Op": "insert"}


ITEMS = [item(n) for n in range(1, 6)]
ACKED = Tail(10, str(Position(1, 50, 0, 0, 0)), 3)


@pytest.mark.parametrize("arrived", range(6))
def test_what_the_stream_has_of_what_was_sent_is_not_sent_again(arrived: int) -> None:
    position = ITEMS[arrived - 1].position if arrived else ACKED.position
    assert settle(ACKED, Tail(10 + arrived, position, 3), ITEMS, 3, "s") == ITEMS[arrived:]


def test_a_predecessors_late_messages_that_continue_in_order_count() -> None:
    assert settle(ACKED, Tail(12, ITEMS[1].position, 2), ITEMS, 3, "s") == ITEMS[2:]


@pytest.mark.parametrize(
    ("tail", "error"),
    [
        (Tail(11, ITEMS[0].position, 4), Fenced),
        (Tail(11, "", 0), ForeignWriter),
        (Tail(12, ITEMS[0].position, 3), StreamChanged),
        (Tail(11, ITEMS[4].position, 2), StreamChanged),
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


def made(wire: Any) -> publisher.Publisher:
    async def make() -> publisher.Publisher:
        return publisher.Publisher(wire, "s", 1, Tail(0, "", 0))

    return asyncio.run(make())


def test_small_transactions_share_a_batch_that_is_cut_at_their_end() -> None:
    wire = Wire()
    writer = made(wire)
    for number in range(1, 1300):
        last = number % 3 == 0
        writer.add(b"cdc.main.public.t", "insert", f"{number:09}", b"{}", 7 if last else 0, last=last)
    assert sizes(wire) == [999]
    writer.flush()
    assert sizes(wire) == [999, 300]


def test_a_transaction_that_does_not_fit_spans_batches() -> None:
    wire = Wire()
    writer = made(wire)
    for number in range(2500):
        writer.add(b"cdc.main.public.t", "insert", f"{number:09}", b"{}", 0, last=False)
    assert sizes(wire) == [1000, 1000]
    writer.flush()
    assert sizes(wire) == [1000, 1000], "half a transaction waits for its end"


def test_what_comes_while_batches_are_on_their_way_shares_the_next_one() -> None:
    wire = Wire()
    writer = made(wire)
    for number in range(1, 8):
        writer.add(b"cdc.main.public.t", "insert", f"{number:09}", b"{}", 7, last=True)
        writer.flush()
    assert sizes(wire) == [1, 1]
    acked(writer, 1, 1)
    assert sizes(wire) == [1, 1, 5], "the answer sends what was waiting for it"
    acked(writer, 2, 2)
    acked(writer, 3, 7)
    assert writer.idle
    assert writer.acked.seq == 7


def acked(writer: publisher.Publisher, batch: int, seq: int) -> None:
    message: Any = type("Message", (), {"subject": f"inbox.{batch}", "data": b'{"seq":%d}' % seq})
    asyncio.run(writer._answered(message))


def test_batches_are_bounded_in_bytes_and_so_is_what_is_on_its_way() -> None:
    wire = Wire()
    writer = made(wire)
    count = 0
    while not writer.full:
        writer.add(b"cdc.main.public.t", "insert", f"{count:09}", b"x" * 300_000, 7, last=True)
        count += 1
    assert all(len(data) < publisher.BATCH_BYTES + 300_000 for data in wire.written)
    assert sum(map(len, wire.written)) <= publisher.WINDOW_BYTES + 2 * publisher.BATCH_BYTES
