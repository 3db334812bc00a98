"""The checkpoint in the state bucket, and what PostgreSQL is told.

Order matters: the stream has acked, then the bucket has it, then PostgreSQL may forget it. Where an ack can be taken
back by a power failure (the server does not sync always), PostgreSQL is told only after the interval has passed since
the bucket was written, so that it still has the WAL from which a shorter stream is continued. The bucket can be taken
back as well: it holds every position that PostgreSQL may have been told by now, and those are few (`STEPS`). Where the
bucket takes no more (a full disk, a limit), nothing new is confirmed until it does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

import anyio
import msgspec

from bridge import log
from bridge.errors import Fenced
from bridge.failpoints import reach
from bridge.source import lsn
from bridge.stream.state import Checkpoint, Conflict, Full, Missed, Pair, State

EVERY = 1.0
IDLE_EVERY = 3.0
MARGIN = 5.0
STEPS = 15


class Progress(NamedTuple):
    """How far the stream is: everything up to `lsn` is in it but for what PostgreSQL has `missed`, its last event is
    `seq` at `position`; `altered`: the last transactions that may have altered tables, with where they end."""

    lsn: int
    position: str
    seq: int
    missed: dict[str, Missed]
    altered: dict[int, str]


def now() -> str:
    """The time as ISO 8601 in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Checkpointer:
    """Writes the checkpoint about once a second and confirms to PostgreSQL what is durable.

    Args:
        progress: tells how far the stream is.
        confirm: tells PostgreSQL that it may forget what is at or before an LSN, or less; up to where.
        hold_back: seconds for which an ack may still be taken back.
    """

    def __init__(
        self,
        state: State,
        key: str,
        checkpoint: Checkpoint,
        revision: int,
        progress: Callable[[], Progress],
        confirm: Callable[[int], int],
        hold_back: float,
    ) -> None:
        self._state = state
        self._key = key
        self._checkpoint = checkpoint
        self._revision = revision
        self._progress = progress
        self._confirm = confirm
        self._wait = hold_back + MARGIN if hold_back else 0.0
        # When those of an earlier session were written is not known: they wait once more.
        again = time.monotonic() + self._wait
        self._held = deque((again, pair) for pair in checkpoint.held) if self._wait else deque()
        self._told = checkpoint.confirmed if self._wait else None
        self._next = 0.0
        self._written = 0.0
        self._full = False
        self.confirmed = self._due = 0

    async def run(self) -> None:
        """Save and confirm until cancelled."""
        while True:
            await anyio.sleep(EVERY)
            await self.save()

    async def save(self, *, final: bool = False) -> None:
        """Write the checkpoint if there is something new; confirm what has waited long enough.

        Raises:
            Fenced: a newer bridge wrote the checkpoint since.
        """
        found = self._progress()
        kept, clock = self._checkpoint, time.monotonic()
        reached = max(found.lsn, lsn.parse(kept.lsn))
        more = found.seq != kept.stream_seq
        idle = found.lsn > lsn.parse(kept.lsn) and (final or clock - self._written >= IDLE_EVERY)
        step = reached > self._newest() and (final or clock >= self._next) if self._wait else more or idle
        if found.lsn and (more or idle or step):
            pair = Pair(lsn.show(reached), found.seq)
            held = [one for _, one in self._held]
            reach("checkpoint.due")
            new = msgspec.structs.replace(
                kept,
                lsn=pair.lsn,
                position=found.position,
                stream_seq=pair.stream_seq,
                missed=found.missed,
                altered=found.altered,
                confirmed=self._told,
                held=[*held, pair] if step and self._wait else held,
                at=now(),
            )
            if await self._stored(new):
                reach("checkpoint.written")
                if step:
                    self._held.append((time.monotonic() + self._wait, pair))
                    self._next = clock + self._wait / STEPS
        self._release()

    async def _stored(self, checkpoint: Checkpoint) -> bool:
        """Whether the bucket has taken it; where it has no room, that is said once."""
        try:
            await self._write(checkpoint)
        except Full as error:
            if not self._full:
                log.get().warning("checkpoint refused", key=self._key, reason=error.what, next=error.remedy)
            self._full = True
            return False
        self._full = False
        return True

    def _newest(self) -> int:
        """The last position that PostgreSQL was told or will be told."""
        pair = self._held[-1][1] if self._held else self._told
        return lsn.parse(pair.lsn) if pair else 0

    async def _write(self, checkpoint: Checkpoint) -> None:
        """Store the checkpoint; over one that a killed predecessor, or a cancelled call of ours, stored late."""
        while True:
            try:
                self._revision = await self._state.put(self._key, checkpoint, self._revision)
                break
            except Conflict:
                found = await self._state.get(self._key, Checkpoint)
                if found is None or found[0].epoch > checkpoint.epoch:
                    raise Fenced(
                        f"a newer bridge has written {self._key}" if found else f"somebody deleted {self._key}",
                        "this one has stopped; run only one bridge per source",
                    ) from None
                self._revision = found[1]
        self._checkpoint = checkpoint
        self._written = time.monotonic()

    def _release(self) -> None:
        due = None
        while self._held and self._held[0][0] <= time.monotonic():
            due = self._held.popleft()[1]
        if due is not None:
            self._told = due if self._wait else None
            self._due = lsn.parse(due.lsn)
        if self._due > self.confirmed:
            self.confirmed = self._confirm(self._due)
            reach("checkpoint.confirmed")
