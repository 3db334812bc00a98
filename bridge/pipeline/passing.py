"""Waiting for the stream to come past a position, and for what was put between its transactions to be in it."""

from __future__ import annotations

from typing import Any

import anyio
import psycopg

from bridge import event
from bridge.pipeline.between import Between, Piece
from bridge.pipeline.streaming import Streaming
from bridge.source import chunks, lsn
from bridge.stream.publisher import Publisher
from bridge.waiting import until

# So long the stream may take to pass a position by itself; then it is given a commit to pass.
PATIENCE = 0.2
NUDGE_AGAIN = 2.0


async def passed(streaming: Streaming, sql: psycopg.AsyncConnection[Any], high: int) -> None:
    """Return once the stream has passed a position; an idle one is given something to pass."""

    async def there() -> bool:
        return streaming.passed >= high

    pause = PATIENCE
    while not await until(there, seconds=pause, every=0.005):
        await chunks.nudge(sql)
        pause = NUDGE_AGAIN


async def placed(
    streaming: Streaming,
    publisher: Publisher,
    between: Between,
    piece: Piece,
    sql: psycopg.AsyncConnection[Any] | None = None,
) -> None:
    """Return once a piece is in the stream; with `sql` an idle stream is given something to pass before."""
    between.add(piece)
    try:
        if sql is not None:
            await passed(streaming, sql, piece.high)
        while not piece.done.is_set():
            if not await streaming.rest():
                with anyio.move_on_after(0.02):
                    await piece.done.wait()
        await publisher.reached(piece.last)
    finally:
        between.drop(piece)


def closing(high: int) -> bytes:
    """What an event between transactions closes with: everything up to `high` is in it."""
    point = lsn.show(high)
    return b',"lsn":"%b"' % point.encode() + event.transaction(point, None, None)
