"""Writing rows anew as they stand in the log, beside a generation's reader: what `verify --repair` and `dlq retry` do.

The version of each write is that of the sequence up to which the log was read: what the reader writes of later events
wins, in whatever order the two arrive, and what was written by hand in between loses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import msgspec

from bridge.index.bulk import Sender, Tally
from bridge.index.document import Builder, Operation, Put, Rejected, Remove
from bridge.index.expected import expected
from bridge.index.feed import Feed, Place
from bridge.index.generation import Generation
from bridge.index.picture import Standing
from bridge.index.rereading import Rereading


class Outcome(msgspec.Struct):
    """What became of some ids: `written` or `deleted` as the log has them, `newer` where a later version stands, and
    `refused` with the reason."""

    written: set[str] = msgspec.field(default_factory=set)
    deleted: set[str] = msgspec.field(default_factory=set)
    newer: set[str] = msgspec.field(default_factory=set)
    refused: dict[str, str] = msgspec.field(default_factory=dict)


class Mending:
    """Writes to one generation."""

    def __init__(self, place: Place, generation: Generation, builder: Builder, reading: Rereading) -> None:
        self._builder = builder
        self._reading = reading
        self._feed = Feed(place, generation, Tally())
        self._sender = Sender(
            place.engine, generation.write_alias, self._learn, tally=Tally(), physical=generation.physical
        )

    async def write(self, ids: Iterable[str]) -> Outcome:
        """Write the latest state of some ids: their documents, or that there are none.

        Raises:
            IndexMismatch: the write alias is gone. ServerRefused: credentials or privileges.
        """
        outcome, ops = Outcome(), dict[str, tuple[str, Operation]]()
        for doc_id in ids:
            try:
                made = await self._operations(doc_id, self._reading.picture.get(doc_id))
            except Rejected as error:
                outcome.refused[doc_id] = str(error)
                continue
            (outcome.written if isinstance(made[0], Put) else outcome.deleted).add(doc_id)
            ops |= {op.id: (doc_id, op) for op in made}
        refusals, stale = await self._sender.send([op for _, op in ops.values()])
        for refusal in refusals:
            outcome.refused[ops[refusal.op.id][0]] = refusal.reason
        outcome.newer = {ops[op_id][0] for op_id in stale}
        for done in (outcome.written, outcome.deleted):
            done -= outcome.newer | outcome.refused.keys()
        return outcome

    async def _operations(self, doc_id: str, standing: Standing | None) -> list[Operation]:
        if standing is None:
            return [Remove(doc_id, self._reading.version("", 0), again=True)]
        made = await expected(self._builder, standing, self._reading.version(standing.name, standing.version))
        for op in made:
            op.again = True
        return made

    async def _learn(self, documents: list[Put]) -> bool:
        found = []
        for op in documents:
            with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
                found.append(msgspec.json.decode(op.doc))
        return await self._feed.learn(found)
