"""Asking the bridge, by way of the state bucket, to read tables while the stream flows; it need not be running.

What is asked for is `again` in the table's snapshot status: whoever runs the bridge takes it up from there.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from bridge.stream import subjects
from bridge.stream.state import Again, Conflict, Shape, SnapshotStatus, State

Root = tuple[str, str]


async def tables(state: State, source: str) -> dict[Root, SnapshotStatus]:
    """Every table of which the state bucket knows a snapshot, with what it knows."""
    found = await state.values(f"snapshot.{subjects.token(source)}.", SnapshotStatus)
    return {subjects.table_of(key): status for key, status in found.items()}


async def partitions(state: State, source: str) -> dict[str, Root]:
    """The partitions that the state bucket knows, by name as events have it, with the tables that they belong to."""
    found = await state.values(f"shape.{subjects.token(source)}.", Shape)
    parts = {leaf.name: subjects.table_of(key) for key, shape in found.items() for leaf in shape.leaves}
    return {name: root for name, root in parts.items() if name != ".".join(root)}


async def ask(state: State, source: str, root: Root, *, where: str = "") -> None:
    """Ask for a table to be read from its beginning, whatever was asked for before."""
    wish = Again(state="requested", where=where, asked=datetime.now(UTC).isoformat())
    await _change(state, source, root, lambda _: wish)


async def pause(state: State, source: str, root: Root) -> bool:
    """Let a reading rest where it is; whether there was one."""
    return await _change(
        state, source, root, lambda now: msgspec.structs.replace(now, state="paused", why="") if now else None
    )


async def resume(state: State, source: str, root: Root) -> bool:
    """Let a reading go on that was paused, or has failed; whether there was one."""
    return await _change(
        state, source, root, lambda now: msgspec.structs.replace(now, state="requested", why="") if now else None
    )


async def cancel(state: State, source: str, root: Root) -> bool:
    """End a reading: what is in the log of it stays and does no harm; whether there was one."""
    return await _change(state, source, root, lambda _: None)


async def _change(state: State, source: str, root: Root, change: Callable[[Again | None], Again | None]) -> bool:
    """Change what is asked for, again and again until nobody was in between; whether there was something before."""
    key = subjects.snapshot_key(source, *root)
    while True:
        found = await state.get(key, SnapshotStatus)
        status, revision = found if found is not None else (SnapshotStatus(state="incomplete"), 0)
        after = change(status.again)
        if after == status.again:
            return status.again is not None
        try:
            await state.put(key, msgspec.structs.replace(status, again=after), revision)
        except Conflict:
            continue
        return status.again is not None
