"""What watches a session: whether PostgreSQL is still there, and whether anything gets published.

`hearing` notices a connection that nothing comes over any more, though a COPY goes on: an idle walsender is asked to
answer every few seconds. One that is busy decoding a huge transaction which is not published reads nothing and answers
nothing, perhaps for an hour: it must not be cut off, so PostgreSQL is asked what it does.

`publishing` closes the connection to PostgreSQL when the broker takes nothing for a while: whatever else goes wrong
meanwhile, nobody who stops PostgreSQL has to wait for us.
"""

from __future__ import annotations

import time

import anyio
from psycopg import pq

from bridge.errors import Unavailable
from bridge.pipeline.feedback import Feedback
from bridge.source.connection import CopyReader
from bridge.source.patience import Doubt
from bridge.stream.publisher import Publisher

ASK_EVERY = 10.0
SILENCE = 40.0
STUCK_AFTER = 30.0
COME_BACK_AFTER = 10.0


class Stuck(Unavailable):
    """The broker is there, or seems to be, but takes nothing; PostgreSQL is left alone for a while."""

    pause = COME_BACK_AFTER


async def hearing(reader: CopyReader, pgconn: pq.abc.PGconn, feedback: Feedback | None = None) -> None:
    """Return only by raising.

    Args:
        feedback: where the COPY is a walsender's, which answers when it is asked.

    Raises:
        Unavailable: the connection is lost.
    """
    doubt: Doubt | None = None
    while True:
        await anyio.sleep(ASK_EVERY)
        silent = reader.silent_for
        if silent >= ASK_EVERY and feedback is not None:
            feedback.send(ask=True)
        if silent >= SILENCE:
            doubt = doubt or Doubt(pgconn, "the replication connection" if feedback else "a table's rows")
            await doubt.ask()
        elif doubt is not None:
            doubt.over()
            doubt = None


async def publishing(publisher: Publisher) -> None:
    """Return only by raising.

    Raises:
        Stuck: nothing of what is on its way has been acked for `STUCK_AFTER` seconds.
    """
    last, since = publisher.acked.seq, time.monotonic()
    while True:
        await anyio.sleep(STUCK_AFTER / 30)
        now = time.monotonic()
        if not publisher.unanswered or publisher.acked.seq != last:
            last, since = publisher.acked.seq, now
        elif now - since >= STUCK_AFTER:
            raise Stuck(
                f"nothing could be published for {now - since:.0f} s (the stream stands at sequence {last})",
                "the connection to PostgreSQL is closed for a while, so that it can stop; see NATS's log",
            )
