"""How long PostgreSQL is waited for, and how to tell a server that is busy from a connection that is lost.

A statement may rightly take long: its table is locked, the machine is slow. But a firewall or a proxy that forgot the
connection looks just the same from here. So whoever has waited for a while asks over a fresh connection what the
backend is doing: one that waits for us, who wait for it, has lost the connection, as has one that is gone; everything
else is waited for as long as it takes, and said once with the pids that are in the way.

Source: PostgreSQL documentation, "Wait Event Types", pg_stat_get_activity, pg_blocking_pids.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, LiteralString, NamedTuple, TypeVar

import anyio
import psycopg
from psycopg import pq
from psycopg.abc import PQGen

from bridge import log
from bridge.errors import Unavailable

ASK_AFTER = 15.0
ASK_EVERY = 10.0
ASK_TIMEOUT = 5
UNKNOWN_FOR = 60.0
CANCEL_SECONDS = 12.0

RV = TypeVar("RV")


class Doing(NamedTuple):
    """What a backend does: `event` is its wait event ("" while it computes), `blockers` hold the lock that it wants."""

    kind: str
    event: str
    blockers: list[int]

    @property
    def waits_for_us(self) -> bool:
        """Whether it waits for its client: to read from it, to write to it, or as an idle walsender does."""
        return self.kind == "Client" or self.event.startswith("WalSender")


# By then the number may be another program's.
_OURS = "FROM pg_stat_get_activity(%s) WHERE application_name = current_setting('application_name')"
_DOING = f"SELECT coalesce(wait_event_type, ''), coalesce(wait_event, ''), pg_blocking_pids(pid) {_OURS}"


def again(pgconn: pq.abc.PGconn) -> dict[str, Any]:
    """The parameters with which a client connects as `pgconn` did, for plain SQL."""
    found = {option.keyword.decode(): option.val.decode() for option in pgconn.info if option.val}
    return {name: value for name, value in found.items() if name != "replication"}


async def look(parameters: dict[str, Any], pid: int) -> Doing | None:
    """What the backend `pid` is doing; None where it is gone. `parameters` are those of the connection to ask over.

    Raises:
        psycopg.Error, TimeoutError: the server cannot be asked either.
    """
    row = await _ask(parameters, _DOING, pid)
    return Doing(*row) if row is not None else None


async def end(parameters: dict[str, Any], pid: int) -> None:
    """End a backend that has lost us: it would hold its slot or its lock for as long as it waits.

    Raises:
        psycopg.Error, TimeoutError: the server cannot be asked.
    """
    await _ask(parameters, f"SELECT pg_terminate_backend(pid) {_OURS}", pid)


async def _ask(parameters: dict[str, Any], question: LiteralString, pid: int) -> tuple[Any, ...] | None:
    with anyio.fail_after(2 * ASK_TIMEOUT):
        asked = parameters | {"connect_timeout": ASK_TIMEOUT}
        sql = await psycopg.AsyncConnection.connect(**asked, autocommit=True)
        try:
            return await (await sql.execute(question, (pid,))).fetchone()
        finally:
            await sql.close()


class Doubt:
    """Whether a connection that has been silent for a while is lost; asked again and again while the silence lasts."""

    def __init__(self, pgconn: pq.abc.PGconn, what: str) -> None:
        self._parameters = again(pgconn)
        self._pid = pgconn.backend_pid
        self._what = what
        self._suspected = False
        self._since = time.monotonic()
        self._known = self._since
        self._said = ""

    async def ask(self) -> None:
        """Look once, and say what is in the way.

        Raises:
            Unavailable: the connection is lost: the backend is gone, or waits for us, at the second look still; or
                nothing at all could be learned of it for a minute.
        """
        try:
            found = await look(self._parameters, self._pid)
        except (psycopg.Error, OSError, TimeoutError):
            self._say("PostgreSQL answers nobody")
            if time.monotonic() - self._known > UNKNOWN_FOR:
                raise self._lost("PostgreSQL answers nobody") from None
            return
        self._known = time.monotonic()
        if found is None or found.waits_for_us:
            if self._suspected:
                if found is not None:
                    with contextlib.suppress(psycopg.Error, OSError, TimeoutError):
                        await end(self._parameters, self._pid)
                raise self._lost("its server process is gone" if found is None else "its server process waits for us")
            self._suspected = True
            return
        self._suspected = False
        self._say(f"{found.kind} {found.event}".strip() or "busy", found.blockers)

    def _lost(self, why: str) -> Unavailable:
        seconds = time.monotonic() - self._since
        return Unavailable(f"PostgreSQL is silent on {self._what} ({why}, {seconds:.0f} s)", "connecting again")

    def _say(self, why: str, blockers: list[int] | None = None) -> None:
        if why != self._said:
            self._said = why
            log.get().warning(
                "PostgreSQL takes long",
                what=self._what,
                pid=self._pid,
                waits_for=why,
                **({"blocked_by_pids": blockers, "next": "see pg_stat_activity for these pids"} if blockers else {}),
            )

    def over(self) -> None:
        """The answer is there."""
        if self._said:
            log.get().info("PostgreSQL answers", what=self._what, after_s=round(time.monotonic() - self._since, 1))


async def readable(pgconn: pq.abc.PGconn, what: str) -> None:
    """Return once the server has sent something. Raises Unavailable where the connection is lost."""
    doubt: Doubt | None = None
    while True:
        with anyio.move_on_after(ASK_EVERY if doubt else ASK_AFTER):
            await anyio.wait_readable(pgconn.socket)
            break
        doubt = doubt or Doubt(pgconn, what)
        await doubt.ask()
    if doubt is not None:
        doubt.over()


class Patient(psycopg.AsyncConnection[Any]):
    """A connection whose statements are watched as this module says."""

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:  # noqa: ASYNC109
        """psycopg's own, which every statement goes through. Raises Unavailable where the connection is lost."""
        # A task of its own: psycopg answers one cancellation by cancelling the statement on the server, which takes
        # a moment, and anyio would cancel again and again.
        work = asyncio.create_task(super().wait(gen, interval, timeout))
        doubt: Doubt | None = None
        try:
            done, _ = await asyncio.wait({work}, timeout=ASK_AFTER)
            while not done:
                doubt = doubt or Doubt(self.pgconn, "a statement")
                await doubt.ask()
                done, _ = await asyncio.wait({work}, timeout=ASK_EVERY)
        finally:
            if not work.done():
                work.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({work}, timeout=CANCEL_SECONDS)
            # Who is cancelled does not ask for the result, and asyncio would tell of an error that nobody has seen.
            if work.done() and not work.cancelled():
                work.exception()
        if doubt is not None:
            doubt.over()
        return work.result()
