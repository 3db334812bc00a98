"""Pulling messages from a consumer: one inbox, several pull requests on the way, so that the wire never waits.

`Pull.next` gives all messages that have arrived, in delivery order, and asks for more by itself; what is asked for and
not yet taken is bounded in messages and bytes, and so is memory. It never skips: what is lost on the way shows as a
jump in the consumer's delivery sequence, which the caller compares.

Source: JetStream pull consumers (ADR-37): `$JS.API.CONSUMER.MSG.NEXT.<stream>.<consumer>`, status messages 100, 404,
408, 409 and 503; `$JS.ACK…` reply subjects (ADR-15).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import anyio
import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from bridge.errors import ServerRefused, Unavailable
from bridge.event import HEADER_EPOCH, HEADER_LAST, HEADER_OP, HEADER_POSITION
from bridge.stream.server import API, Broker, parse_headers

BATCH = 2_000
REQUESTS = 2
BYTES = 2 << 20
BUFFER_BYTES = 8 << 20
EXPIRES = 30.0
HEARTBEAT = 5.0
_WAKE = 0.5
_ALIVE = "100"
_HEADERS = "_process_headers"
_PLAIN = b"NATS/1.0\r\n"
_PENDING = "Nats-Pending-Messages"


class ConsumerGone(Unavailable):
    """The consumer was deleted; whoever reads from it makes it again or finds out why."""


class Message(msgspec.Struct, gc=False):
    """One stored event as a reader sees it.

    `at` is the stream's time in nanoseconds since 1970, `pending` how many messages the consumer still had after this
    one, `delivery` the consumer's own count, which goes up by one from message to message.
    """

    seq: int
    subject: str
    op: str
    epoch: int
    position: str
    last: bool
    data: bytes
    at: int
    pending: int
    delivery: int
    reply: str


def parse(msg: Msg) -> Message:
    """The message in a delivery; its reply subject carries the consumer's numbers, with or without a domain."""
    fields = msg.reply.split(".")
    shift = 0 if len(fields) == 9 else 2
    headers = msg.headers or {}
    return Message(
        int(fields[shift + 5]),
        msg.subject,
        headers.get(HEADER_OP, ""),
        int(headers.get(HEADER_EPOCH) or 0),
        headers.get(HEADER_POSITION, ""),
        HEADER_LAST in headers,
        msg.data,
        int(fields[shift + 7]),
        int(fields[shift + 8]),
        int(fields[shift + 6]),
        msg.reply,
    )


def quick_headers(client: Client) -> None:
    """Let a connection read plain header blocks in one pass: nats-py's own way costs more than all the rest."""
    careful = getattr(client, _HEADERS, None)
    if careful is None or _HEADERS in vars(client):
        return

    async def process(block: bytes | None) -> dict[str, str] | None:
        if block and block.startswith(_PLAIN):
            with contextlib.suppress(UnicodeDecodeError):
                return parse_headers(block)
        found: dict[str, str] | None = await careful(block)
        return found

    vars(client)[_HEADERS] = process


class Pull:
    """The open requests on one consumer. Make it with `pulling`."""

    def __init__(self, broker: Broker, stream: str, consumer: str) -> None:
        self._broker = broker
        self._subject = f"{API}.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._consumer = consumer
        self._inbox = broker.nc.new_inbox()
        self._request = msgspec.json.encode(
            {
                "batch": BATCH,
                "max_bytes": max(BYTES, broker.max_payload + (64 << 10)),
                "expires": int(EXPIRES * 1e9),
                "idle_heartbeat": int(HEARTBEAT * 1e9),
            }
        )
        self._got: list[Msg] = []
        self._bytes = 0
        self._owed = 0
        self._asked = 0
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self._heard = time.monotonic()

    @property
    def waiting(self) -> bool:
        """Whether messages have arrived that `next` has not given yet."""
        return bool(self._got)

    async def arrived(self, msg: Msg) -> None:
        """What the subscription calls for every delivery and status message."""
        self._heard = time.monotonic()
        if msg.reply.startswith("$JS.ACK."):
            self._got.append(msg)
            self._bytes += len(msg.data)
            self._owed -= 1
        else:
            self._status(msg)
        self._wake.set()

    def _status(self, msg: Msg) -> None:
        headers = msg.headers or {}
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == _ALIVE:
            return
        lowered = text.lower()
        if "consumer deleted" in lowered or "consumer not found" in lowered or status == "503":
            self._failure = ConsumerGone(f"the consumer {self._consumer} is not there", "making it again")
        elif _PENDING in headers:
            self._owed -= int(headers[_PENDING])
        elif status == "409" and "leadership" not in lowered and "shutdown" not in lowered:
            self._failure = ServerRefused(
                f"the consumer {self._consumer} refuses a pull: {text}", "remove that consumer; it is made again"
            )
        else:
            self._owed = 0

    async def next(self) -> list[Msg]:
        """The messages that have arrived, or an empty list after half a second without any.

        Raises:
            ConsumerGone: the consumer was deleted.
            Unavailable: the connection is lost or the server has gone silent.
        """
        await self._ask()
        if not self._got and self._failure is None:
            self._wake.clear()
            with anyio.move_on_after(_WAKE):
                await self._wake.wait()
        if self._broker.closed.is_set():
            raise self._broker.lost()
        if self._got:
            got, self._got, self._bytes = self._got, [], 0
            return got
        if self._failure is not None:
            raise self._failure
        if time.monotonic() - self._heard > 3 * HEARTBEAT:
            raise Unavailable(f"the consumer {self._consumer} has gone silent", "connecting again")
        return []

    async def _ask(self) -> None:
        while self._owed <= BATCH * (REQUESTS - 1) and self._bytes < BUFFER_BYTES and self._failure is None:
            if self._owed <= 0:
                self._owed = 0
                self._heard = time.monotonic()
            self._owed += BATCH
            self._asked += 1
            await send(self._broker, self._subject, self._request, reply=f"{self._inbox}.{self._asked}")

    async def open(self) -> None:
        """Subscribe the inbox; the limits of what may wait in it are those of what was asked for."""
        quick_headers(self._broker.nc)
        try:
            self._subscription = await self._broker.nc.subscribe(
                f"{self._inbox}.*", cb=self.arrived, pending_msgs_limit=0, pending_bytes_limit=0
            )
        except nats.errors.Error:
            raise self._broker.lost() from None

    async def close(self) -> None:
        """End the subscription; the server then drops the requests that are open."""
        with anyio.CancelScope(shield=True), contextlib.suppress(nats.errors.Error):
            await self._subscription.unsubscribe()


@contextlib.asynccontextmanager
async def pulling(broker: Broker, stream: str, consumer: str) -> AsyncIterator[Pull]:
    """A `Pull` on a consumer for the length of a block."""
    pull = Pull(broker, stream, consumer)
    await pull.open()
    try:
        yield pull
    finally:
        await pull.close()


async def send(broker: Broker, subject: str, data: bytes = b"", *, reply: str = "") -> None:
    """Publish without waiting for an answer; Unavailable where the connection is gone."""
    if broker.closed.is_set():
        raise broker.lost()
    try:
        await broker.nc.publish(subject, data, reply=reply)
    except (nats.errors.Error, OSError, RuntimeError):
        # RuntimeError: the transport is closed, and the client has not noticed yet.
        raise broker.lost() from None
