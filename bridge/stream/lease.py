"""Leases: who may do a job now. One KV key a job, renewed each second by compare-and-set.

A holder that could not renew for `OWN` seconds by its own clock stops by itself, before anybody else, who has to see
no renewal for `STALE` seconds in successful reads, may begin. A holder that died on this host is noticed at once, by
its pid.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

import anyio
import msgspec

from bridge import log
from bridge.errors import Fenced, Unavailable
from bridge.stream.state import Conflict, State
from bridge.stream.subjects import token

EVERY = 1.0
OWN = 10.0
STALE = 15.0


class Busy(Fenced):
    """Another process does this job now; wait for it to end, or stop it."""


class Lease(msgspec.Struct, frozen=True):
    """`lease.<role>.<source>.<name>`: `host` tells where `pid` means something; `at` is when it was renewed."""

    holder: str
    host: str
    pid: int
    at: str


def lease_key(role: str, source: str, name: str) -> str:
    """KV key of a lease."""
    return f"lease.{token(role)}.{token(source)}.{token(name)}"


def _host() -> str:
    """This host and its pid namespace: two containers may share a name, never this."""
    try:
        return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _lease(holder: str) -> Lease:
    return Lease(holder, _host(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))


def _dead(lease: Lease) -> bool:
    """Whether the holder was a process of this host that is gone."""
    if lease.host != _host():
        return False
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class Hold:
    """A lease that this process holds."""

    def __init__(self, state: State, key: str, holder: str, revision: int) -> None:
        self._holder = holder
        self._state = state
        self._key = key
        self._revision = revision
        self._renewed = time.monotonic()

    async def keep(self) -> None:
        """Renew until cancelled.

        Raises:
            Fenced: somebody else has taken the lease.
            Unavailable: it could not be renewed for too long.
        """
        while True:
            await anyio.sleep(EVERY)
            try:
                with anyio.fail_after(EVERY * 2):
                    self._revision = await self._state.put(self._key, _lease(self._holder), self._revision)
                self._renewed = time.monotonic()
            except Conflict:
                await self._recover()
            except (Unavailable, TimeoutError):
                if time.monotonic() - self._renewed > OWN:
                    raise Unavailable(f"the lease {self._key} could not be renewed", "taking it again") from None

    async def _recover(self) -> None:
        """A renewal whose answer was lost looks like a conflict with ourselves."""
        found = await self._state.get(self._key, Lease)
        if found is None or found[0].holder != self._holder:
            raise Fenced(f"another process has taken {self._key}", "stop one of the two")
        self._revision = found[1]

    async def release(self) -> None:
        """Give the lease back, so that the next one need not wait; where it fails, it runs out."""
        with anyio.move_on_after(2, shield=True):
            try:
                found = await self._state.get(self._key, Lease)
                if found is not None and found[0].holder == self._holder:
                    await self._state.delete(self._key)
            except Unavailable:
                log.get().debug("lease left to run out", key=self._key)


async def take(state: State, key: str, holder: str, *, patient: bool) -> Hold:
    """The lease, once nobody alive holds it.

    Args:
        holder: who asks; what the same holder took over an earlier connection is still its own.
        patient: wait for a living holder to end; else refuse.

    Raises:
        Busy: somebody holds it, and `patient` is false.
    """
    revision, since, said = -1, time.monotonic(), False
    while True:
        found = await state.get(key, Lease)
        if found is None:
            mine = await _put(state, key, holder, 0)
        else:
            lease, now = found
            if now != revision:
                if revision != -1 and not patient:
                    raise Busy(
                        f"{key} is held by process {lease.pid} on {lease.host.split('/')[0]}",
                        "wait until it has ended, or stop it",
                    )
                revision, since = now, time.monotonic()
            stale = time.monotonic() - since > STALE
            mine = await _put(state, key, holder, now) if stale or _dead(lease) or lease.holder == holder else None
            if mine is None and patient and not said:
                log.get().info("standing by", lease=key, holder=lease.pid)
                said = True
        if mine is not None:
            return mine
        await anyio.sleep(EVERY / 4)


async def _put(state: State, key: str, holder: str, revision: int) -> Hold | None:
    try:
        return Hold(state, key, holder, await state.put(key, _lease(holder), revision))
    except Conflict:
        return None
