"""Deliveries read in one go: whatever the pieces in which bytes arrive, each frame goes where it belongs, once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from bridge import event
from bridge.stream.intake import Intake, Message, Status, message, parse_headers

pytestmark = pytest.mark.anyio


class Client:
    """What a parser calls of its client."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        self.seen.append((sid, bytes(subject), bytes(reply), payload, headers))

    async def _process_ping(self) -> None:
        self.seen.append("ping")

    async def _process_pong(self) -> None:
        self.seen.append("pong")

    async def _process_info(self, found: Any) -> None:
        self.seen.append(found)

    async def _process_err(self, text: str) -> None:
        self.seen.append(text)


def delivery(sid: int, number: int, data: bytes, *, domain: str = "") -> bytes:
    block = b"NATS/1.0\r\n"
    headers = event.headers("insert", event.Position(1, 2, 3, 4, 5), 7, last=number % 2 == 0)
    block += b"".join(b"%s: %s\r\n" % (name.encode(), value.encode()) for name, value in headers.items()) + b"\r\n"
    prefix = f"{domain}.acc." if domain else ""
    reply = f"$JS.ACK.{prefix}s.c.1.{number}.{number + 10}.1700000000000000000.{number + 20}{'.tok' if domain else ''}"
    return b"HMSG cdc.main.t %d %s %d %d\r\n%s%s\r\n" % (
        sid, reply.encode(), len(block), len(block) + len(data), block, data
    )  # fmt: skip


def plain(sid: int, data: bytes, reply: bytes = b"", gap: bytes = b" ") -> bytes:
    reply = reply + gap if reply else b""
    return b"MSG%ssome.subject %d%s%s%d\r\n%s\r\n" % (gap, sid, gap, reply, len(data), data)


LINES = ["PING\r\n", "PONG\r\n", "+OK\r\n", 'INFO {"a":1}\r\n', "-ERR 'Some Text'\r\n"]
payloads = st.binary(max_size=40) | st.sampled_from([b"\r\nHMSG a 5 1 1\r\n", b"PING\r\n", b""])
frames = st.lists(
    st.one_of(
        st.tuples(st.just("ours"), payloads),
        st.tuples(st.just("other"), payloads),
        st.tuples(st.just("spaced"), payloads),
        st.tuples(st.just("replied"), payloads),
        st.tuples(st.just("headed"), payloads),
        st.tuples(st.sampled_from(LINES), st.just(b"")),
    ),
    max_size=12,
)  # fmt: skip


def wire(found: list[tuple[str, bytes]]) -> bytes:
    made = b""
    for number, (kind, data) in enumerate(found):
        if kind == "ours":
            made += delivery(5, number, data)
        elif kind == "headed":
            made += delivery(6, number, data)
        elif kind == "other":
            made += plain(6, data)
        elif kind == "spaced":
            made += plain(5 if number % 2 else 6, data, b" ", gap=b" \t" if number % 3 else b" ")
        elif kind == "replied":
            made += plain(5 if number % 2 else 6, data, b"12")
        else:
            made += kind.encode()
    return made


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(frames, st.lists(st.integers(0, 10_000), max_size=30))
async def test_every_frame_goes_where_it_belongs_however_it_is_cut(
    found: list[tuple[str, bytes]], cuts: list[int]
) -> None:
    data = wire(found)
    library, client = Client(), Client()
    await Parser(library).parse(data)
    taken: list[Message | Status] = []
    intake = Intake(client)  # type: ignore[arg-type]
    intake.hand(5, taken.append)
    for piece in pieces(data, cuts):
        await intake.parse(piece)
    whole = [one for one in library.seen if not (isinstance(one, tuple) and one[0] == 5)]
    assert client.seen == whole
    ours = [one for one in library.seen if isinstance(one, tuple) and one[0] == 5]
    assert len(taken) == len(ours)
    for one, (_, subject, reply, payload, _) in zip(taken, ours, strict=True):
        if isinstance(one, Message):
            assert (one.data, one.subject, one.reply) == (payload, subject.decode(), reply.decode())


async def test_a_delivery_tells_all_that_its_headers_and_reply_say() -> None:
    for domain in ("", "hub"):
        taken: list[Message | Status] = []
        intake = Intake(Client())  # type: ignore[arg-type]
        intake.hand(5, taken.append)
        await intake.parse(delivery(5, 4, b"{}", domain=domain))
        [one] = taken
        assert isinstance(one, Message)
        assert (one.op, one.epoch, one.position) == ("insert", 7, str(event.Position(1, 2, 3, 4, 5)))
        assert (one.delivery, one.pending, one.at, one.last) == (14, 24, 1_700_000_000_000_000_000, True) or domain
        assert one.seq == 4


async def test_headers_in_another_order_or_missing_are_read_too() -> None:
    reply = "$JS.ACK.s.c.1.3.4.5.6"
    one = message("s", reply, b"NATS/1.0\r\nBridge-Last: 1\r\nBridge-Epoch: 9\r\nBridge-Op: delete\r\n\r\n", b"")
    assert isinstance(one, Message)
    assert (one.op, one.epoch, one.position, one.last) == ("delete", 9, "", True)
    strange = message("s", reply, b"NATS/1.0\r\nBridge-Epoch: nine\r\nBridge-Op: delete\r\n\r\n", b"")
    assert isinstance(strange, Message)
    assert (strange.op, strange.epoch) == ("delete", 0)
    bare = message("s", reply, b"", b"x")
    assert isinstance(bare, Message)
    assert (bare.op, bare.epoch, bare.last) == ("", 0, False)


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503", "Description": ""}),
        (b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 7\r\n\r\n",
         {"Status": "408", "Description": "Request Timeout", "Nats-Pending-Messages": "7"}),
        (b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 1\r\n\r\n",
         {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Consumer": "1"}),
        (b"", {}),
    ],
)  # fmt: skip
async def test_the_servers_word_on_a_request_is_read(block: bytes, headers: dict[str, str]) -> None:
    found = message("_INBOX.1", "", block, b"")
    assert isinstance(found, Status)
    assert found.headers == headers == parse_headers(block)


async def test_what_is_no_frame_is_an_error_as_it_is_in_the_library() -> None:
    intake = Intake(Client())  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        await intake.parse(b"NONSENSE 1 2\r\n")


async def test_a_frame_that_the_library_reads_in_another_way_ends_the_connection() -> None:
    intake = Intake(Client())  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        await intake.parse(b"MSG\x0bsome.subject 5 2\r\nab\r\n")


async def test_a_lost_connection_leaves_nothing_behind() -> None:
    taken: list[Message | Status] = []
    client = Client()
    intake = Intake(client)  # type: ignore[arg-type]
    intake.hand(5, taken.append)
    await intake.parse(delivery(5, 1, b"x" * 100)[:60])
    intake.reset()
    await intake.parse(b"PING\r\n")
    assert client.seen == ["ping"]
    assert taken == []
