"""An atomic batch as it goes over the wire. Pure.

Source: NATS client protocol (HPUB); ADR-50, "JetStream Batch Publishing".
"""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """One event on its way. `end` is its transaction's commit end if this event is the last one, else 0."""

    subject: bytes
    headers: bytes
    payload: bytes
    position: str
    end: int


def frames(items: list[Item], batch: bytes, expected: int, reply: bytes) -> bytes:
    """HPUB commands for an atomic batch; a single event is a message of its own.

    Only the first carries the expected sequence, only the last asks for an answer and commits (ADR-50).
    """
    out: list[bytes] = []
    count = len(items)
    for number, item in enumerate(items, 1):
        head = b"NATS/1.0\r\n"
        if count > 1:
            head += b"Nats-Batch-Id: %s\r\nNats-Batch-Sequence: %d\r\n" % (batch, number)
        if number == 1:
            head += b"Nats-Expected-Last-Sequence: %d\r\n" % expected
        last = number == count
        if last and count > 1:
            head += b"Nats-Batch-Commit: 1\r\n"
        size = len(head) + len(item.headers) + 2
        out += (
            b"HPUB %s %s%d %d\r\n" % (item.subject, reply + b" " if last else b"", size, size + len(item.payload)),
            head,
            item.headers,
            b"\r\n",
            item.payload,
            b"\r\n",
        )
    return b"".join(out)
