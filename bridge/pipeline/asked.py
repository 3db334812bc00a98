"""What is asked for of one table, as the state bucket has it, and how far the bridge is with it.

Whoever asks writes there at any time, and so does the reading: each of its notes is refused where somebody else was in
between. It looks then whether the table is still to be read, and whether it is the same that is asked for.
"""

from __future__ import annotations

from typing import Any

import anyio
import msgspec

from bridge.pipeline.checkpoint import now
from bridge.stream.state import Again, Conflict, Full, SnapshotStatus, State
from bridge.waiting import Backoff


class Ended(Exception):
    """Nobody wants the table to be read any more, or not as it is being read: paused, cancelled, asked for anew."""


class Asked:
    """What is asked for of a table. `again` is that, with how far it is; `status` the table's last complete picture.

    Args:
        key: of the table's snapshot in the state bucket.
    """

    def __init__(self, state: State, key: str, backoff: Backoff) -> None:
        self._state = state
        self._key = key
        self._backoff = backoff
        self._revision = 0
        self._known = False
        self._looked = anyio.Event()
        self.again = Again(state="requested")
        self.status = SnapshotStatus(state="incomplete")

    def look(self) -> None:
        """It may have changed."""
        self._looked.set()

    async def look_within(self, seconds: float) -> None:
        """Wait for that long, or until it may have changed; then see what is asked for.

        Raises:
            Ended: something else, or nothing.
        """
        with anyio.move_on_after(seconds):
            await self._looked.wait()
        self._looked = anyio.Event()
        await self.current()

    async def wanted(self) -> bool:
        """Whether the table is to be read."""
        found = await self._state.get(self._key, SnapshotStatus)
        return found is not None and found[0].again is not None and found[0].again.under_way

    async def current(self) -> None:
        """See what is asked for.

        Raises:
            Ended: nothing, or not what was asked for at the first call.
        """
        found = await self._state.get(self._key, SnapshotStatus)
        again = self._same(found[0]) if found is not None else None
        if found is None or again is None:
            raise Ended
        self.status, self._revision = found
        self.again, self._known = again, True

    async def note(self, **changes: Any) -> None:
        """Store how far it is; a bucket that has no room is waited for.

        Raises:
            Ended: it was paused, cancelled or asked for anew meanwhile.
        """
        wanted = changes.get("state") or self.again.state
        self.again = msgspec.structs.replace(
            self.again, **{"at": now(), **changes, "state": "running" if wanted == "requested" else wanted}
        )
        await self._store(msgspec.structs.replace(self.status, again=self.again))

    async def finish(self, status: SnapshotStatus) -> None:
        """Store that the table is read."""
        await self._store(msgspec.structs.replace(status, again=None))

    def _same(self, found: SnapshotStatus) -> Again | None:
        """What is asked for, where it is under way and no other than was known."""
        again = found.again
        if again is None or not again.under_way or (self._known and again.asked != self.again.asked):
            return None
        return again

    async def _store(self, status: SnapshotStatus) -> None:
        while True:
            try:
                self._revision = await self._state.put(self._key, status, self._revision)
            except Full as error:
                await self._backoff.wait(error)
                continue
            except Conflict:
                found = await self._state.get(self._key, SnapshotStatus)
                if found is None or self._same(found[0]) is None:
                    raise Ended from None
                self._revision = found[1]
                continue
            self.status = status
            return
