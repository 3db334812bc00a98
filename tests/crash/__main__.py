"""`python -m tests.crash`: many seeds of the log's scenarios; see `seeds`."""

from __future__ import annotations

import sys

from tests.crash import scenario, seeds
from tests.crash.tally import Tally
from tests.crash.world import servers

if __name__ == "__main__":
    chosen = seeds.parser("python -m tests.crash", seeds=20, jobs=2).parse_args()
    sys.exit(seeds.go(chosen, Tally("events", "make crash"), servers, scenario.planned, scenario.run))
