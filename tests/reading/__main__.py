"""`python -m tests.reading`: many seeds of snapshots that are taken while everything is written to."""

from __future__ import annotations

import sys

from tests.crash import seeds
from tests.crash.tally import Tally
from tests.reading import scenario

if __name__ == "__main__":
    chosen = seeds.parser("python -m tests.reading", seeds=20, jobs=2).parse_args()
    tally = Tally("events", "python -m tests.reading --seeds 1 --seed")
    sys.exit(seeds.go(chosen, tally, scenario.servers, scenario.planned, scenario.run))
