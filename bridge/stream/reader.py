"""Reading the stream once: in order, without a gap that nobody notices, and what all readers share.

`read` is for those who come and go (a table's history, comparisons): an ephemeral consumer that is made again behind
the last message seen whenever the server lost it or a delivery is missing. A broken connection raises `Unavailable`;
the caller goes on over a new `Broker` from where it was. A consumer may live on a replica of the stream that is behind
the others, and then sees an end that is none: the stream's leader is asked before that is believed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import anyio

from bridge.errors import BridgeError, Overtaken, ServerRefused
from bridge.stream.intake import Message
from bridge.stream.pull import ConsumerGone, pulling
from bridge.stream.server import (
    NOT_FOUND_CONSUMER,
    NOT_FOUND_MESSAGE,
    NOT_FOUND_STREAM,
    ApiError,
    Broker,
    StreamState,
)

__all__ = ["ConsumerGone", "Message", "read"]

EPHEMERAL_IDLE = 300.0
LAG_PAUSE = 0.25
FLEETING: dict[str, Any] = {
    "ack_policy": "none",
    "inactive_threshold": int(EPHEMERAL_IDLE * 1e9),
    "mem_storage": True,
    "num_replicas": 1,
}


async def read(
    broker: Broker,
    stream: str,
    *,
    subjects: list[str],
    start: int | datetime | None = None,
    follow: bool = False,
    last: int | None = None,
) -> AsyncGenerator[list[Message], None]:
    """Batches of the stream's messages on `subjects`, in order.

    Args:
        start: the first sequence, or a time, or None for the stream's beginning.
        follow: go on for ever; else end with what the stream holds now.
        last: end at this sequence instead.

    Raises:
        ServerRefused: there is no such stream.
        Unavailable: the connection is lost; read on from the last message seen.
    """
    state = await existing(broker, stream)
    until = None if follow else min(last if last is not None else state.last_seq, state.last_seq)
    if until is not None and (until == 0 or (isinstance(start, int) and start > until)):
        return
    while True:
        name = f"read-{broker.nc.new_inbox()[-12:]}"
        made = await create_consumer(broker, stream, name, _ephemeral(name, subjects, start))
        try:
            if until is not None and made["num_pending"] == 0:
                if not await _more(broker, state, subjects, start, until):
                    return
                await anyio.sleep(LAG_PAUSE)
                continue
            async with pulling(broker, stream, name) as pull:
                expected = 1
                with contextlib.suppress(ConsumerGone):
                    while True:
                        batch, expected, whole = in_order(await pull.next(), expected)
                        kept = [m for m in batch if until is None or m.seq <= until]
                        if kept:
                            start = kept[-1].seq + 1
                            yield kept
                        if until is not None and await _ended(broker, stream, name, batch, until, expected):
                            if not await _more(broker, state, subjects, start, until):
                                return
                            await anyio.sleep(LAG_PAUSE)
                            break
                        if not whole:
                            break
        finally:
            await let_go(broker, stream, name)


async def count(broker: Broker, stream: str, subjects: list[str], start: int) -> int:
    """How many messages the stream holds now on `subjects`, from the sequence `start` on."""
    name = f"count-{broker.nc.new_inbox()[-12:]}"
    try:
        made = await create_consumer(broker, stream, name, _ephemeral(name, subjects, start))
    finally:
        await let_go(broker, stream, name)
    return int(made["num_pending"])


async def last_at(broker: Broker, state: StreamState, at: datetime) -> int:
    """The last sequence that the stream had stored at a time, to the microsecond; the one before its first where none.

    Asks the leader, again and again halfway: a consumer on a replica that is behind would begin too early.
    """
    low, high = max(state.first_seq - 1, 0), state.last_seq
    while low < high:
        middle = (low + high + 1) // 2
        try:
            found = await broker.look(f"STREAM.MSG.GET.{state.name}", {"seq": middle, "next_by_subj": ">"})
        except ApiError as error:
            if error.code != NOT_FOUND_MESSAGE:
                raise
            high = middle - 1
            continue
        if datetime.fromisoformat(found["message"]["time"]) <= at:
            low = found["message"]["seq"]
        else:
            high = middle - 1
    return low


def in_order(batch: list[Message], expected: int) -> tuple[list[Message], int, bool]:
    """The messages up to the first missing delivery, the next delivery's number, and whether none is missing."""
    for number, message in enumerate(batch):
        if message.delivery != expected:
            return batch[:number], expected, False
        expected += 1
    return batch, expected, True


async def _ended(broker: Broker, stream: str, name: str, batch: list[Message], until: int, expected: int) -> bool:
    """Whether nothing up to `until` is left; retention may have taken what the last message still announced."""
    if batch:
        return batch[-1].seq >= until or batch[-1].pending == 0
    try:
        info = await broker.api(f"CONSUMER.INFO.{stream}.{name}")
    except ApiError as error:
        if error.code == NOT_FOUND_CONSUMER:
            return False
        raise
    return bool(info["num_pending"] == 0 and info["delivered"]["consumer_seq"] < expected)


async def _more(
    broker: Broker, state: StreamState, subjects: list[str], start: int | datetime | None, until: int
) -> bool:
    """Whether a replicated stream's leader has messages from `start` up to `until` after all."""
    if state.config.get("num_replicas", 1) == 1 or isinstance(start, datetime):
        return False
    begin = start or 1
    if begin > until:
        return False
    found = [await broker.message(state.name, next_by_subj=subject, seq=begin) for subject in subjects]
    return any(one is not None and one.seq <= until for one in found)


def _ephemeral(name: str, subjects: list[str], start: int | datetime | None) -> dict[str, Any]:
    wanted: dict[str, Any] = FLEETING | {
        "name": name,
        "filter_subjects": subjects,
        "deliver_policy": "all",
    }
    if isinstance(start, datetime):
        at = start.astimezone(UTC).isoformat().replace("+00:00", "Z")
        wanted |= {"deliver_policy": "by_start_time", "opt_start_time": at}
    elif start is not None and start > 1:
        wanted |= {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
    return wanted


def overtaken(stream: str, first: int, seen: int) -> Overtaken:
    """The error for a reader that had read up to `seen` when the stream came to begin at `first`."""
    return Overtaken(
        f"retention has overtaken the reader: the stream {stream} begins at sequence {first:,}, read is only up to "
        f"{seen:,}",
        "build anew what was made of the events (an index: `bridge reindex`); where the rows are no longer in the log, "
        "read them again before: bridge snapshot; and give the stream more room (max_age, max_bytes)",
    )


async def existing(broker: Broker, stream: str) -> StreamState:
    """The stream's state; ServerRefused where there is no such stream."""
    state = await broker.stream(stream)
    if state is None:
        raise ServerRefused(f"there is no stream {stream} at {broker.where}", "start the bridge first: it makes it")
    return state


async def create_consumer(
    broker: Broker, stream: str, name: str, config: dict[str, Any], *, action: str = "create"
) -> Any:
    """Make a consumer, or "update" one; its info."""
    body = {"stream_name": stream, "config": config, "action": action}
    return await broker.api(f"CONSUMER.CREATE.{stream}.{name}", body, seconds=10)


async def consumers(broker: Broker, stream: str) -> list[str]:
    """The names of a stream's consumers; none where there is no such stream."""
    found: list[str] = []
    while True:
        try:
            page = await broker.api(f"CONSUMER.NAMES.{stream}", {"offset": len(found)})
        except ApiError as error:
            if error.code != NOT_FOUND_STREAM:
                raise
            return []
        found += page["consumers"] or []
        if not page["consumers"] or len(found) >= page["total"]:
            return found


async def delete_consumer(broker: Broker, stream: str, name: str) -> None:
    """Remove a consumer; nothing happens where there is none."""
    try:
        await broker.api(f"CONSUMER.DELETE.{stream}.{name}", seconds=10)
    except ApiError as error:
        if error.code not in (NOT_FOUND_CONSUMER, NOT_FOUND_STREAM):
            raise


async def let_go(broker: Broker, stream: str, name: str) -> None:
    """Remove a reader's fleeting consumer at its end, whatever that is; where the server cannot be told, it removes one
    that nobody reads from by itself (`EPHEMERAL_IDLE`)."""
    if broker.closed.is_set():
        return
    with anyio.CancelScope(shield=True), contextlib.suppress(BridgeError):
        await broker.api(f"CONSUMER.DELETE.{stream}.{name}", seconds=1)
