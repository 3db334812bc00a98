"""Readings of tables that take many chunks, and rest at one of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from bridge.pipeline import reading


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 50 rows."""
    monkeypatch.setattr(reading, "FIRST_UNKNOWN", 50)
    monkeypatch.setattr(reading, "FIRST_MOST", 50)
    monkeypatch.setattr(reading, "MOST", 50)


@asynccontextmanager
async def held(
    monkeypatch: pytest.MonkeyPatch, point: str, nth: int = 1
) -> AsyncIterator[tuple[anyio.Event, anyio.Event]]:
    """Stops a reading at a failpoint until the second event is set; the first tells that it is there."""
    there, on = anyio.Event(), anyio.Event()
    count = 0
    publish = reading.Reading._publish

    async def waiting(self: reading.Reading, sql: Any, chunk: Any) -> None:
        nonlocal count
        count += 1
        if point == "read" and count == nth:
            there.set()
            await on.wait()
        await publish(self, sql, chunk)
        if point == "published" and count == nth:
            there.set()
            await on.wait()

    monkeypatch.setattr(reading.Reading, "_publish", waiting)
    yield there, on
