"""Writers that go on, whatever happens to their server, until told to stop; their choices follow from a seed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Self

import anyio
import psycopg

from tests.running import session


class Writers:
    """Several connections that each commit one script after another.

    Args:
        scripts: the next ones of a writer, each sent as one command.
        enough: after so many commits in all the pause between two is up to `late` seconds instead of `soon`.
    """

    def __init__(
        self,
        dsn: str,
        seed: int,
        scripts: Callable[[random.Random], Sequence[str]],
        *,
        count: int,
        enough: int,
        soon: float,
        late: float,
    ) -> None:
        self._dsn = dsn
        self._seed = seed
        self._scripts = scripts
        self._count = count
        self._enough = enough
        self._pauses = (soon, late)
        self._stopping = anyio.Event()
        self.transactions = 0

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Self]:
        """They write for as long as the block lasts; its end waits for what they are at."""
        async with anyio.create_task_group() as tasks:
            for number in range(self._count):
                tasks.start_soon(self._writer, random.Random(f"{self._seed}/writer {number}"))
            yield self
            self.stop()

    def stop(self) -> None:
        """Let each writer end the transaction that it is in."""
        self._stopping.set()

    async def _writer(self, choose: random.Random) -> None:
        while not self._stopping.is_set():
            # A connection for each transaction would cost more than the transaction.
            try:
                async with session(self._dsn) as ask:
                    while not self._stopping.is_set():
                        await ask(*self._scripts(choose))
                        self.transactions += 1
                        await self._rest(choose)
            except (psycopg.errors.UniqueViolation, psycopg.errors.CheckViolation):
                pass
            except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                pass  # the other writer was at the same rows, or has moved one to another partition
            except psycopg.OperationalError:
                await anyio.sleep(0.05)  # the server is down: a later try finds it up
            await self._rest(choose)

    async def _rest(self, choose: random.Random) -> None:
        await anyio.sleep(choose.uniform(0, self._pauses[self.transactions >= self._enough]))
