"""What can happen to a world: faults by their names, entered where they are written, and chosen by their weights."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

import anyio

W = TypeVar("W")
Happen = Callable[[W, random.Random], Awaitable[None]]


class Fault(NamedTuple, Generic[W]):
    """`weight`: how often it is chosen among all."""

    part: str
    happen: Happen[W]
    weight: int


class Faults(dict[str, Fault[W]]):
    """The faults of one kind of world."""

    def fault(self, part: str, weight: int = 2) -> Callable[[Happen[W]], Happen[W]]:
        """Enter a function as the fault of its name."""

        def enter(happen: Happen[W]) -> Happen[W]:
            self[happen.__name__] = Fault(part, happen, weight)
            return happen

        return enter


async def moment(choose: random.Random, longest: float) -> None:
    """Some time: nothing is waited for, what follows may hit anything."""
    await anyio.sleep(choose.uniform(0, longest))
