"""What comes from NATS: deliveries and their headers, events, the API's answers, what buckets hold."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from functools import partial
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client

from bridge import event
from bridge.errors import BadState, BridgeError
from bridge.event import HEADER_LAST, Position, Ref
from bridge.index import document, naming
from bridge.index.naming import Rejected
from bridge.stream import answer, intake, refusal
from bridge.stream.intake import Intake, Message
from bridge.stream.state import Checkpoint, Shape, SnapshotStatus, TableRecord, Writer
from bridge.stream.tail import tail_of
from tests.fuzz.fuzzing import Target, outcome

POSITION = str(Position(1, 512, 427, 0, 0))
REPLY = "$JS.ACK.cdc_main.reader.1.5.3.1764300000000000000.7"
BLOCK = (
    b"NATS/1.0\r\nBridge-Op: insert\r\nBridge-Position: %b\r\nBridge-Epoch: 3\r\nBridge-V: 1\r\n" % POSITION.encode()
)
ROW = (
    b'{"op":"update","source":"main","schema":"public","table":"t","key":{"id":1},"before":{"id":2},"after":{"id":1,'
    b'"body":"b \\" c","n":1.10,"doc":{"a":[1,{}]}},"unchanged":["long"],"lsn":"0/1AB","commit_lsn":"0/200","txid":7,'
    b'"committed_at":"2026-01-01T00:00:00.000000Z"}'
)
EVENTS = [
    ROW,
    ROW.replace(b'"before":{"id":2},', b""),
    ROW.replace(b'{"id":1},', b"null,"),
    ROW.replace(b'"after"', b'"ref":{"bucket":"b","name":"n","size":1,"digest":"d"},"after"'),
    b'{"op":"truncate","source":"main","schema":"public","table":"t","key":null,"lsn":"0/1","commit_lsn":"0/2","txid":7}',
    b'{"op":"snapshot","source":"main","schema":"public","table":"t","key":null,"phase":"end","begin_seq":5}',
    b'{"op":"message","source":"main","prefix":"p","transactional":true,"content":"c","lsn":"0/1","commit_lsn":"0/2"}',
    event.altered("main", "public", "t", ([event.Column("a", "int", 23)], ["a"]), ([], []), b"0/1", b',"txid":7}'),
]
WORDS = [
    b'"op":"delete"', b'"key":null', b'"after":', b'"before":{', b'"unchanged":["id"]', b',"ref":{"bucket":',
    b'"begin_seq":', b'"phase":"begin"', b'{"a":' * 300, b'"id":', b'"columns":[',
]  # fmt: skip


def header(data: bytes) -> str:
    """Headers of a stored message: always strings, and an end of the stream that is ours or nobody's."""
    found = intake.parse_headers(data)
    assert all(isinstance(part, str) for pair in found.items() for part in pair)
    tail = tail_of(answer.Stored(9, "cdc.main.public.t", found, b""), 9)
    assert tail.seq == 9
    if tail.position:
        assert str(Position.parse(tail.position)) == tail.position
    made = intake.message("cdc.main.public.t", REPLY, data, b"")
    assert isinstance(made, Message)
    if tail.position:
        assert (made.position, made.epoch, made.last) == (tail.position, tail.epoch, HEADER_LAST in found)
    return f"{bool(tail.position)} {tail.whole} {sorted(found)[:3]}"


def delivery(data: bytes) -> str:
    """Frames in any pieces: taken, passed on to the library, or the end of the connection by an error that it knows."""
    return asyncio.run(_delivered(data))


async def _delivered(data: bytes) -> str:
    whole: list[object] = []
    pieces: list[object] = []
    ends = "whole"
    for found, cuts in ((whole, 1), (pieces, 7)):
        parser = Intake(_Nobody())
        parser.hand(1, found.append)
        size = max(1, len(data) // cuts)
        try:
            for at in range(0, len(data), size):
                await parser.parse(data[at : at + size])
        except nats.errors.Error as error:
            ends = type(error).__name__
    assert whole == pieces, "pieces of the same frames give something else"
    return f"{[type(one).__name__ for one in whole[:4]]} {ends}"


class _Nobody(Client):
    """A client that is not connected, and takes note of nothing."""

    async def _process_msg(self, *_: Any, **__: Any) -> None: ...

    async def _process_ping(self) -> None: ...

    async def _process_pong(self) -> None: ...

    async def _process_err(self, _: Any) -> None: ...

    async def _process_info(self, *_: Any, **__: Any) -> None: ...


def payload(data: bytes) -> str:
    """An event is understood or refused, by each way of reading it; what is made of one is one again."""
    said = [
        outcome(lambda: event.ref_of(data)),
        outcome(lambda: naming.outline(data), *naming.UNREADABLE),
        outcome(lambda: document.read(data), Rejected),
    ]
    try:
        found = event.decode(data)
    except naming.UNREADABLE as error:
        return " ".join([*said, type(error).__name__])
    said.append(outcome(lambda: event.outline(data), *naming.UNREADABLE, KeyError))
    said.append(outcome(lambda: event.columns_of(data), *naming.UNREADABLE, KeyError))
    said.append(outcome(lambda: naming.row(found.after), *naming.UNREADABLE))
    if naming.keyless(found):
        said.append(outcome(lambda: naming.keyed(found, ["id", "body"]), Rejected, *naming.UNREADABLE))
    with contextlib.suppress(RecursionError, *naming.UNREADABLE):
        claimed = event.referred(data, Ref("bucket", "name", 1, "SHA-256=x"))
        said.append(outcome(lambda: event.decode(claimed)))
    return f"{found.op} {' '.join(said)}"


def api(data: bytes) -> str:
    """An answer of the API is a value, or an error of ours; an ack never fails to be read."""
    ack = answer.ack(data)
    error = ack.error or {}
    assert refusal.remedy(error.get("err_code", 0), str(error.get("description")), "cdc_main")
    try:
        found = answer.decoded(data, "STREAM.INFO.cdc_main", "nats://127.0.0.1")
    except BridgeError as refused:
        return f"{type(refused).__name__} {ack.seq > 0}"
    said = [
        outcome(lambda: answer.stream_state(found, "cdc_main", "here"), BridgeError),
        outcome(lambda: tail_of(answer.stored(found, "here"), 1), BridgeError),
    ]
    return " ".join(said)


KINDS: list[Any] = [Checkpoint, SnapshotStatus, TableRecord, Shape, list[Writer]]


def bucket(data: bytes) -> str:
    """What a key holds is a record of its kind, or named as something that no bridge has written."""
    return " ".join([outcome(partial(answer.value, data, kind, "KV key"), BadState) for kind in KINDS])


def subject(data: bytes) -> str:
    """Raw values of a key become one token of a subject and one id, or are refused."""
    said = [outcome(lambda: naming.identify({"a": msgspec.Raw(data)}), *naming.UNREADABLE)]
    said.append(outcome(lambda: naming.text_of(data), *naming.UNREADABLE))
    said.append(outcome(lambda: naming.parts(data.decode(errors="replace")), *naming.UNREADABLE))
    return " ".join(said)


BODY = base64.b64encode(ROW).decode()
ANSWERS = [
    b'{"type":"io.nats.jetstream.api.v1.stream_info_response","config":{"name":"cdc_main","subjects":["cdc.main.>"]},'
    b'"created":"2026-11-23T01:25:13Z","state":{"messages":6,"bytes":3000,"first_seq":1,"last_seq":6}}',
    b'{"error":{"code":404,"err_code":10059,"description":"stream not found"}}',
    b'{"error":{"code":503,"err_code":10039,"description":"JetStream not enabled for account"}}',
    b'{"error":{"code":503,"description":"no leader"}}',
    msgspec.json.encode({"message": {"subject": "cdc.main.public.t", "seq": 5, "hdrs": base64.b64encode(BLOCK).decode(),
                                     "data": BODY, "time": "2026-11-23T01:25:13Z"}}),
    b'{"stream":"cdc_main","seq":5,"batch":"x","count":3}',
    b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"},"stream":"cdc_main","seq":0}',
    b"",
]  # fmt: skip
KEPT = [
    b'{"phase":"stream","lsn":"0/28E51E8","position":"%b","stream":"cdc_main","stream_seq":6,"stream_created":"x",'
    b'"system_id":"7711157203913408677","timeline":1,"database":"app","slot":"bridge_main",'
    b'"consistent_point":"0/28E5150","snapshot_seq":5,"at":"2026-11-23T01:25:23.672832Z"}' % POSITION.encode(),
    b'{"state":"done","mode":"initial","rows":3,"rate":1.5,"eta":null,"lsn":"0/1","complete_from":1}',
    b'{"columns":[{"name":"id","type":"integer","oid":23}],"key":["id"],"history":[]}',
    b'[{"epoch":1,"first_seq":1}]',
    b"",
]
HMSG = b"HMSG cdc.main.public.t 1 %b %d %d\r\n%b\r\n%b\r\n"


def _frame(reply: str, block: bytes, data: bytes) -> bytes:
    return HMSG % (reply.encode(), len(block) + 2, len(block) + 2 + len(data), block, data)


DELIVERIES = [
    _frame(REPLY, BLOCK, ROW),
    _frame(REPLY, BLOCK + b"Bridge-Last: 1\r\n", b"{}") * 2,
    _frame("$JS.ACK.domain.hash.cdc_main.reader.1.5.3.1764300000000000000.7.x", BLOCK, b"{}"),
    _frame("", b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Stream: 5\r\n", b""),
    _frame("$JS.ACK.short.1", BLOCK, b"{}"),
    b"MSG a 1 5\r\nhello\r\nPING\r\nMSG b 2 $JS.ACK.a 2\r\nhi\r\nPONG\r\n+OK\r\n-ERR 'x'\r\n",
    b'INFO {"server_id":"x","version":"2.15.0"}\r\n',
]
HEADERS = [
    BLOCK + b"\r\n", BLOCK + b"Bridge-Last: 1\r\n\r\n", b"NATS/1.0 503\r\n\r\n", b"", b"NATS/1.0 409 x\r\n",
    b"NATS/1.0\r\nBridge-Epoch: " + b"9" * 5000 + b"\r\nBridge-Position: x\r\n\r\n",
]  # fmt: skip
NAMES = [
    b"\r\nBridge-Epoch: ", b"\r\nBridge-Position: ", POSITION.encode(), b"\r\nBridge-Op: ", b": ", b"\r\n", b"NATS/1.0",
    b"\xc2\xb2", b"Bridge-Last:", b"Status", b"$JS.ACK.", b"HMSG ", b"MSG ",
]  # fmt: skip
TARGETS = [
    Target("header", header, HEADERS, NAMES),
    Target("delivery", delivery, DELIVERIES, [*NAMES, b" 1 ", b"0", b"\r\nHMSG", b"PING\r\n"]),
    Target("event", payload, EVENTS, WORDS),
    Target("api", api, ANSWERS, [b'"error":', b'"state":', b'"message":', b'"seq":', b'"err_code":"x"', b'"hdrs":"a"']),
    Target("bucket", bucket, KEPT, [b'"lsn":', b'"columns":[', b'"epoch":', b"[]", b'"state":"x"']),
    Target(
        "key",
        subject,
        [b"1", b'"', b'"a|b"', b'"\\u0000"', b"null", b'"x"', b"1.50", b"a|b\\|c"],
        [b"|", b"\\", b"'", b"#"],
    ),
]
