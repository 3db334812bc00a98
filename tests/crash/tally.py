"""What the seeds of a run have come to: a line for each, and a line of totals."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bridge.structured import significant


class Outcome(NamedTuple):
    """How much of a seed was `compared`, and how often each kind of fault happened."""

    compared: int
    faults: Counter[str]
    seconds: float


class Tally:
    """What all workers have done.

    Args:
        what: what is compared, in the plural.
        again: the command that runs a seed again, without the seed.
    """

    def __init__(self, what: str, again: str) -> None:
        self.seeds = 0
        self.compared = 0
        self.faults: Counter[str] = Counter()
        self.failed: list[int] = []
        self._what = what
        self._again = again
        self._began = time.monotonic()

    def passed(self, seed: int, outcome: Outcome) -> None:
        """Count a seed and tell of it."""
        self.seeds += 1
        self.compared += outcome.compared
        self.faults += outcome.faults
        faults = ", ".join(f"{name}{f' ×{count}' if count > 1 else ''}" for name, count in outcome.faults.items())
        say(f"seed {seed}: {outcome.compared:,} {self._what} the same, {outcome.seconds:.1f} s: {faults}")

    def lost(self, seed: int, plan: object, error: Exception) -> None:
        """Count a seed that failed, and keep what it left."""
        cause = significant(error) if isinstance(error, ExceptionGroup) else error
        self.seeds += 1
        self.failed.append(seed)
        folder = Path(tempfile.mkdtemp(prefix=f"bridge-crash-failed-{seed}-"))
        (folder / "failure").write_text(f"{plan}\n" + "".join(traceback.format_exception(error)))
        say(f"seed {seed} FAILED: {type(cause).__name__}: {str(cause)[:1000]}")
        say(f"  {plan}")
        say(f"  again: {self._again} SEED={seed} SEEDS=1    what all said: {folder}/failure")

    def total(self) -> None:
        """The line of totals."""
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        say(
            f"{self.seeds} seeds, {len(self.failed)} failed, {self.compared:,} {self._what} compared, "
            f"{self.faults.total()} faults in {time.monotonic() - self._began:.0f} s ({faults})"
        )
        if self.failed:
            say(f"failed: {' '.join(map(str, self.failed))}")


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
