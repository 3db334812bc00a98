"""Whether a bridge that stands by could take over: it is let in by PostgreSQL, which allows what it needs, and its dsn
leads to the stream's own database.

Its beginning decides that anew, and all the rest with it; but by then the other one is gone, and nobody works.
"""

from __future__ import annotations

import time

import anyio

from bridge import log
from bridge.config import Config
from bridge.errors import BridgeError, ServerRefused, Unavailable
from bridge.pipeline.recover import refuse_another
from bridge.source import connection, slot
from bridge.stream import standby
from bridge.stream.state import Checkpoint, State
from bridge.stream.subjects import checkpoint_key
from bridge.waiting import REMIND

# A password, a role or pg_hba.conf may be changed at any time, and each refusal is a line in PostgreSQL's log.
LOOK_EVERY = 60.0
AWAY_EVERY = 5.0
QUERY = "SELECT (SELECT system_identifier FROM pg_control_system())::text, current_database()"


class Standing:
    """What one process has found of that, over as many connections to the broker as it takes.

    `why` says why it could not take over, and is empty while it could, or that is not known. It is logged once for
    each reason, again after `REMIND` seconds and then after twice as long each time, and once more when it is over.
    """

    def __init__(self) -> None:
        self.why = ""
        self._since = 0.0
        self._remind = REMIND

    async def look(self, config: Config, state: State) -> None:
        """Look until cancelled, from the moment on that others see this one waiting.

        Raises:
            OtherDatabase: the stream is another's.
        """
        await anyio.sleep(standby.AFTER)
        while True:
            every = LOOK_EVERY
            try:
                await _look(config, state)
                self._could()
            except ServerRefused as error:
                self._could_not(error)
            except Unavailable as error:
                self._could_not(error)
                every = AWAY_EVERY
            await anyio.sleep(every)

    def _could_not(self, error: BridgeError) -> None:
        now = time.monotonic()
        if not self.why:
            self._since, self._remind = now, REMIND
        lasted = now - self._since
        if error.what != self.why or lasted >= self._remind:
            self._remind = max(2 * lasted, REMIND)
            log.get().warning("could not take over", why=error.what, next=_remedy(error))
        self.why = error.what

    def _could(self) -> None:
        if self.why:
            log.get().info("could take over again", after_s=round(time.monotonic() - self._since, 1))
        self.why = ""


def _remedy(error: BridgeError) -> str:
    if isinstance(error, Unavailable):
        return "let this machine reach PostgreSQL; it is tried again while this bridge stands by"
    remedy = error.remedy.replace("\n  → ", "; ")
    return f"{remedy}; it is tried again each minute, and SIGHUP has the configuration read anew"


async def _look(config: Config, state: State) -> None:
    """What keeps this bridge from PostgreSQL. Where the broker is away, that is nothing of PostgreSQL's.

    Raises:
        OtherDatabase: it is another database. ServerRefused, Unavailable: it does not let the bridge in or work.
    """
    async with connection.connect(config.source.dsn) as sql:
        await slot.inspect(sql, failover=bool(config.source.failover))
        row = await (await sql.execute(QUERY)).fetchone()
    assert row is not None
    try:
        kept = await state.get(checkpoint_key(config.source.name), Checkpoint)
    except Unavailable:
        return
    if kept is not None:
        refuse_another(kept[0], row[0], row[1], config.stream.name)
