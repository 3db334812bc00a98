"""Many seeds in a row, a line for each, and a line of totals at the end: what the commands of all such suites share.

Each of `--jobs` workers has servers of its own and uses them for one scenario after another; after a failure it takes
new ones. A seed that fails is named with all that is needed to run it again; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import anyio

from bridge import log
from tests.crash.tally import Outcome, Tally, say

S = TypeVar("S")
P = TypeVar("P")


def parser(prog: str, *, seeds: int, jobs: int) -> argparse.ArgumentParser:
    """The options that all have, with their defaults."""
    found = argparse.ArgumentParser(prog=prog, description="Kill, compare, and tell.")
    found.add_argument("--seeds", type=int, default=seeds, help=f"how many (default {seeds})")
    found.add_argument("--seed", type=int, default=0, help="the first one (default: a random one)")
    found.add_argument(
        "--jobs", type=int, default=jobs, help=f"how many at a time, each on its own servers (default {jobs})"
    )
    return found


def go(
    chosen: argparse.Namespace,
    tally: Tally,
    servers: Callable[[], AbstractAsyncContextManager[S]],
    planned: Callable[[int], P],
    run: Callable[[S, P], Awaitable[Outcome]],
) -> int:
    """Run the seeds that were chosen; the exit code."""
    first = chosen.seed or random.randrange(1, 10**6)
    log.configure()  # what the suite's own connections meet is no news
    say(f"seeds {first} to {first + chosen.seeds - 1}, {chosen.jobs} at a time")

    async def one(seed: int, mine: S) -> bool:
        plan = planned(seed)
        try:
            outcome = await run(mine, plan)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this seed's failure
            tally.lost(seed, plan, error)
            return False
        tally.passed(seed, outcome)
        return True

    async def worker(coming: Iterator[int]) -> None:
        for seed in coming:
            async with servers() as mine:
                good = await one(seed, mine)
                while good and (following := next(coming, None)) is not None:
                    good = await one(following, mine)

    async def main() -> None:
        coming = iter(range(first, first + chosen.seeds))
        async with anyio.create_task_group() as tasks:
            for _ in range(min(chosen.jobs, chosen.seeds)):
                tasks.start_soon(worker, coming)

    anyio.run(main, backend_options={"use_uvloop": True})
    tally.total()
    return 1 if tally.failed else 0
