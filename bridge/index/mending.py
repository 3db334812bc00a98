"""Writing rows anew as they stand in the log, beside a generation's reader: what `verify --repair` and `dlq retry` do.

The version of each write is that of the sequence up to which the log was read: what the reader writes of later events
wins, in whatever order the two arrive, and what was written by hand in between loses.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from bridge.index.bulk import MOST_BYTES, Sender, Tally
from bridge.index.circuit import Circuit
from bridge.index.document import Operation, Put, Remove
from bridge.index.expected import expected
from bridge.index.home import IndexHome
from bridge.index.naming import Rejected, sibling
from bridge.index.picture import Standing
from bridge.index.place import Place
from bridge.index.rereading import Rereading


class Outcome(msgspec.Struct):
    """What became of the rows at some addresses: `written` or `deleted` as the log has them, `newer` where a later
    version stands, and `refused` with the reason."""

    written: set[str] = msgspec.field(default_factory=set)
    deleted: set[str] = msgspec.field(default_factory=set)
    newer: set[str] = msgspec.field(default_factory=set)
    refused: dict[str, str] = msgspec.field(default_factory=dict)


class Mending:
    """Writes to the generation whose log was read."""

    def __init__(self, place: Place, reading: Rereading) -> None:
        self._reading = reading
        self._feed = reading.feed
        generation = self._feed.generation
        home = IndexHome(self._feed, reading.builders)
        self._sender = Sender(
            place.engine, generation.physical, home, Circuit(1), name=place.site.name, tally=Tally()
        )  # fmt: skip

    async def write(self, addresses: Iterable[str]) -> Outcome:
        """Write the latest state of the rows at some addresses: their documents, or that there are none.

        Raises:
            IndexMismatch: the write alias is gone. ServerRefused: credentials or privileges.
        """
        outcome, ops, size = Outcome(), dict[str, tuple[str, Operation]](), 0
        for doc_id in addresses:
            try:
                made = await self._operations(doc_id, self._reading.picture.get(doc_id))
            except Rejected as error:
                outcome.refused[doc_id] = str(error)
                continue
            (outcome.written if isinstance(made[0], Put) else outcome.deleted).add(doc_id)
            ops |= {op.id: (doc_id, op) for op in made}
            size += sum(len(op.doc) for op in made if isinstance(op, Put))
            if size >= MOST_BYTES:
                await self._send(ops, outcome)
                ops, size = {}, 0
        await self._send(ops, outcome)
        for done in (outcome.written, outcome.deleted):
            done -= outcome.newer | outcome.refused.keys()
        return outcome

    async def _send(self, ops: dict[str, tuple[str, Operation]], outcome: Outcome) -> None:
        refusals, stale = await self._sender.send([op for _, op in ops.values()])
        for refusal in refusals:
            outcome.refused[ops[refusal.op.id][0]] = refusal.reason
        outcome.newer |= {ops[address][0] for address in stale}

    async def _operations(self, doc_id: str, standing: Standing | None) -> list[Operation]:
        at, longest = self._reading.version(standing), self._feed.generation.longest
        if standing is None:
            others = [sibling(doc_id, number) for number in range(1, longest)]
            return [Remove(address, at, again=True) for address in (doc_id, *others)]
        made = await expected(self._reading.builders, standing, at, longest)
        if len(made) > longest:
            await self._feed.longest(len(made))
        for op in made:
            op.again = True
        return made
