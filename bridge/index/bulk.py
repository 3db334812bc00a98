"""One bulk: the operations of a run of events, sent until every one of them has its answer.

An answer is read item by item. A version conflict means that something newer is there: done. Too busy and out of order
are tried again for ever. What the engine will never take becomes a refusal, for the caller to bury; nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import anyio
import msgspec

from bridge import log
from bridge.errors import IndexMismatch, ServerRefused, Unavailable
from bridge.index.document import Operation, Put
from bridge.index.engine import Engine, EngineError, Item, Problem, scrub

MOST = 2_000
MOST_BYTES = 8 << 20
_CONFLICT = "version_conflict_engine_exception"
_GONE = ("index_not_found_exception", "alias_not_found_exception")
_BLOCKED = "cluster_block_exception"
UNKNOWN_FIELD = "strict_dynamic_mapping_exception"


class Mark(NamedTuple):
    """The place of an event in the stream."""

    seq: int
    epoch: int
    position: str


class Bulk:
    """Operations that are sent together; at most one for each document, the newest.

    `after` are the bulks that must be answered first because they hold the same documents. `later` are deletes that
    are sent once everything else here has its answer, in two turns.
    """

    def __init__(self) -> None:
        self.ops: dict[str, Operation] = {}
        self.later: tuple[dict[str, Operation], dict[str, Operation]] = ({}, {})
        self.marks: dict[str, Mark] = {}
        self.after: list[Bulk] = []
        self.size = 0
        self.last: Mark | None = None
        self.done = anyio.Event()

    @property
    def full(self) -> bool:
        """Whether it is time to send it."""
        return len(self.ops) + sum(map(len, self.later)) >= MOST or self.size >= MOST_BYTES

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.ops or any(self.later))

    def __contains__(self, doc_id: str) -> bool:
        return doc_id in self.ops or any(doc_id in turn for turn in self.later)

    def add(self, op: Operation, mark: Mark) -> None:
        """Take an operation in place of an older one for the same document."""
        before = self.ops.get(op.id)
        if before is not None and before.version > op.version:
            return
        if isinstance(op, Put):
            self.size += len(op.doc)
        self.ops[op.id] = op
        self.marks[op.id] = mark


class Refusal(NamedTuple):
    """An operation that the engine will never take, and why (scrubbed)."""

    op: Operation
    problem: Problem
    reason: str


class Tally(msgspec.Struct):
    """What bulks have done. `exact` is false once an answer was lost: then `created` may be too low."""

    written: int = 0
    created: int = 0
    deleted: int = 0
    stale: int = 0
    refused: int = 0
    exact: bool = True


async def remove_impostor(engine: Engine, alias: str) -> bool:
    """Remove an index that has a write alias' name: a delete that came after the alias' own index was gone made it.

    Returns:
        Whether there was one.
    """
    there = alias in await engine.indexes(alias)
    if there:
        log.get().warning("index removed", physical=alias, why="a delete made it in place of its write alias")
        await engine.delete(alias)
    return there


class Sender:
    """Sends operations to one write alias and keeps the tally.

    `require_alias` keeps a write from making an index of the alias' name, but engines let a delete make one where the
    alias is gone: each answer says which index took it, and one that was made so is removed at once.

    Args:
        physical: the index behind the alias.
        learn: called with the documents that have fields which the mapping lacks; whether it could add some.
    """

    def __init__(
        self,
        engine: Engine,
        alias: str,
        learn: Callable[[list[Put]], Awaitable[bool]],
        *,
        tally: Tally,
        physical: str = "",
    ) -> None:
        self._engine = engine
        self._physical = physical
        self._alias = alias
        self._learn = learn
        self.tally = tally

    async def send(self, ops: Sequence[Operation]) -> tuple[list[Refusal], list[str]]:
        """Send until all are answered: what was refused for good, and the ids where something newer stands.

        Raises:
            IndexMismatch: the write alias is gone.
            ServerRefused: credentials or privileges.
        """
        refusals: list[Refusal] = []
        stale: list[str] = []
        taught = False
        left = list(ops)
        while left:
            answers = await self._answers(left)
            # Some engines name the alias in an error: only an index that is there counts.
            if any(i.index == self._alias for i in answers) and await remove_impostor(self._engine, self._alias):
                raise self._lost()
            if self._physical and any(
                item.index not in ("", self._physical)
                for item in answers
                if not item.error and item.index != self._alias
            ):
                raise self._lost()
            again: list[Operation] = []
            unknown: list[tuple[Put, Problem]] = []
            why = ""
            for op, item in zip(left, answers, strict=True):
                if item.error is None:
                    self._count(item)
                elif item.error.type == _CONFLICT:
                    self.tally.stale += 1
                    stale.append(op.id)
                elif item.error.type in _GONE:
                    raise self._lost()
                elif item.status == 429 or item.status >= 500 or item.error.type == _BLOCKED:
                    again.append(op)
                    why = f"refusing writes for now ({item.error.type})"
                elif item.status in (401, 403):
                    raise ServerRefused(
                        f"the search engine at {self._engine.where} refuses writes to {self._alias}"
                        f" ({scrub(item.error)})",
                        "grant the index's role the privilege to write to it",
                    )
                elif isinstance(op, Put) and item.error.type == UNKNOWN_FIELD and not taught:
                    unknown.append((op, item.error))
                else:
                    refusals.append(Refusal(op, item.error, scrub(item.error)))
            if unknown:
                taught = True
                if await self._learn([op for op, _ in unknown]):
                    again += [op for op, _ in unknown]
                else:
                    refusals += [Refusal(op, problem, scrub(problem)) for op, problem in unknown]
            if why:
                await self._engine.pause(why)
            left = again
        self.tally.refused += len(refusals)
        return refusals, stale

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
                return await self._engine.bulk(self._alias, body)
            except Unavailable:
                self.tally.exact = False
                raise

        try:
            return await self._engine.patiently(attempt)
        except EngineError as error:
            if error.status == 404:
                raise self._lost() from None
            if error.status not in (400, 413):
                raise
            if len(ops) == 1:
                return [Item(error.status, error=Problem(error.kind or f"status {error.status}"))]
        half = len(ops) // 2
        return await self._answers(ops[:half]) + await self._answers(ops[half:])

    def _lost(self) -> IndexMismatch:
        return IndexMismatch(
            f"the write alias {self._alias} is gone or not the bridge's in the search engine at {self._engine.where}",
            f"build the index anew: bridge reindex {self._alias.rsplit('-', 2)[0]}",
        )
