"""`replay`: the log as JSON lines, for pipes and for people."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from bridge.config import Config
from bridge.errors import UsageError
from bridge.stream.consumer import Log
from bridge.stream.items import Item
from bridge.stream.server import Servers


def start_of(text: str) -> int | datetime | None:
    """Where `--from` says to begin: None for "start", else as `point_of`."""
    return None if text == "start" else point_of(text, "--from", "start, nor a sequence, nor a time")


def point_of(text: str, option: str, kinds: str = "a sequence nor a time") -> int | datetime:
    """A place in the log: a sequence, or a time (UTC where it names no zone).

    Raises:
        UsageError: it is neither.
    """
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither {kinds}", f"write {option} 2026-01-31T12:00:00Z, say") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def line(item: Item) -> bytes:
    """One event on one line: its sequence and position, then the event as it was published, a large row's in full.

    A json column keeps its white space; a line break in it, which can only stand between tokens, becomes a space.
    """
    data = item.data.replace(b"\n", b" ").replace(b"\r", b" ")
    return b'{"seq":%d,"position":"%s",%s\n' % (item.seq, item.position.encode(), data[1:])


async def replay(
    config: Config,
    servers: Servers,
    write: Callable[[bytes], Awaitable[None]],
    *,
    filters: list[str],
    start: int | datetime | None,
    follow: bool,
    limit: int | None = None,
) -> int:
    """Write the events on the subjects `filters` (none: all of the source); how many there were.

    A lost connection is waited for, and the next one goes on behind the last event that was written.

    Raises:
        Contradiction: what `bridge.stream.Log` raises.
    """
    count = 0
    async with Log(config, servers, subjects=filters, start="first" if start is None else start, follow=follow) as log:
        async for item in log:
            await write(line(item))
            count += 1
            if limit is not None and count >= limit:
                break
    return count
