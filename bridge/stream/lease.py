"""Leases: who may do a job now. One KV key a job, renewed each second by compare-and-set.

A holder that could not renew for `OWN` seconds by its own clock stops by itself, before anybody else, who has to see
no renewal for `STALE` seconds in successful reads, may begin. While the broker is away nobody reads, so an outage
takes the lease from nobody. A holder that died on this host is noticed at once, by its pid and start time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import anyio
import msgspec

from bridge import log
from bridge.errors import Fenced, Unavailable
from bridge.stream import standby
from bridge.stream.state import Conflict, State
from bridge.stream.subjects import token
from bridge.waiting import until

EVERY = 1.0
TRY = 2.0
OWN = 7.0
STALE = 10.0
LOOK_EVERY = 0.25


class Busy(Fenced):
    """Another process does this job now; wait for it to end, or stop it."""


class Taken(Fenced):
    """Another process has had the lease since this one took it."""


class Lost(Unavailable):
    """The lease has run out or was deleted: stop what it allowed, and take it again."""


class Holder:
    """Who asks for a lease, over as many connections as it takes.

    had: it has taken the lease and not given it back, so that whoever has it now has taken it away.
    """

    def __init__(self) -> None:
        self.id = uuid4().hex
        self.had = False


class Lease(msgspec.Struct, frozen=True):
    """`lease.<role>.<source>` or `lease.<role>.<source>.<name>`.

    `pid` and `started` (clock ticks since boot) name a process of `host`; `since` is when it took the lease, `at` when
    it renewed it. A bridge adds its `epoch` and the PostgreSQL backend that holds the slot's lock for it: who takes
    over ends that one.
    """

    holder: str
    host: str
    pid: int
    at: str
    started: int = 0
    epoch: int = 0
    backend_pid: int = 0
    since: str = ""


def lease_key(role: str, source: str, name: str = "") -> str:
    """KV key of a lease."""
    return f"lease.{token(role)}.{token(source)}" + (f".{token(name)}" if name else "")


@functools.cache
def _host() -> str:
    """This host as it runs now, and its pid namespace: hosts may share a name and a namespace's number, and containers
    a boot; all three together name one table of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int:
    """When a process of this host began, in clock ticks since boot; 0 where that cannot be known.

    Raises:
        ProcessLookupError: it has ended, whether or not its parent has noticed.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    if state in "ZX":
        raise ProcessLookupError
    return int(fields[18])


def _lease(holder: str) -> Lease:
    pid, now = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
    return Lease(holder, _host(), pid, now, _started(pid), since=now)


def dead(lease: Lease) -> bool:
    """Whether the holder was a process of this host that is gone; its pid may be another's by now."""
    if lease.host != _host() or "/" not in lease.host:
        return False
    try:
        with contextlib.suppress(PermissionError):
            os.kill(lease.pid, 0)
        started = _started(lease.pid)
    except ProcessLookupError:
        return True
    return bool(started and lease.started and started != lease.started)


def alive(lease: Lease) -> bool:
    """Whether its holder seems to work: it is not known to be dead, and renewed the lease by its own clock of late."""
    age = (datetime.now(UTC) - datetime.fromisoformat(lease.at)).total_seconds() if lease.at else math.inf
    return age < STALE and not dead(lease)


def whose(lease: Lease) -> str:
    """The holder, for people."""
    return _who(lease)


def same_process(one: Lease, other: Lease) -> bool:
    """Whether two leases are held by the same process."""
    return (one.host, one.pid, one.started) == (other.host, other.pid, other.started)


def mine(lease: Lease) -> bool:
    """Whether this process holds it."""
    return same_process(lease, _lease(""))


def _who(lease: Lease) -> str:
    epoch = f" (epoch {lease.epoch})" if lease.epoch else ""
    return f"process {lease.pid} on {lease.host.split('/')[0]}{epoch}"


class Hold:
    """A lease that this process holds; `lease` is what it says of its holder."""

    def __init__(self, state: State, key: str, lease: Lease, revision: int, sent: float) -> None:
        self._state = state
        self._key = key
        self.lease = lease
        self._revision = revision
        self._ends = sent + OWN
        self._one = anyio.Lock()

    def check(self) -> None:
        """Raise Lost where it has run out: whoever slept must not do first what it was about to do."""
        if time.monotonic() >= self._ends:
            raise self._lost()

    def _lost(self) -> Lost:
        return Lost(f"the lease {self._key} could not be renewed for {OWN:g} s", "taking it again")

    async def keep(self) -> None:
        """Renew until cancelled.

        Raises:
            Fenced: somebody else has taken the lease.
            Unavailable: it is gone, or could not be renewed for too long.
        """
        while True:
            await anyio.sleep(max(0.0, min(EVERY, self._ends - time.monotonic())))
            await self._renew()

    async def note(self, *, epoch: int | None = None, backend_pid: int | None = None) -> None:
        """Let the lease say so; returns once it does. Raises as `keep` does."""
        self.lease = msgspec.structs.replace(
            self.lease,
            epoch=self.lease.epoch if epoch is None else epoch,
            backend_pid=self.lease.backend_pid if backend_pid is None else backend_pid,
        )
        await until(self._renew, seconds=math.inf, every=LOOK_EVERY)

    async def _renew(self) -> bool:
        """Whether the renewal is known to be stored."""
        async with self._one:
            # Whoever waits for a renewal counts from its arrival at the earliest: later than this.
            sent = time.monotonic()
            mine = msgspec.structs.replace(self.lease, at=_lease("").at)
            try:
                with anyio.fail_after(max(0.0, min(TRY, self._ends - sent))):
                    try:
                        self._revision = await self._state.put(self._key, mine, self._revision)
                    except Conflict:
                        await self._recover()
                        return False
                self._ends = sent + OWN
                return True
            except Lost:
                raise
            except (Unavailable, TimeoutError):
                if time.monotonic() >= self._ends:
                    raise self._lost() from None
                return False

    async def _recover(self) -> None:
        """A renewal whose answer was lost looks like a conflict with ourselves."""
        found = await self._state.get(self._key, Lease)
        if found is None:
            raise Lost(f"the lease {self._key} was deleted", "taking it again")
        if found[0].holder != self.lease.holder:
            raise _taken(self._key, found[0])
        self._revision = found[1]

    async def release(self) -> bool:
        """Give the lease back, so that the next one need not wait; where it fails, it runs out.

        Returns:
            Whether it was still this process's, and is free now.
        """
        with anyio.move_on_after(TRY, shield=True):
            try:
                found = await self._state.get(self._key, Lease)
                if found is not None and found[0].holder == self.lease.holder:
                    await self._state.delete(self._key, found[1])
                    return True
            except Unavailable:
                log.get().debug("lease left to run out", key=self._key)
        return False


def _taken(key: str, lease: Lease | None) -> Taken:
    who = _who(lease) if lease is not None else "another process"
    return Taken(f"{who} has taken {key} from this process", "it has stopped; run only one")


async def take(
    state: State,
    key: str,
    holder: str,
    *,
    patient: bool,
    stale: float = STALE,
    again: bool = False,
    why: Callable[[], str] = str,
) -> Hold:
    """The lease, once nobody alive holds it.

    Args:
        holder: who asks; what the same holder took over an earlier connection is still its own.
        patient: wait for a living holder to end; else refuse.
        stale: seconds without a renewal after which a holder is taken for gone.
        again: the same holder has it and did not give it back: nobody may have had it since.
        why: what would keep it from working once it has the lease, for the list of those who wait; empty: nothing.

    Raises:
        Busy: somebody holds it, and `patient` is false.
        Taken: somebody has it, or has had it, although it was this holder's.
        Unavailable: the state cannot be read; what was seen so far does not count.
    """
    if not patient:
        return await _take(state, key, holder, patient=False, stale=stale, again=again)
    async with standby.shown(state, key, holder, _host(), os.getpid(), why):
        return await _take(state, key, holder, patient=True, stale=stale, again=again)


async def _take(state: State, key: str, holder: str, *, patient: bool, stale: float, again: bool) -> Hold:
    revision, read, unrenewed, said = -1, 0.0, 0.0, False
    while True:
        sent = time.monotonic()
        found = await state.get(key, Lease)
        if again and (found is None or found[0].holder != holder):
            raise _taken(key, found[0] if found is not None else None)
        if found is None:
            mine = await _put(state, key, _lease(holder), 0, sent)
        else:
            lease, now = found
            if now != revision:
                if revision != -1 and not patient:
                    raise Busy(f"{key} is held by {_who(lease)}", "wait until it has ended, or stop it")
                revision, read, unrenewed = now, time.monotonic(), 0.0
            # A read that took long, or a pause of this process, shows nothing of what the holder did meanwhile.
            unrenewed, read = unrenewed + min(time.monotonic() - read, EVERY), time.monotonic()
            free = lease.holder == holder or dead(lease) or unrenewed >= stale
            # What it knows of the last holder's backend stays, until it has one of its own.
            heir = msgspec.structs.replace(_lease(holder), epoch=lease.epoch, backend_pid=lease.backend_pid)
            if lease.holder == holder and lease.since:
                heir = msgspec.structs.replace(heir, since=lease.since)
            mine = await _put(state, key, heir, now, sent) if free else None
            if mine is None and patient and not said:
                log.get().info("standing by", lease=key, holder=_who(lease))
                said = True
        if mine is not None:
            return mine
        await anyio.sleep(LOOK_EVERY)


async def _put(state: State, key: str, lease: Lease, revision: int, sent: float) -> Hold | None:
    try:
        return Hold(state, key, lease, await state.put(key, lease, revision), sent)
    except Conflict:
        return None
