"""Trying again for a while."""

from __future__ import annotations

import gc
import weakref

import pytest

from bridge.errors import ServerRefused, Unavailable
from bridge.waiting import Backoff, forever, patiently, until

pytestmark = pytest.mark.anyio


class Flaky:
    """Fails so many times."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left = failures
        self.error = error
        self.asked = 0

    async def __call__(self) -> str:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "done"


def never(_: Unavailable) -> bool:
    return False


async def test_what_is_away_for_a_moment_is_asked_again() -> None:
    flaky = Flaky(3, Unavailable("away", "waiting"))
    assert await patiently(flaky, seconds=60, hopeless=never, pause=0.001) == "done"
    assert flaky.asked == 4


async def test_what_stays_away_is_given_up() -> None:
    with pytest.raises(Unavailable):
        await patiently(Flaky(1000, Unavailable("away", "waiting")), seconds=0.05, hopeless=never, pause=0.001)


async def test_what_cannot_get_better_is_not_asked_again() -> None:
    flaky = Flaky(3, Unavailable("gone", "waiting"))
    with pytest.raises(Unavailable):
        await patiently(flaky, seconds=60, hopeless=lambda error: error.what == "gone", pause=0.001)
    assert flaky.asked == 1


async def test_a_refusal_is_not_asked_again() -> None:
    flaky = Flaky(3, ServerRefused("no", "ask"))
    with pytest.raises(ServerRefused):
        await patiently(flaky, seconds=60, hopeless=never, pause=0.001)
    assert flaky.asked == 1


async def test_a_condition_that_takes_long_is_asked_more_and_more_seldom() -> None:
    asked = 0

    async def counted() -> bool:
        nonlocal asked
        asked += 1
        return False

    assert not await until(counted, seconds=0.5, every=0.001, at_last=0.05)
    assert 5 < asked < 100


async def test_a_condition_that_comes_true_ends_the_waiting() -> None:
    answers = iter([False, False, True])

    async def told() -> bool:
        return next(answers)

    assert await until(told, seconds=60, every=0.001)


async def test_what_an_attempt_held_is_gone_before_the_next_one() -> None:
    class Window:
        """Held by a frame that its own exception holds."""

    held: list[weakref.ref[Window]] = []

    async def attempt(_: Backoff) -> int:
        if not held:
            window = Window()
            held.append(weakref.ref(window))
            error = Unavailable("away", "waiting")
            raise error
        return sum(found() is not None for found in held)

    gc.disable()
    try:
        assert await forever("test", attempt, backoff=Backoff("test", first=0.001)) == 0
    finally:
        gc.enable()


async def test_an_outage_stops_the_process_once_and_not_at_each_attempt() -> None:
    whole = 0
    attempts = iter(range(20))

    def collected(phase: str, about: dict[str, int]) -> None:
        nonlocal whole
        whole += phase == "start" and about["generation"] == 2

    async def attempt(backoff: Backoff) -> None:
        number = next(attempts)
        if number in (0, 10):
            backoff.over()
        if number < 19:
            raise Unavailable("away", "waiting")

    gc.disable()
    gc.callbacks.append(collected)
    try:
        await forever("test", attempt, backoff=Backoff("test", first=0.001, longest=0.001))
    finally:
        gc.callbacks.remove(collected)
        gc.enable()
    assert whole == 2
