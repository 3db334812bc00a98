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

from bridge.errors import ServerRefused, Unavailable
from bridge.stream.intake import Intake, Message, Status, intake, number
from bridge.stream.server import API, Broker

BATCH = 2_000
REQUESTS = 2
BYTES = 2 << 20
BUFFER_BYTES = 8 << 20
EXPIRES = 30.0
HEARTBEAT = 5.0
_WAKE = 0.5
_ALIVE = "100"
_PENDING = "Nats-Pending-Messages"


class ConsumerGone(Unavailable):
    """The consumer was deleted; whoever reads from it makes it again or finds out why."""


class Pull:
    """The open requests on one consumer. Make it with `pulling`."""

    _intake: Intake

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
        self._got: list[Message] = []
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

    def arrived(self, found: Message | Status) -> None:
        """Take a delivery or a status message."""
        self._heard = time.monotonic()
        if isinstance(found, Message):
            self._got.append(found)
            self._bytes += len(found.data)
            self._owed -= 1
        else:
            self._status(found.headers)
        self._wake.set()

    def _status(self, headers: dict[str, str]) -> None:
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == _ALIVE:
            return
        lowered = text.lower()
        if "consumer deleted" in lowered or "consumer not found" in lowered or status == "503":
            self._failure = ConsumerGone(f"the consumer {self._consumer} is not there", "making it again")
        elif _PENDING in headers:
            self._owed -= number(headers[_PENDING])
        elif status == "409" and "leadership" not in lowered and "shutdown" not in lowered:
            self._failure = ServerRefused(
                f"the consumer {self._consumer} refuses a pull: {text}", "remove that consumer; it is made again"
            )
        else:
            self._owed = 0

    async def next(self) -> list[Message]:
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
        """Subscribe the inbox; what may wait in it is bounded by what was asked for."""
        try:
            self._subscription = await self._broker.nc.subscribe(f"{self._inbox}.*")
        except nats.errors.Error:
            raise self._broker.lost() from None
        self._intake = intake(self._broker.nc)
        self._intake.hand(self._subscription._id, self.arrived)

    async def close(self) -> None:
        """End the subscription; the server then drops the requests that are open."""
        self._intake.keep(self._subscription._id)
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
