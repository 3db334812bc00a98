"""What the demo knows at this moment: its phases and its counters. Written by the tasks, shown by screen.py."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

State = Literal["waiting", "running", "done", "failed"]


@dataclass
class Phase:
    """One line of the show. `done` and `total` make a progress bar where `total` is not 0."""

    name: str
    text: str = ""
    unit: str = ""
    state: State = "waiting"
    done: int = 0
    total: int = 0
    started: float = 0.0
    seconds: float = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds that it has taken so far, or took."""
        return time.monotonic() - self.started if self.state == "running" else self.seconds


class Lag(NamedTuple):
    """A commit (at a monotonic time), and the seconds until a search found it."""

    committed: float
    seconds: float


class Lags(NamedTuple):
    """Of so many posts the median lag and the longest, in seconds."""

    posts: int
    median: float
    longest: float


@dataclass
class Writes:
    """What the writer has committed."""

    posts: int = 0
    edits: int = 0
    toasted: int = 0
    deletes: int = 0
    keys: int = 0
    others: int = 0
    transactions: int = 0

    @property
    def messages(self) -> int:
        """Changes of the messages table."""
        return self.posts + self.edits + self.deletes + self.keys


@dataclass
class Searches:
    """What the searcher has seen: how long each answer took, in seconds, and what came of the others."""

    failed: int = 0
    empty: int = 0
    times: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def answered(self) -> int:
        """How many there were."""
        return len(self.times)

    def copy(self) -> Searches:
        """The counts of now, to compare with later ones."""
        return Searches(self.failed, self.empty, self.times.copy())

    def since(self, before: Searches) -> Searches:
        """What came after `before`."""
        return Searches(self.failed - before.failed, self.empty - before.empty, self.times[before.answered :])

    @property
    def took(self) -> tuple[float, float] | None:
        """The median and the longest of the answers' seconds; None where there are none."""
        return (statistics.median(self.times), max(self.times)) if self.times else None


@dataclass
class Sample:
    """The hits of one search that both generations answer differently: the words that matched, marked with <em>.
    `before` and `after` count those just before the rebuild and just after it."""

    word: str = ""
    count: int = 0
    before: int | None = None
    after: int | None = None
    hits: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Board:
    """Everything that is shown. `unfound` counts the posts of which no search told within the time for that."""

    seconds: int
    phases: list[Phase]
    started: float = field(default_factory=time.monotonic)
    rows: int = 0
    events: int = 0
    rate: float = 0.0
    lags: list[Lag] = field(default_factory=list)
    unfound: int = 0
    rebuilding: tuple[float, float] | None = None
    writes: Writes = field(default_factory=Writes)
    searches: Searches = field(default_factory=Searches)
    during: Searches | None = None
    sample: Sample = field(default_factory=Sample)
    generation: str = ""

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def lag(self, *, rebuilding: bool | None = None) -> Lags | None:
        """The lags from commit to search hit; of commits during the rebuild or of the others where that is given. None
        where there are none."""
        begin, end = self.rebuilding or (math.inf, math.inf)
        found = [
            lag.seconds for lag in self.lags if rebuilding is None or rebuilding == (begin <= lag.committed <= end)
        ]
        return Lags(len(found), statistics.median(found), max(found)) if found else None

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)
