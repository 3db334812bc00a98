"""Trimming a log: everything before the beginning of today's complete pictures goes, so that it is bounded by choice.

Nothing is removed that somebody still needs: not what a consumer has not acked (a reader that is behind, a rebuild that
is under way), not a table's only complete picture. What is removed from the start is no gap to the bridge.

Source: JetStream API, `$JS.API.STREAM.PURGE` with `seq` (exclusive), `$JS.API.CONSUMER.LIST`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bridge.config import join_name
from bridge.errors import Gap, ServerRefused
from bridge.stream.asking import Root
from bridge.stream.reach import complete_from
from bridge.stream.server import Broker, StreamState
from bridge.stream.state import SnapshotStatus

PURGE_SECONDS = 120.0
NOTHING = 1 << 62


class Trimmed(NamedTuple):
    """What was removed: so many `messages`, so that the stream begins at `first`. `table` has the oldest complete
    picture; `behind` names the consumers that had not acked what is before that, which has been removed all the same
    where it was `forced`."""

    messages: int
    first: int
    table: str
    behind: list[str]
    forced: bool


async def trimmable(broker: Broker, stream: str) -> StreamState:
    """The stream; ServerRefused where there is none, or nothing to trim in it."""
    state = await broker.stream(stream)
    if state is None:
        raise ServerRefused(f"there is no stream {stream}", "start the bridge: `bridge run`")
    if state.compacted:
        raise ServerRefused(
            f"the stream {stream} is compacted: it holds one event a row", "there is nothing to trim in it"
        )
    return state


async def trim(broker: Broker, stream: str, tables: dict[Root, SnapshotStatus], *, force: bool = False) -> Trimmed:
    """Remove everything before the beginning of the tables' last complete pictures.

    Args:
        tables: what is known of every published table.
        force: also what consumers have not acked yet: they have lost it then.

    Raises:
        ServerRefused: there is no such stream, or it is compacted. Gap, Unavailable: a table is not complete.
    """
    state = await trimmable(broker, stream)
    if not tables:
        raise ServerRefused(f"no table is known to be in {stream}", "see what [source] tables names")
    try:
        floor, table = min(
            (complete_from(kept, state.first_seq, stream, join_name(*root)), join_name(*root))
            for root, kept in tables.items()
        )
    except Gap as error:
        raise Gap(f"nothing is removed: {error.what}", f"{error.remedy}; then: bridge snapshot --all --trim") from None
    needed = {name: seq for name, seq in (await _needs(broker, stream)).items() if seq < floor}
    if needed and not force:
        floor = min(needed.values())
    body = {"seq": floor}
    answer = await broker.api(f"STREAM.PURGE.{stream}", body, seconds=PURGE_SECONDS) if floor > state.first_seq else {}
    after = await broker.stream(stream)
    first = after.first_seq if after is not None else floor
    return Trimmed(int(answer.get("purged", 0)), first, table, sorted(needed), force)


async def _needs(broker: Broker, stream: str) -> dict[str, int]:
    """From which sequence on each consumer still needs the stream."""
    found: dict[str, int] = {}
    while True:
        page: dict[str, Any] = await broker.api(f"CONSUMER.LIST.{stream}", {"offset": len(found)})
        for one in page["consumers"] or []:
            if not one["num_pending"] and not one["num_ack_pending"]:
                found[one["name"]] = NOTHING
                continue
            acks = one["config"].get("ack_policy", "none") != "none"
            at = one["ack_floor"] if acks else one["delivered"]
            begin = int(one["config"].get("opt_start_seq", 1))
            found[one["name"]] = max(int(at["stream_seq"]) + 1, begin)
        if not page["consumers"] or len(found) >= page["total"]:
            return found
