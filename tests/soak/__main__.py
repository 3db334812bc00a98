"""`python -m tests.soak`: load and faults for minutes or hours, then a report; exit code 1 where anything differs or
grows."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import traceback
from pathlib import Path

import anyio

from bridge import log
from tests.crash.tally import say
from tests.crash_index.world import ENGINES, QUICK
from tests.soak.laps import Soaked, soak
from tests.soak.report import report
from tests.soak.world import servers

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Load and faults, and what grows.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="what the choices follow from (default: a random one)")
    parser.add_argument("--engine", choices=[*ENGINES, QUICK], default="opensearch", help="default: opensearch")
    parser.add_argument("--report", type=Path, help="a file for the report, besides standard output")
    asked = parser.parse_args()
    seed = asked.seed or random.randrange(1, 10**6)
    log.configure()  # what the soak's own connections meet is no news

    async def main() -> Soaked:
        async with servers() as mine:
            return await soak(mine, seed=seed, engine=asked.engine, seconds=asked.minutes * 60, say=say)

    say(f"seed {seed}, {asked.minutes:g} minutes, {asked.engine}")
    try:
        found = anyio.run(main, backend_options={"use_uvloop": True})
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the soak has found
        kept = Path(tempfile.mkdtemp(prefix="bridge-soak-failed-")) / "failure"
        kept.write_text("".join(traceback.format_exception(error)))
        say(f"FAILED: {type(error).__name__}: {str(error)[:1000]}\nwhat all said: {kept}")
        sys.exit(1)
    text = report(found)
    say(text)
    if asked.report is not None:
        asked.report.write_text(text)
    sys.exit(1 if found.grown else 0)
