"""The messages inside a replication stream's CopyData. Pure.

Source: PostgreSQL documentation, "Streaming Replication Protocol": XLogData (w), primary keepalive (k), standby status
update (r). Positions are 64-bit LSNs; times are microseconds since 2000-01-01 UTC.
"""

from __future__ import annotations

import struct
import time
from typing import NamedTuple

from bridge.errors import BadRecord

DATA = 0x77
HEADER = 25
_XLOG = struct.Struct("!cQQq")
_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")
_EPOCH = 946_684_800


class Data(NamedTuple):
    """XLogData: `payload` is what the plugin wrote, `start` the WAL position that it belongs to."""

    start: int
    payload: memoryview


class Keepalive(NamedTuple):
    """The server has read and sent everything up to `end`; `reply` asks for feedback at once."""

    end: int
    reply: bool


def parse(data: memoryview) -> Data | Keepalive:
    """One message from the server; BadRecord for what the protocol does not have."""
    size = len(data)
    if size >= HEADER and data[0] == DATA:
        return Data(int.from_bytes(data[1:9]), data[HEADER:])
    if size == _KEEPALIVE.size and data[0] == 0x6B:
        _, end, _, reply = _KEEPALIVE.unpack(data)
        return Keepalive(end, bool(reply))
    kind = f"kind {data[0]:#x}" if size else "no kind"
    raise BadRecord(
        f"the replication stream holds a message of {size} bytes and {kind}, which the protocol does not have",
        "report the server's version",
    )


def status(write: int, flush: int, *, ask: bool = False) -> bytes:
    """Feedback: received up to `write`; `flush` is what the slot may forget, 0 to say nothing about it.

    A walsender whose client reports an old flush position keeps a fast shutdown waiting for ever; with 0 it goes by
    the write position. `ask`: the walsender answers with a keepalive as soon as it reads this.
    """
    now = int((time.time() - _EPOCH) * 1_000_000)
    return _STATUS.pack(b"r", write, flush, 0, now, ask)
