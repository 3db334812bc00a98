"""`python -m tests.crash`: many seeds, a line for each, and a line of totals at the end.

Each of `--jobs` workers has servers of its own and uses them for one scenario after another. A seed that fails is
named with all that is needed to run it again; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anyio

from bridge import log
from bridge.structured import significant
from tests.crash import scenario
from tests.crash.scenario import Outcome, Plan, planned
from tests.crash.world import Servers, servers


class Tally:
    """What all workers have done."""

    def __init__(self) -> None:
        self.seeds = 0
        self.events = 0
        self.faults: Counter[str] = Counter()
        self.failed: list[int] = []
        self._began = time.monotonic()

    def passed(self, plan: Plan, outcome: Outcome) -> None:
        """Count a seed and tell of it."""
        self.seeds += 1
        self.events += outcome.events
        self.faults += outcome.faults
        faults = ", ".join(f"{name}{f' ×{count}' if count > 1 else ''}" for name, count in outcome.faults.items())
        say(f"seed {plan.seed}: {outcome.events:,} events the same, {outcome.seconds:.1f} s: {faults}")

    def lost(self, plan: Plan, error: Exception) -> None:
        """Count a seed that failed, and keep what it left."""
        cause = significant(error) if isinstance(error, ExceptionGroup) else error
        self.seeds += 1
        self.failed.append(plan.seed)
        folder = Path(tempfile.mkdtemp(prefix=f"bridge-crash-failed-{plan.seed}-"))
        (folder / "failure").write_text(f"{plan}\n" + "".join(traceback.format_exception(error)))
        say(f"seed {plan.seed} FAILED: {type(cause).__name__}: {str(cause)[:1000]}")
        say(f"  {plan}")
        say(f"  again: make crash SEED={plan.seed} SEEDS=1    what the bridge said: {folder}/failure")

    def total(self) -> None:
        """The line of totals."""
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        say(
            f"{self.seeds} seeds, {len(self.failed)} failed, {self.events:,} events compared, "
            f"{self.faults.total()} faults in {time.monotonic() - self._began:.0f} s ({faults})"
        )
        if self.failed:
            say(f"failed: {' '.join(map(str, self.failed))}")


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def main(first: int, seeds: int, jobs: int) -> Tally:
    """Run them all."""
    tally = Tally()
    coming = iter(range(first, first + seeds))
    async with anyio.create_task_group() as tasks:
        for _ in range(min(jobs, seeds)):
            tasks.start_soon(worker, coming, tally)
    return tally


async def worker(coming: Iterator[int], tally: Tally) -> None:
    """One seed after another; after a failure on new servers, so that it spoils no later one."""
    for seed in coming:
        async with servers() as mine:
            good = await one(seed, mine, tally)
            while good and (following := next(coming, None)) is not None:
                good = await one(following, mine, tally)


async def one(seed: int, mine: Servers, tally: Tally) -> bool:
    plan = planned(seed)
    try:
        tally.passed(plan, await scenario.run(mine, plan))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this seed's failure
        tally.lost(plan, error)
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description="Kill, compare, and tell.")
    parser.add_argument("--seeds", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: a random one)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time, each on its own servers (default 2)")
    chosen = parser.parse_args()
    first = chosen.seed or random.randrange(1, 10**6)
    log.configure()  # what the suite's own connections meet is no news
    say(f"seeds {first} to {first + chosen.seeds - 1}, {chosen.jobs} at a time")
    done = anyio.run(main, first, chosen.seeds, chosen.jobs, backend_options={"use_uvloop": True})
    done.total()
    sys.exit(1 if done.failed else 0)
