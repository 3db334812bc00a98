"""The one place that waits and retries.

`forever` runs an action again and again while what it needs is away; it says so once, not per attempt, and says when
it is back. `patiently` bridges a short absence without a word. `until` polls a condition against a deadline.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from bridge import log
from bridge.errors import Unavailable

T = TypeVar("T")

# Of glibc alone (malloc_trim(3)).
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

FIRST = 0.25
LONGEST = 10.0
REMIND = 600.0
REASONS = 5
HOLDS_AFTER = 5.0


class Backoff:
    """Pauses that double from `first` to `longest` seconds, each with jitter so that many clients do not march in step.

    An outage is announced once, and its end once by `over`. Other reasons within the same outage are news, but each
    only once, and only some: two that take turns would fill the log. While it lasts, it is said again after `REMIND`
    seconds, then after twice as long each time.

    Args:
        says: whether an error is to be announced; none is where somebody beside says the same.
    """

    def __init__(
        self,
        what: str,
        *,
        first: float = FIRST,
        longest: float = LONGEST,
        says: Callable[[Unavailable], bool] = lambda _: True,
    ) -> None:
        self._what = what
        self._first = first
        self._longest = longest
        self._pause = first
        self._since: float | None = None
        self._says = says
        self._said: set[str] = set()
        self._remind = REMIND
        self._log = log.get()

    @property
    def waits(self) -> bool:
        """Whether there is an outage."""
        return self._since is not None

    async def wait(self, error: Unavailable) -> None:
        """Announce the outage if it is new, and pause."""
        if self._since is None:
            self._since = time.monotonic()
        lasted = time.monotonic() - self._since
        if not self._says(error):
            pass
        elif error.what not in self._said and len(self._said) < REASONS:
            self._said.add(error.what)
            self._log.warning("waiting", what=self._what, why=error.what, next=error.remedy)
        elif lasted >= self._remind:
            self._remind = 2 * lasted
            self._log.warning("still waiting", what=self._what, why=error.what, for_s=round(lasted), next=error.remedy)
        await anyio.sleep(max(error.pause, self._pause * random.uniform(0.5, 1.0)))
        self._pause = min(self._pause * 2, self._longest)

    def over(self) -> None:
        """The action works again: announce it if there was an outage, and start afresh."""
        if self._since is not None and self._said:
            self._log.info("back", what=self._what, after_s=round(time.monotonic() - self._since, 1))
        self._since, self._said, self._pause, self._remind = None, set(), self._first, REMIND


async def forever(what: str, action: Callable[[Backoff], Awaitable[T]], *, backoff: Backoff | None = None) -> T:
    """The result of `action`, tried again after every `Unavailable`; the action calls `over` once it works.

    Args:
        backoff: the pauses to go on with, where one `forever` runs within another: an outage is still said once.
    """
    backoff = backoff or Backoff(what)
    while True:
        began = time.monotonic()
        try:
            return await action(backoff)
        except Unavailable as error:
            holds = not backoff.waits or time.monotonic() - began > HOLDS_AFTER
            await backoff.wait(error)
        if holds:
            _give_back()


def _give_back() -> None:
    """Free what an attempt held that has worked or lasted, also for other processes.

    Its frames hold each other in cycles, and windows of rows with them; the collector seldom comes by (`console`). And
    glibc keeps what it is given back but for what lies at the end of its heap. The whole process stands still
    meanwhile, so that attempts which only find a server still away, and hold little, are left to the collector.
    """
    gc.collect()
    if _trim is not None:
        _trim(0)


async def patiently(
    action: Callable[[], Awaitable[T]], *, seconds: float, hopeless: Callable[[Unavailable], bool], pause: float = 0.1
) -> T:
    """The result of `action`, tried again after an `Unavailable` until `seconds` have passed: for what may be done
    twice, and is away for moments only (servers that elect a leader).

    Args:
        hopeless: whether trying again cannot help.

    Raises:
        Unavailable: the last try's.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await action()
        except Unavailable as error:
            if hopeless(error) or time.monotonic() > deadline:
                raise
        await anyio.sleep(pause)
        pause = min(pause * 2, 1.0)


async def until(
    condition: Callable[[], Awaitable[bool]], *, seconds: float, every: float = 0.05, at_last: float = 0.0
) -> bool:
    """Whether `condition` came true within `seconds`; asked again each `every` seconds.

    Args:
        at_last: a pause is a tenth of the time waited so far, up to these seconds (but `every` at least): a question
            that takes a connection of its own is not asked a hundred times a second for long.
    """
    began = time.monotonic()
    while not await condition():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        await anyio.sleep(max(every, min(waited / 10, at_last)))
    return True
