"""Who waits for a lease, for operators to see: one KV key a lease, `standby.<role>.<source>[.<name>]`.

Nothing is decided by it, and nobody waits for it. Whoever stands by says so again every few seconds, and takes itself
off the list at the end; who could not is shown no longer after `STALE` seconds, and taken off the list by the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import anyio
import msgspec

from bridge import structured
from bridge.errors import Unavailable
from bridge.stream.state import Conflict, State

AFTER = 1.0
EVERY = 5.0
STALE = 15.0
# Hosts' clocks may differ: only what is long out of date by one's own is another's to take off.
FORGOTTEN = timedelta(minutes=10)
WITHIN = 2.0


class Waiting(msgspec.Struct, frozen=True):
    """One who stands by: `holder` is its name as a holder of leases, `host` and `pid` its process, `since` when it
    began to wait, `at` when it last said so; `why` says why it could not take over, empty where nothing is known that
    would keep it from that."""

    holder: str
    host: str
    pid: int
    since: str
    at: str
    why: str = ""


def standby_key(lease: str) -> str:
    """KV key of the list of those who wait for the lease with this key."""
    return f"standby.{lease.removeprefix('lease.')}"


def waiting(listed: list[Waiting], now: datetime) -> list[Waiting]:
    """Those who have said so of late, longest first."""
    fresh = [one for one in listed if now - datetime.fromisoformat(one.at) < timedelta(seconds=STALE)]
    return sorted(fresh, key=lambda one: one.since)


@contextlib.asynccontextmanager
async def shown(
    state: State, lease: str, holder: str, host: str, pid: int, why: Callable[[], str]
) -> AsyncIterator[None]:
    """Be on the list for as long as the block lasts longer than `AFTER` seconds. Where that fails nothing happens.

    Args:
        why: what keeps it from taking over, as far as it knows at that moment; empty where nothing does.
    """
    listing = _Listing(state, standby_key(lease), Waiting(holder, host, pid, _now(), _now()), why)
    async with structured.group() as tasks:
        tasks.start_soon(listing.keep)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()
            await listing.leave()


class _Listing:
    def __init__(self, state: State, key: str, mine: Waiting, why: Callable[[], str]) -> None:
        self._state = state
        self._key = key
        self._mine = mine
        self._why = why
        self._told = False

    async def keep(self) -> None:
        await anyio.sleep(AFTER)
        while True:
            self._told = True
            with contextlib.suppress(Unavailable), anyio.move_on_after(WITHIN):
                await self._put([msgspec.structs.replace(self._mine, at=_now(), why=self._why())])
            await anyio.sleep(EVERY)

    async def leave(self) -> None:
        if self._told:
            with contextlib.suppress(Unavailable), anyio.move_on_after(WITHIN, shield=True):
                await self._put([])

    async def _put(self, mine: list[Waiting]) -> None:
        """Put this one's entry in the list, or none; again where somebody else did so at the same moment."""
        while True:
            found = await self._state.get(self._key, list[Waiting])
            listed, revision = found if found is not None else ([], 0)
            others = [one for one in listed if one.holder != self._mine.holder and not _forgotten(one)]
            with contextlib.suppress(Conflict):
                if others or mine:
                    await self._state.put(self._key, others + mine, revision)
                elif found is not None:
                    await self._state.delete(self._key, revision)
                return


def _forgotten(one: Waiting) -> bool:
    return datetime.now(UTC) - datetime.fromisoformat(one.at) > FORGOTTEN


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
