"""One bulk: the operations of a run of events, sent until every one of them has its answer.

An answer is read item by item. A version conflict means that something newer is there: done. Too busy and out of order
are tried again for ever. What the engine will never take becomes a refusal, for the caller to bury; nothing is dropped.
Where most is refused, the circuit holds everything back instead, and what was refused is sent again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import anyio
import msgspec

from bridge import log
from bridge.errors import IndexMismatch, ServerRefused, Unavailable
from bridge.index.circuit import Circuit
from bridge.index.document import Operation, Put
from bridge.index.engine import ROLE, Engine, EngineError, Item
from bridge.index.reason import GONE, Problem, blocked, scrub
from bridge.index.sample import Sample
from bridge.waiting import Backoff

MOST = 2_000
MOST_BYTES = 8 << 20
_CONFLICT = "version_conflict_engine_exception"
UNKNOWN_FIELD = "strict_dynamic_mapping_exception"


class Mark(NamedTuple):
    """The place of an event in the stream."""

    seq: int
    epoch: int
    position: str


class Awaited(NamedTuple):
    """An event that can be no document, and how to bury it once the circuit lets it go."""

    reason: str
    bury: Callable[[], Coroutine[Any, Any, None]]


class Bulk:
    """Operations that are sent together; at most one for each document, the newest.

    `rejected` are the events among the others that can be no document, buried when the rest has its answer; `after` are
    the bulks that must be answered first because they hold the same documents. `later` are deletes that are sent once
    everything else here has its answer, in two turns.
    """

    def __init__(self) -> None:
        self.rejected: list[Awaited] = []
        self.ops: dict[str, Operation] = {}
        self.later: tuple[dict[str, Operation], dict[str, Operation]] = ({}, {})
        self.addresses: set[str] = set()
        self.marks: dict[str, Mark] = {}
        self.after: list[Bulk] = []
        self.size = 0
        self.last: Mark | None = None
        self.done = anyio.Event()

    @property
    def full(self) -> bool:
        """Whether it is time to send it."""
        return len(self.addresses) + len(self.rejected) >= MOST or self.size >= MOST_BYTES

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send or bury."""
        return not (self.ops or any(self.later) or self.rejected)

    def __contains__(self, doc_id: str) -> bool:
        return doc_id in self.addresses

    def held(self, doc_id: str) -> Operation:
        """The newest operation on a document that is in it: a delete for later may be of a row that moved on since."""
        found = [ops[doc_id] for ops in (self.ops, *self.later) if doc_id in ops]
        return max(found, key=lambda op: op.version)

    def add(self, op: Operation, mark: Mark) -> None:
        """Take an operation in place of an older one for the same document."""
        before = self.ops.get(op.id)
        if before is not None and before.version > op.version:
            return
        if isinstance(op, Put):
            self.size += len(op.doc)
        self.addresses.add(op.id)
        self.ops[op.id] = op
        self.marks[op.id] = mark

    def add_later(self, op: Operation, mark: Mark, turn: int) -> None:
        """Take a delete for one of the two turns."""
        self.addresses.add(op.id)
        self.later[turn][op.id] = op
        self.marks.setdefault(op.id, mark)


class Refusal(NamedTuple):
    """An operation that the engine will never take, and why (scrubbed)."""

    op: Operation
    problem: Problem
    reason: str


class Tally(msgspec.Struct):
    """What bulks have done. `exact` is false once an answer was lost: then `created` may be too low.

    sample: sees all that is sent, where somebody wants to compare it later.
    """

    written: int = 0
    created: int = 0
    deleted: int = 0
    stale: int = 0
    refused: int = 0
    exact: bool = True
    sample: Sample | None = None


async def remove_impostor(engine: Engine, alias: str) -> bool:
    """Remove an empty index that has a write alias' name: a delete that came after the alias was gone made it. One that
    holds documents is somebody's.

    Returns:
        Whether there was one.
    """
    there = alias in await engine.indexes(alias) and await _is_empty(engine, alias)
    if there:
        log.get().warning("index removed", physical=alias, why="a delete made it in place of its write alias")
        try:
            await engine.delete(alias)
        except EngineError:
            # Another bulk has removed it and put the alias back: what has an alias' name is not deleted by it.
            if alias in await engine.indexes(alias):
                raise
    return there


async def _is_empty(engine: Engine, index: str) -> bool:
    try:
        await engine.refresh(index)
        return await engine.count(index) == 0
    except EngineError as error:
        if error.status != 404:
            raise
        return True


class _Sent:
    """What has become of operations that are sent, over all turns."""

    def __init__(self) -> None:
        self.refused: list[tuple[Operation, Problem]] = []
        self.stale: list[str] = []
        self.fitted: set[int] = set()
        self.taught = self.astray = False


class _Turn:
    """What one answer leaves to do."""

    def __init__(self) -> None:
        self.again: list[Operation] = []
        self.unknown: list[tuple[Put, Problem]] = []
        self.unfit: list[tuple[Put, Problem]] = []
        self.away: Unavailable | None = None
        self.lost = False


class Home(Protocol):
    """What a sender asks of the index that it writes to."""

    async def learn(self, documents: list[Put]) -> bool:
        """Add the fields that the mapping lacks; whether there were any."""

    async def refit(self, ops: Sequence[Put]) -> list[bool]:
        """Make documents anew with what is known of their fields by now; of each whether that changed it."""

    @property
    def write_alias(self) -> str:
        """What writes go through now."""

    def still_allowed(self) -> None:
        """Raise Lost where somebody else may have taken this writer's place."""

    async def regain(self) -> bool:
        """Put back a write alias that is gone while its index is there; whether it was put back."""

    def known(self) -> Collection[str]:
        """The fields and columns that may be named in a reason: no part of a row's values."""


class Sender:
    """Sends operations through the write alias of one index and keeps the tally.

    `require_alias` keeps a write from making an index of the alias' name, but engines let a delete make one where the
    alias is gone: each answer says which index took it, and one that was made so is removed at once.

    Args:
        physical: the index behind the alias.
        name: the index as it is configured.
    """

    def __init__(self, engine: Engine, physical: str, home: Home, circuit: Circuit, *, name: str, tally: Tally) -> None:
        self._engine = engine
        self._physical = physical
        self._home = home
        self._circuit = circuit
        self._name = name
        self._backoff = Backoff(f"writes to {physical}")
        self._held = Backoff(f"index {name}")
        self._outage: Unavailable | None = None
        self._holding = 0
        self.tally = tally

    @property
    def _alias(self) -> str:
        return self._home.write_alias

    async def deliver(self, ops: Sequence[Operation], rejected: Sequence[str] = ()) -> list[Refusal]:
        """Send until all are answered and the circuit admits what was refused, which is the result.

        Args:
            rejected: why other documents of the same bulk were rejected before they could be sent.

        Raises:
            IndexMismatch: as `send`; or most documents are rejected, and there is nobody to wait for.
        """
        refusals, _ = await self.send(ops)
        held = False
        while not self._circuit.admits(len(ops) - len(refusals), [*rejected, *(r.reason for r in refusals)]):
            self._holding += not held
            held = True
            await self._hold()
            refusals, _ = await self.send([refusal.op for refusal in refusals])
        self._holding -= held
        if held and not self._holding:
            self._outage = None
            self._held.over()
        self.tally.refused += len(refusals) + len(rejected)
        return refusals

    async def _hold(self) -> None:
        """Wait because most documents are rejected; that is said once."""
        if self._circuit.ends:
            raise IndexMismatch(
                f"{self._circuit}: the rebuild of index {self._name} ends, the alias stays where it is",
                f"correct its mapping or transform, or raise its reject_limit, then: bridge reindex {self._name}",
            )
        if self._outage is None:
            self._outage = Unavailable(
                f"{self._circuit}; nothing more is buried or acked",
                f"correct the mapping or the transform, then: bridge reindex {self._name} (what was refused is sent"
                " again meanwhile); or raise its reject_limit and restart",
            )
        await self._held.wait(self._outage)

    async def send(self, ops: Sequence[Operation]) -> tuple[list[Refusal], list[str]]:
        """Send until all are answered: what was refused for good, and the ids where something newer stands.

        Raises:
            IndexMismatch: the index is gone, or its write alias is not the bridge's.
            ServerRefused: credentials or privileges.
        """
        sent, left = _Sent(), list(ops)
        if self.tally.sample is not None:
            self.tally.sample.sent(ops)
        while left:
            answers = await self._answers(left)
            if await self._astray(answers):
                await self._found_again(sent)
                continue
            turn = _Turn()
            for op, item in zip(left, answers, strict=True):
                if item.error is None:
                    self._count(item)
                else:
                    self._sort(op, item, item.error, turn, sent)
            if turn.unknown:
                sent.taught = True
                if await self._home.learn([op for op, _ in turn.unknown]):
                    turn.again += [self._anew(op) for op, _ in turn.unknown]
                else:
                    sent.refused += turn.unknown
            if turn.unfit:
                await self._refit(turn, sent)
            if turn.lost and not await self._home.regain():
                raise self._lost()
            if turn.away is not None:
                await self._backoff.wait(turn.away)
            else:
                self._backoff.over()
            left = turn.again
        if self.tally.sample is not None:
            overruled = set(sent.stale)
            self.tally.sample.doubt([op for op, _ in sent.refused] + [op for op in ops if op.id in overruled])
        known = self._home.known() if sent.refused else ()
        return [Refusal(op, problem, scrub(problem, known)) for op, problem in sent.refused], sent.stale

    def _sort(self, op: Operation, item: Item, error: Problem, turn: _Turn, sent: _Sent) -> None:
        """What becomes of an operation that was not taken."""
        if error.type == _CONFLICT:
            self.tally.stale += 1
            sent.stale.append(op.id)
        elif _alias_is_gone(error):
            turn.lost = True
            turn.again.append(op)
        elif (why := self._away(item)) is not None:
            turn.away = why
            turn.again.append(op)
        elif item.status in (401, 403):
            raise ServerRefused(
                f"the search engine at {self._engine.where} refuses writes to {self._alias} ({scrub(error)}): "
                "the login's role lacks that privilege",
                ROLE,
            )
        elif isinstance(op, Put) and error.type == UNKNOWN_FIELD and not sent.taught:
            turn.unknown.append((op, error))
        elif isinstance(op, Put) and id(op) not in sent.fitted:
            turn.unfit.append((op, error))
        else:
            sent.refused.append((op, error))

    async def _refit(self, turn: _Turn, sent: _Sent) -> None:
        """Send again what was built before another bulk made its field known; the rest is refused for good."""
        changed = await self._home.refit([op for op, _ in turn.unfit])
        for (op, error), other in zip(turn.unfit, changed, strict=True):
            if other:
                sent.fitted.add(id(op))
                turn.again.append(self._anew(op))
            else:
                sent.refused.append((op, error))

    def _anew(self, op: Put) -> Put:
        """A document that has changed since it was sent first."""
        if self.tally.sample is not None:
            self.tally.sample.changed(op)
        return op

    async def _found_again(self, sent: _Sent) -> None:
        """Put the alias back on its index, and wait where that did not help a moment ago."""
        self.tally.exact = False
        if not await self._home.regain():
            raise self._lost()
        if sent.astray:
            await self._backoff.wait(self._elsewhere())
        sent.astray = True

    def _away(self, item: Item) -> Unavailable | None:
        """Why an operation was not taken now, but can be later; None where it never will be."""
        where = f"the search engine at {self._engine.where} refuses writes to {self._alias}"
        block = blocked(item.error, self._physical)
        if block is not None:
            return Unavailable(f"{where}: {block[0]}", block[1])
        if item.status == 429 or item.status >= 500:
            return Unavailable(f"{where} for now: {item.status} ({scrub(item.error)})", "trying again")
        return None

    async def _astray(self, answers: list[Item]) -> bool:
        """Whether something else than our index took writes, or judged them by its own versions.

        Another bulk may have removed that index and put the alias back meanwhile: the answers count, not what is there.
        """
        strangers = {item.index for item in answers if item.error is None or item.error.type == _CONFLICT} - {
            "",
            self._physical,
        }
        if self._alias in strangers:
            await remove_impostor(self._engine, self._alias)
        return bool(strangers)

    def _count(self, item: Item) -> None:
        self.tally.written += 1
        if item.result == "created":
            self.tally.created += 1
        elif item.result == "deleted":
            self.tally.deleted += 1

    async def _answers(self, ops: list[Operation]) -> list[Item]:
        """One answer for each operation; a request refused as a whole is halved until the guilty is alone."""
        body = b"".join([op.line() for op in ops])

        async def attempt() -> list[Item]:
            try:
                return await self._engine.bulk(self._alias, body, len(ops))
            except Unavailable:
                self.tally.exact = False
                raise

        try:
            # As late as can be: what leaves after a truncate or a sweep of a successor would stay for ever.
            return await self._engine.patiently(attempt, self._backoff, before=self._home.still_allowed)
        except EngineError as error:
            if error.kind in GONE:
                return [Item(404, error=Problem(error.kind)) for _ in ops]
            if error.status not in (400, 413):
                raise
            if len(ops) == 1:
                return [Item(error.status, error=Problem(error.kind or f"status_{error.status}"))]
        half = len(ops) // 2
        return await self._answers(ops[:half]) + await self._answers(ops[half:])

    def _elsewhere(self) -> Unavailable:
        return Unavailable(
            f"writes to {self._alias} were taken by another index than {self._physical} in the search engine at"
            f" {self._engine.where}",
            "find out who makes an index of that name; trying again",
        )

    def _lost(self) -> IndexMismatch:
        return IndexMismatch(
            f"the index {self._physical} or its write alias {self._alias} is gone or not the bridge's in the search"
            f" engine at {self._engine.where}",
            f"build the index anew: bridge reindex {self._name}",
        )


def _alias_is_gone(problem: Problem) -> bool:
    """Whether an alias is on no index, or on several of which none is for writing."""
    unclear = problem.type == "illegal_argument_exception" and "no write index is defined" in (problem.reason or "")
    return unclear or problem.type in GONE
