"""`python -m tests.crash_index`: many seeds, a line for each, and a line of totals at the end.

Each of `--jobs` workers has servers of its own and uses them for one scenario after another. A seed that fails is
named with all that is needed to run it again; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator

import anyio

from bridge import log
from tests.crash.tally import Tally, say
from tests.crash_index import scenario
from tests.crash_index.world import ENGINES, QUICK, Servers, servers


async def main(first: int, seeds: int, jobs: int, engines: tuple[str, ...]) -> Tally:
    """Run them all."""
    tally = Tally("documents", f"make crash WHAT=index ENGINE={engines[0] if len(engines) == 1 else 'both'}")
    coming = iter(range(first, first + seeds))
    async with anyio.create_task_group() as tasks:
        for _ in range(min(jobs, seeds)):
            tasks.start_soon(worker, coming, engines, tally)
    return tally


async def worker(coming: Iterator[int], engines: tuple[str, ...], tally: Tally) -> None:
    """One seed after another; after a failure on new servers, so that it spoils no later one."""
    for seed in coming:
        async with servers() as mine:
            good = await one(seed, engines, mine, tally)
            while good and (following := next(coming, None)) is not None:
                good = await one(following, engines, mine, tally)


async def one(seed: int, engines: tuple[str, ...], mine: Servers, tally: Tally) -> bool:
    plan = scenario.planned(seed, engines)
    try:
        outcome = await scenario.run(mine, plan)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this seed's failure
        tally.lost(seed, plan, error)
        return False
    tally.passed(seed, outcome.documents, outcome.faults, outcome.seconds)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.crash_index", description="Kill, compare, and tell.")
    parser.add_argument("--seeds", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: a random one)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time, each on its own servers (default 1)")
    parser.add_argument("--engine", choices=[*ENGINES, QUICK, "both"], default="both", help="default: the seed chooses")
    chosen = parser.parse_args()
    first = chosen.seed or random.randrange(1, 10**6)
    log.configure()  # what the suite's own connections meet is no news
    say(f"seeds {first} to {first + chosen.seeds - 1}, {chosen.jobs} at a time")
    engines = tuple(ENGINES) if chosen.engine == "both" else (chosen.engine,)
    done = anyio.run(main, first, chosen.seeds, chosen.jobs, engines, backend_options={"use_uvloop": True})
    done.total()
    sys.exit(1 if done.failed else 0)
