"""`replay`: the log as JSON lines, for pipes and for people."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from datetime import UTC, datetime

from bridge.config import Config
from bridge.errors import UsageError
from bridge.stream import reader, server, subjects
from bridge.waiting import Backoff, forever


def start_of(text: str) -> int | datetime | None:
    """Where `--from` says to begin: None for "start", a sequence, or a time (UTC where it names no zone).

    Raises:
        UsageError: it is none of these.
    """
    if text == "start":
        return None
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"--from {text!r} is neither start, nor a sequence, nor a time", "write --from 2026-01-31T12:00:00Z, say"
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def line(message: reader.Message) -> bytes:
    """One event on one line: its sequence and position, then the event as it was published.

    A json column keeps its white space; a line break in it, which can only stand between tokens, becomes a space.
    """
    data = message.data.replace(b"\n", b" ").replace(b"\r", b" ")
    return b'{"seq":%d,"position":"%s",%s\n' % (message.seq, message.position.encode(), data[1:])


async def replay(
    config: Config,
    servers: server.Servers,
    write: Callable[[bytes], object],
    *,
    filters: list[str],
    start: int | datetime | None,
    follow: bool,
    limit: int | None = None,
) -> int:
    """Write the events on the subjects `filters` (none: all of the source); how many there were.

    A lost connection is waited for, and the next one goes on behind the last event that was written.
    """
    wanted = filters or [subjects.source_subjects(config.stream.prefix, config.source.name)]
    count, begin = 0, start

    async def attempt(backoff: Backoff) -> None:
        nonlocal count, begin
        async with server.connect(config.stream, servers, name="bridge replay") as broker:
            backoff.over()
            batches = reader.read(broker, config.stream.name, subjects=wanted, start=begin, follow=follow)
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    kept = batch if limit is None else batch[: limit - count]
                    for message in kept:
                        write(line(message))
                        begin = message.seq + 1
                    count += len(kept)
                    if limit is not None and count >= limit:
                        return

    await forever("replay", attempt)
    return count
