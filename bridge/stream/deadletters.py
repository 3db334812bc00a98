"""Dead letters: events that an index could not take, in a stream of their own beside the source's.

The stream is `{name}_dlq`, the subject `{prefix}_dlq.{source}.{index}`; it is made when the first letter comes. A
letter says which event (sequence, key) and why, in the engine's words without the row's values; the event itself is in
the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec

from bridge import log
from bridge.config import Stream
from bridge.errors import Unavailable
from bridge.stream import answer
from bridge.stream.reader import read
from bridge.stream.server import NOT_FOUND_STREAM, ApiError, Broker
from bridge.stream.subjects import token


def dead_stream(config: Stream) -> str:
    """The name of the stream that holds a source's dead letters."""
    return f"{config.name}_dlq"


def dead_subject(prefix: str, source: str, index: str) -> str:
    """The subject of one index's dead letters."""
    return f"{prefix}_dlq.{token(source)}.{token(index)}"


async def bury(broker: Broker, config: Stream, source: str, index: str, letter: Any, unique: str) -> None:
    """Store one letter. `unique` keeps the same letter from being stored twice within two minutes.

    Raises:
        Unavailable: it could not be stored; nothing may be acked.
    """
    subject = dead_subject(config.prefix, source, index)
    data = msgspec.json.encode(letter)
    headers = {"Nats-Msg-Id": unique}
    for made in (False, True):
        try:
            ack = answer.ack((await broker.request(subject, data, headers=headers)).data)
        except Unavailable:
            # Nobody listens there where the stream is not made yet, or was deleted.
            if made or broker.closed.is_set() or await broker.stream(dead_stream(config)) is not None:
                raise
            await _make(broker, config, source)
            continue
        if ack.seq and not ack.error:
            return
        break
    raise Unavailable(f"the stream {dead_stream(config)} takes no message", "waiting; see the NATS server's log")


async def _make(broker: Broker, config: Stream, source: str) -> None:
    wanted = {
        "name": dead_stream(config),
        "subjects": [f"{config.prefix}_dlq.{token(source)}.>"],
        "retention": "limits",
        "storage": "file",
        "num_replicas": config.replicas,
        "metadata": {"bridge": "1"},
    }
    try:
        await broker.api(f"STREAM.CREATE.{dead_stream(config)}", wanted, seconds=10)
        log.get().info("stream created", stream=dead_stream(config))
    except ApiError:
        if await broker.stream(dead_stream(config)) is None:
            raise


async def letters(broker: Broker, config: Stream, source: str, index: str) -> AsyncIterator[bytes]:
    """Every letter of one index, oldest first, as JSON."""
    async for _, data in stored(broker, config, source, index):
        yield data


async def stored(broker: Broker, config: Stream, source: str, index: str) -> AsyncIterator[tuple[int, bytes]]:
    """Every letter of one index with its own sequence, oldest first."""
    if await broker.stream(dead_stream(config)) is None:
        return
    async with aclosing(
        read(broker, dead_stream(config), subjects=[dead_subject(config.prefix, source, index)])
    ) as batches:
        async for batch in batches:
            for message in batch:
                yield message.seq, message.data


async def counts(broker: Broker, config: Stream, source: str) -> dict[str, int]:
    """How many letters each index of a source has, by `dead_subject`; nothing for one that has none."""
    wanted = f"{config.prefix}_dlq.{token(source)}.>"
    try:
        return await broker.subjects(dead_stream(config), wanted)
    except ApiError as error:
        if error.code == NOT_FOUND_STREAM:
            return {}
        raise


async def discard(broker: Broker, config: Stream, number: int) -> None:
    """Delete a letter by its own sequence; nothing happens where it is gone."""
    try:
        await broker.api(f"STREAM.MSG.DELETE.{dead_stream(config)}", {"seq": number, "no_erase": True})
    except ApiError:
        if await broker.message(dead_stream(config), seq=number) is not None:
            raise
