"""Requests of strangers, as many a second as were allowed and no more, and answers to them.

NATS delivers as fast as anybody publishes, and whoever reads that has no time for anything else. So the server itself
is told when to stop: each subscription ends after so many messages (`UNSUB <sid> <max>`), and is made again once a
second. In between nobody is subscribed, which a requester is told at once ("no responders"), and it costs nothing here.

An answer goes to an inbox and nowhere else (`subjects.is_inbox`). Headers of requests are not read at all.

Source: NATS client protocol (SUB, UNSUB with max_msgs, HPUB).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import anyio
import nats.errors

from bridge.stream.intake import Plain, intake
from bridge.stream.server import Broker
from bridge.stream.subjects import is_inbox

EVERY = 1.0
FLUSH_SECONDS = 5


class Request:
    """A request; `reply` is empty where it has none that may be answered to."""

    def __init__(self, message: Plain) -> None:
        reply = message.reply.decode(errors="replace")
        self.asked = bool(reply)
        self.reply = reply if is_inbox(reply) else ""
        self.data = message.data


class Listener:
    """One subject. `take` is called with each request, and must not wait.

    Args:
        queue: of all listeners with this name each request reaches one; empty: each reaches all.
        allowed: requests a second.
    """

    def __init__(
        self, broker: Broker, subject: str, take: Callable[[Request], None], *, queue: str = "", allowed: int
    ) -> None:
        self._broker = broker
        self._intake = intake(broker.nc)
        self._subject = subject
        self._queue = queue
        self._take = take
        self._allowed = allowed
        self._left = 0
        self._sids: list[int] = []

    def open(self) -> None:
        """Subscribe, for as many requests as are allowed."""
        old = self._sids[-1:]
        self._broker.nc._sid += 1
        sid = self._broker.nc._sid
        self._left = self._allowed
        self._intake.hand_plain(sid, self._arrived)
        lines = [f"UNSUB {one}\r\n" for one in old]
        lines += [f"SUB {self._subject} {self._queue} {sid}\r\n", f"UNSUB {sid} {self._allowed}\r\n"]
        self._broker.write("".join(lines).encode())
        # What the old one still has on its way is taken as well; the one before it has nothing any more.
        for one in self._sids[:-1]:
            self._intake.keep(one)
        self._sids = [*old, sid]

    def renew(self) -> None:
        """Subscribe again, if any of what is allowed has been used."""
        if self._left < self._allowed:
            self.open()

    def close(self) -> None:
        """End the subscription; what is on its way is left."""
        self._broker.write("".join(f"UNSUB {one}\r\n" for one in self._sids).encode())
        for one in self._sids:
            self._intake.keep(one)
        self._sids = []

    def _arrived(self, message: Plain) -> None:
        self._left -= 1
        self._take(Request(message))


async def listen(broker: Broker, listeners: Sequence[Listener]) -> None:
    """Keep the listeners open until cancelled.

    Raises:
        ServerRefused: this user may not subscribe to one of the subjects. Unavailable: the connection is lost.
    """
    try:
        for one in listeners:
            one.open()
        while True:
            try:
                await broker.nc.flush(FLUSH_SECONDS)
            except (nats.errors.Error, OSError, RuntimeError, TimeoutError):
                raise broker.lost() from None
            if broker.violation:
                raise broker.refusal()
            await anyio.sleep(EVERY)
            for one in listeners:
                one.renew()
    finally:
        for one in listeners:
            one.close()


def answer(broker: Broker, reply: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Send an answer, without waiting. Header values are put on one line.

    Raises:
        Unavailable: the connection is lost. ValueError: it is larger than the server takes.
    """
    if broker.closed.is_set():
        raise broker.lost()
    lines = "".join(f"{name}: {' '.join(value.split())}\r\n" for name, value in (headers or {}).items())
    block = f"NATS/1.0\r\n{lines}\r\n".encode() if lines else b""
    size = len(block) + len(body)
    if size > broker.max_payload:
        raise ValueError(f"{size} bytes")
    command = f"HPUB {reply} {len(block)} {size}\r\n" if block else f"PUB {reply} {size}\r\n"
    broker.write(b"%b%b%b\r\n" % (command.encode(), block, body))
