"""`python -m tests.crash_index`: many seeds of the indexes' scenarios; see `tests.crash.seeds`."""

from __future__ import annotations

import sys

from tests.crash import seeds
from tests.crash.tally import Tally
from tests.crash_index import scenario
from tests.crash_index.world import ENGINES, QUICK, servers

if __name__ == "__main__":
    parser = seeds.parser("python -m tests.crash_index", seeds=10, jobs=1)
    parser.add_argument("--engine", choices=[*ENGINES, QUICK, "both"], default="both", help="default: the seed chooses")
    chosen = parser.parse_args()
    engines = tuple(ENGINES) if chosen.engine == "both" else (chosen.engine,)
    tally = Tally("documents", f"make crash WHAT=index ENGINE={chosen.engine}")
    sys.exit(seeds.go(chosen, tally, servers, lambda seed: scenario.planned(seed, engines), scenario.run))
