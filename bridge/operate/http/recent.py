"""The last events' metadata: subject, operation, sequence, LSN, time. Asked for only while somebody looks at a page.

The stream is read with a consumer of headers alone: rows do not even come here. A row's key, which is part of a
subject in a compacted log, is cut off.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Any

import anyio

from bridge.config import Config
from bridge.errors import BridgeError
from bridge.event import Position
from bridge.operate.status.live import Live
from bridge.source import lsn
from bridge.stream import reader, server, subjects
from bridge.stream.pull import pulling
from bridge.stream.reader import Message
from bridge.stream.server import Broker, Servers

SHOWN = 12
# Of a compacted log the last sequences may have gone.
REACH = 4 * SHOWN
WITHIN = 3.0


class Recent:
    """The last events; `watchers` counts those who look."""

    def __init__(self, config: Config, servers: Servers, live: Live) -> None:
        self.events: list[dict[str, Any]] = []
        self.watchers = 0
        self._config = config
        self._servers = servers
        self._live = live
        self._seen = 0

    async def run(self) -> None:
        """Read what is new after each look, until cancelled; what is away ends nothing: the next look tries again."""
        number = 0
        while True:
            number = await self._live.next(number, watching=False)
            if not self.watchers:
                continue
            with contextlib.suppress(BridgeError):
                name = f"bridge {self._config.source.name} page"
                async with server.connect(self._config.stream, self._servers, name=name) as broker:
                    number = await self._while_watched(broker, number)

    async def _while_watched(self, broker: Broker, number: int) -> int:
        while self.watchers and not broker.closed.is_set():
            found = self._live.latest.stream if self._live.latest is not None else None
            if found is not None and found.exists and found.last_seq != self._seen:
                with anyio.move_on_after(WITHIN):
                    self.events = await self._read(broker, found.first_seq, found.last_seq)
                    self._seen = found.last_seq
            number = await self._live.next(number)
        return number

    async def _read(self, broker: Broker, first: int, last: int) -> list[dict[str, Any]]:
        """The newest first."""
        stream, name = self._config.stream.name, f"page-{broker.nc.new_inbox()[-12:]}"
        consumer = {
            **reader.FLEETING, "name": name, "headers_only": True, "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(last - REACH + 1, first, 1), "inactive_threshold": int(10e9),
        }  # fmt: skip
        made = await reader.create_consumer(broker, stream, name, consumer)
        found: list[Message] = []
        try:
            if made["num_pending"]:
                async with pulling(broker, stream, name) as pull:
                    while not found or (found[-1].pending and found[-1].seq < last):
                        found += await pull.next()
        finally:
            await reader.let_go(broker, stream, name)
        return [self._shown(one) for one in reversed(found[-SHOWN:])]

    def _shown(self, message: Message) -> dict[str, Any]:
        at = datetime.fromtimestamp(message.at / 1e9, UTC).isoformat(timespec="milliseconds")
        try:
            where = lsn.show(Position.parse(message.position).end)
        except ValueError:
            where = ""
        return {
            "seq": message.seq, "subject": self.subject(message.subject), "op": message.op, "lsn": where, "at": at,
        }  # fmt: skip

    def subject(self, text: str) -> str:
        """A subject without the row's key: that of its table."""
        prefix = subjects.source_subjects(self._config.stream.prefix, self._config.source.name).removesuffix(">")
        if not text.startswith(prefix):
            return "another's subject"
        rest = text.removeprefix(prefix).split(".")
        return text if rest[0] == "@message" else prefix + ".".join(rest[:2])
