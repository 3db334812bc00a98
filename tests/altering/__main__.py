"""`python -m tests.altering`: many seeds of a table that is altered between its changes; see `tests.crash.seeds`."""

from __future__ import annotations

import sys

from tests.altering import scenario
from tests.crash import seeds
from tests.crash.tally import Tally
from tests.reading.scenario import servers

if __name__ == "__main__":
    chosen = seeds.parser("python -m tests.altering", seeds=20, jobs=2).parse_args()
    tally = Tally("changes", "make crash WHAT=altering")
    sys.exit(seeds.go(chosen, tally, servers, scenario.planned, scenario.run))
