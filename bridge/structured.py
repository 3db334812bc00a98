"""Task groups that raise one error: the most significant one, not a group of groups."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import anyio
from anyio.abc import TaskGroup

from bridge.errors import BridgeError, Unavailable


@contextlib.asynccontextmanager
async def group() -> AsyncIterator[TaskGroup]:
    """A task group. What its tasks raise comes out as one exception: an error that nobody expects before one that a
    person must answer, and that before one that passes by itself."""
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except BaseExceptionGroup as errors:
        raise significant(errors) from None


def significant(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception of a group that decides what happens next."""
    return min(_leaves(errors), key=_rank)


def _rank(error: BaseException) -> int:
    if isinstance(error, Unavailable):
        return 2
    return 1 if isinstance(error, BridgeError) else 0


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
