"""Whether a bridge that stands by could take over at all: whose database its dsn leads to.

Its beginning decides that anew, and all the rest with it; but by then the other one is gone, and nobody works.
"""

from __future__ import annotations

import math

from bridge.config import Config
from bridge.errors import ServerRefused, Unavailable
from bridge.pipeline.recover import refuse_another
from bridge.source import connection
from bridge.stream.state import Checkpoint, State
from bridge.stream.subjects import checkpoint_key
from bridge.waiting import until

LOOK_EVERY = 5.0
QUERY = "SELECT (SELECT system_identifier FROM pg_control_system())::text, current_database()"


async def refuse_others(config: Config, state: State) -> None:
    """Return once it is known that the stream is this database's. What cannot be asked now is asked again: whoever
    stands by need not reach PostgreSQL yet.

    Raises:
        OtherDatabase: it is another's.
    """

    async def told() -> bool:
        try:
            kept = await state.get(checkpoint_key(config.source.name), Checkpoint)
            if kept is None:
                return False
            async with connection.connect(config.source.dsn) as sql:
                row = await (await sql.execute(QUERY)).fetchone()
        except (Unavailable, ServerRefused):
            return False
        assert row is not None
        refuse_another(kept[0], row[0], row[1], config.stream.name)
        return True

    await until(told, seconds=math.inf, every=LOOK_EVERY)
