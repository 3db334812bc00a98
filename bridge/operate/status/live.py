"""The state of everything, looked at over connections that stay open: each second for those who watch, else seldom.

A fault shows in the next look: each server has less than a second to answer, and who is away holds up nobody else. What
a search engine is asked is left with it for longer, because a busy one would only be asked the same again.
PostgreSQL is asked before NATS (status.py says why). Where it takes long both are, and NATS once more if PostgreSQL
answers in the end.
"""

from __future__ import annotations

import math
import os
import socket
import time
from functools import partial

import anyio
import msgspec

from bridge import structured
from bridge.config import Config
from bridge.errors import BridgeError
from bridge.operate.status import database, engines, health, jetstream, outlook
from bridge.operate.status.collect import Answers, asked, assembled, confirmed, named
from bridge.operate.status.history import History, sample
from bridge.operate.status.line import Late, Line
from bridge.operate.status.parts import NATS, POSTGRES, Index, Process, Status
from bridge.stream.lease import lease_key, mine
from bridge.stream.server import Servers

EVERY = 1.0
# While nobody has asked for so long: a look costs what a thousand changes do.
SELDOM, WATCHED = 10.0, 90.0
# Who asks waits no longer than this for a newer look.
FRESH = 2.0
SECONDS = 0.9
BUSY = 3.0
EARLY = 0.4
# The line's own deadline tells better what was waited for.
GRACE = 0.5


class Live:
    """The state of everything. Whoever waits for a look, or asks for a fresh one, has it looked at each second for
    `WATCHED` seconds from then on.

    latest: the newest look, with its conclusions; None before the first.
    history: samples of the last minutes, for rates and charts.

    Args:
        database_too: False where PostgreSQL is not asked: whoever feeds an index need not reach it.
        itself: whether this process is a bridge, which knows that it runs where nobody else can tell.
    """

    def __init__(self, config: Config, servers: Servers, *, database_too: bool = True, itself: bool = False) -> None:
        self.latest: Status | None = None
        self.history = History()
        self._config = config
        self._number = 0
        self._at = time.monotonic()
        self._wanted_at = -math.inf
        self._wanted = anyio.Event()
        self._news = anyio.Event()
        self._away: dict[str, str] = {}
        self._database_too = database_too
        self._itself = itself
        self._stands_by = False
        self._database = Line(POSTGRES, partial(database.opened, config), SECONDS)
        self._log = Line(NATS, partial(jetstream.opened, config, servers), SECONDS)
        self._engines = {
            group.what: Line(group.what, partial(engines.opened, group, BUSY), BUSY, wait=SECONDS)
            for group in engines.groups(config)
        }
        self._late = set[str]()
        self._engine_of = {name: group.what for group in engines.groups(config) for name in group.names}

    async def run(self) -> None:
        """Look, until cancelled; a server that is away ends nothing."""
        async with structured.group() as tasks:
            if self._database_too:
                tasks.start_soon(self._database.keep)
            tasks.start_soon(self._log.keep)
            for line in self._engines.values():
                tasks.start_soon(line.keep)
            while True:
                began = time.monotonic()
                self._publish(self._known(await self._look()))
                await anyio.sleep(max(0.0, began + EVERY - time.monotonic()))
                if time.monotonic() - self._wanted_at > WATCHED:
                    with anyio.move_on_after(began + SELDOM - time.monotonic()):
                        await self._wanted.wait()

    @property
    def age(self) -> float:
        """Seconds since the newest look; before the first since the start."""
        return time.monotonic() - self._at

    async def next(self, after: int, *, watching: bool = True) -> int:
        """Wait until a look with a number over `after` is there (the first has 1); the number of the newest.

        Args:
            watching: whether it is for somebody that there are looks each second.
        """
        if watching:
            self._watch()
        while self._number <= after:
            await self._news.wait()
        return self._number

    async def fresh(self) -> None:
        """Return once `latest` is of just now; where it does not become so soon, with the one that there is."""
        self._watch()
        if self.age > EVERY:
            with anyio.move_on_after(FRESH):
                await self.next(self._number)

    def _watch(self) -> None:
        self._wanted_at = time.monotonic()
        self._wanted.set()
        self._wanted = anyio.Event()

    async def _look(self) -> Answers:
        found, read = Answers(), anyio.Event()

        async def ask_database() -> None:
            found.database = await asked(POSTGRES, self._database.ask, found, SECONDS + GRACE)
            read.set()

        async def ask_log() -> None:
            found.forget(NATS)
            found.log = await asked(NATS, self._log.ask, found, SECONDS + GRACE)

        async with structured.group() as tasks:
            if self._database_too:
                tasks.start_soon(ask_database)
            else:
                read.set()
            for what in self._engines:
                tasks.start_soon(self._ask_engine, found, what)
            with anyio.move_on_after(EARLY):
                await read.wait()
            early = not read.is_set()
            await ask_log()
            await read.wait()
            if early and found.database is not None and found.log is not None:
                await ask_log()
        await confirmed(self._config, found, partial(self._ask_engine, found), ask_log)
        return found

    def _known(self, found: Answers) -> Status:
        """A status of what was said, and of what this process knows of itself."""
        status = assembled(self._config, found)
        if not self._itself:
            return status
        if found.log is not None:
            lease = found.log.leases.get(lease_key("bridge", self._config.source.name))
            self._stands_by = lease is not None and not mine(lease)
        if status.process.state != "unknown" or self._stands_by:
            return status
        return msgspec.structs.replace(status, process=Process("running", named(os.getpid(), socket.gethostname())))

    async def _ask_engine(self, found: Answers, what: str) -> None:
        self._late.discard(what)
        try:
            found.searched[what] = await self._engines[what].ask()
        except Late as error:
            self._late.add(what)
            found.refused(what, error)
        except BridgeError as error:
            found.refused(what, error)

    def _publish(self, found: Status) -> None:
        self._number += 1
        self._at = time.monotonic()
        self._away = {what: self._away.get(what, found.at) for what in found.away}
        found = msgspec.structs.replace(
            found,
            number=self._number,
            away_since=self._away,
            indexes=[self._dated(index) for index in found.indexes],
        )
        self.history.add(sample(found, time.time()))
        self.latest = health.judge(outlook.watched(found, self.history))
        self._news.set()
        self._news = anyio.Event()

    def _dated(self, index: Index) -> Index:
        """An index whose engine says since when it has been away; one that has not answered yet leaves what was known
        of the alias."""
        what = self._engine_of[index.name]
        if what in self._late and self.latest is not None:
            known = {one.name: one.astray for one in self.latest.indexes}
            index = msgspec.structs.replace(index, astray=known.get(index.name))
        if index.engine is None or not index.engine.away:
            return index
        since = self._away.get(what, "")
        return msgspec.structs.replace(index, engine=msgspec.structs.replace(index.engine, since=since))
