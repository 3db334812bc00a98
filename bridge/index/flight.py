"""Bulks on their way to the engine: a few at a time, a document in one unanswered bulk at a time, answers in order.

Operations gather in the current bulk, which is sent when it is full or when told to; `reached` is called with the place
up to which everything has been answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
import anyio.abc

from bridge import structured
from bridge.failpoints import reach
from bridge.index.bulk import Awaited, Bulk, Mark, Refusal, Sender
from bridge.index.document import Operation

IN_FLIGHT = 2


class Flight:
    """The bulks of one generation.

    Args:
        group: runs the bulks.
        refused: called for each operation that the engine will never take, before its bulk counts as answered.
        reached: called with how far everything has been answered.
    """

    def __init__(
        self,
        sender: Sender,
        group: anyio.abc.TaskGroup,
        *,
        refused: Callable[[Refusal, Mark], Coroutine[Any, Any, None]],
        reached: Callable[[Mark], Awaitable[None]],
    ) -> None:
        self._sender = sender
        self._group = group
        self._refused = refused
        self._reached = reached
        self._slots = anyio.Semaphore(IN_FLIGHT)
        self._flying: deque[Bulk] = deque()
        self._current = Bulk()

    @property
    def idle(self) -> bool:
        """Whether everything taken has been answered."""
        return not self._flying and self._current.last is None

    @property
    def full(self) -> bool:
        """Whether it is time to send the current bulk."""
        return self._current.full

    def __contains__(self, address: str) -> bool:
        return address in self._current or any(address in bulk for bulk in self._flying)

    def held(self, address: str) -> Operation | None:
        """The newest unanswered operation on a document; None where there is none."""
        for bulk in (self._current, *reversed(self._flying)):
            if address in bulk:
                return bulk.held(address)
        return None

    def add(self, op: Operation, mark: Mark) -> None:
        """Take an operation into the current bulk."""
        self._order(op.id)
        self._current.add(op, mark)

    def reject(self, reason: str, bury: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Take an event that can be no document: it is buried with the current bulk's answer."""
        self._current.rejected.append(Awaited(reason, bury))

    def add_later(self, op: Operation, mark: Mark, turn: int) -> None:
        """Take a delete that is sent when the rest of the current bulk has its answer: in turn 0, or 1 behind it."""
        self._order(op.id)
        self._current.add_later(op, mark, turn)

    def _order(self, address: str) -> None:
        for bulk in self._flying:
            if address in bulk.addresses and bulk not in self._current.after:
                self._current.after.append(bulk)

    def passed(self, mark: Mark) -> None:
        """Everything of the event at `mark` has been added."""
        self._current.last = mark

    async def flush(self) -> None:
        """Send what has gathered, once a place for a bulk is free."""
        bulk = self._current
        if bulk.last is None:
            return
        if not bulk.empty:
            await self._slots.acquire()
        self._current = Bulk()
        self._flying.append(bulk)
        if bulk.empty:
            bulk.done.set()
            await self._advance()
        else:
            self._group.start_soon(self._fly, bulk)

    async def settle(self) -> None:
        """Send what has gathered and wait until everything has been answered."""
        await self.flush()
        while self._flying:
            await self._flying[-1].done.wait()
            await self._advance()

    async def _fly(self, bulk: Bulk) -> None:
        try:
            for other in bulk.after:
                await other.done.wait()
            bulk.after.clear()
            reach("index.sending")
            for ops, rejected in ((bulk.ops, bulk.rejected), *((turn, []) for turn in bulk.later)):
                if ops or rejected:
                    if ops is not bulk.ops:
                        reach("index.moving")
                    refusals = await self._sender.deliver(list(ops.values()), [one.reason for one in rejected])
                    reach("index.sent")
                    async with structured.group() as letters:
                        for one in rejected:
                            letters.start_soon(one.bury)
                        for refusal in refusals:
                            letters.start_soon(self._refused, refusal, bulk.marks[refusal.op.id])
        finally:
            self._slots.release()
        bulk.done.set()
        await self._advance()

    async def _advance(self) -> None:
        mark = None
        while self._flying and self._flying[0].done.is_set():
            mark = self._flying.popleft().last
        if mark is not None:
            await self._reached(mark)
