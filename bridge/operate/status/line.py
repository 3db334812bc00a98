"""A line to one server: a connection that stays open, over which the same question is asked again and again.

Whoever asks waits for the answer or the deadline and never for the connection: that is made, and made again, by `keep`
beside it. While it cannot be made, who asks is told why at once. One that breaks is made anew before the answer is
given up, so that a connection which somebody cut is no outage.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

import anyio

from bridge.errors import BridgeError, Unavailable
from bridge.waiting import Backoff, forever

T = TypeVar("T")

Opened = Callable[[], AbstractAsyncContextManager[Callable[[], Awaitable[T]]]]
"""Makes a connection, and gives what to ask with; raises BridgeError where it cannot be made."""

LONGEST = 1.0


class Late(Unavailable):
    """There is no answer yet, and there may be one."""


class _Question(Generic[T]):
    """One question: `told` once there is an answer, or an error."""

    def __init__(self) -> None:
        self.told = anyio.Event()
        self.answer: list[T] = []
        self.error: BridgeError | None = None


class Line(Generic[T]):
    """The line to `what`. One asks at a time.

    Args:
        seconds: a question that is not answered within that counts as an outage.
        wait: who asks waits no longer than this, and is then told that it is late.
    """

    def __init__(self, what: str, opened: Opened[T], seconds: float, wait: float = math.inf) -> None:
        self._what = what
        self._opened = opened
        self._seconds = seconds
        self._wait = min(seconds, wait)
        self._why: BridgeError | None = None
        self._there = False
        self._asked = anyio.Event()
        self._question: _Question[T] | None = None

    async def ask(self) -> T:
        """The answer; what was asked before and is not answered yet is not asked again.

        Raises:
            Late: it may still come.
            BridgeError: why there is none.
        """
        if self._why is not None:
            raise self._why
        question = self._question = self._question or _Question[T]()
        self._asked.set()
        with anyio.move_on_after(self._wait):
            await question.told.wait()
        if question.answer:
            return question.answer[0]
        if self._there and question.error is None and self._wait < self._seconds:
            raise Late(f"no answer within {self._wait:g} s", "waiting for it")
        error = question.error or self._silent(self._wait)
        if not self._there:
            # Whoever asks next need not wait for a connection that is not there after so long.
            self._why = error
        raise error

    async def keep(self) -> None:
        """Keep the connection, until cancelled."""
        backoff = Backoff(self._what, longest=LONGEST, says=lambda _: False)
        await forever(self._what, self._serve, backoff=backoff)

    async def _serve(self, backoff: Backoff) -> None:
        """Answer until the connection breaks; made anew at once where it has worked, else after a pause."""
        worked = True
        while worked:
            worked = False
            try:
                async with self._opened() as ask:
                    self._there, self._why = True, None
                    while True:
                        question = await self._next()
                        with anyio.fail_after(self._seconds):
                            question.answer.append(await ask())
                        self._told(question)
                        worked = True
                        backoff.over()
            except TimeoutError:
                self._there = False
                self._fail(self._silent(self._seconds))
            except BridgeError as error:
                self._there = False
                if not worked:
                    self._fail(error)
        raise Unavailable(f"{self._what} is away", "trying again")

    async def _next(self) -> _Question[T]:
        """The question that waits for an answer."""
        while self._question is None:
            await self._asked.wait()
            self._asked = anyio.Event()
        return self._question

    def _told(self, question: _Question[T]) -> None:
        if self._question is question:
            self._question = None
        question.told.set()

    def _fail(self, error: BridgeError) -> None:
        self._why = error
        if self._question is not None:
            self._question.error = error
            self._told(self._question)

    def _silent(self, seconds: float) -> BridgeError:
        return Unavailable(f"no answer within {seconds:g} s", "waiting for it")
