"""Rows that moved to another key without their TOASTed columns, as the log tells of them."""

from __future__ import annotations

import contextlib

from bridge import event
from bridge.stream.reader import read
from bridge.stream.server import Broker


async def moves(broker: Broker, stream: str, subject: str, start: int, last: int) -> list[bytes]:
    """The keys, as JSON, to which rows of a table moved between two sequences, in order.

    Raises:
        Unavailable: the connection is lost. ServerRefused: there is no such stream.
    """
    found: list[bytes] = []
    async with contextlib.aclosing(read(broker, stream, subjects=[subject], start=start, last=last)) as batches:
        async for batch in batches:
            for message in batch:
                if message.op == "update" and b'"unchanged":' in message.data:
                    told = event.outline(message.data)
                    if told.unchanged and told.old != told.key:
                        found.append(told.key)
    return found
