"""`python -m bench [--only rows] [--runs n] [--scale x] [--json file]`: run the benchmarks, print one table beside the
budgets, write a list of results.

Each result is {row, value, yardstick, ratio, unit, runs, spread}, as bench/result.py says. What was measured before an
interruption or beside a failure is printed and written, too; the exit code then is 130 or 1.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from pathlib import Path

import anyio
import msgspec
import structlog
from rich.console import Console

from bench import show
from bench.result import Result
from bench.rows import Measurement, choose, measurements

FAILED, INTERRUPTED = 1, 130


class Outcome:
    """What a run has found so far."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.code = 0


async def run(chosen: list[tuple[Measurement, list[str]]], outcome: Outcome) -> None:
    """One measurement after the other, so that none disturbs another; SIGINT and SIGTERM end the one that runs, and
    its servers with it."""
    async with anyio.create_task_group() as tasks:

        async def interrupted() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    outcome.code = INTERRUPTED
                    tasks.cancel_scope.cancel()

        tasks.start_soon(interrupted)
        for measurement, rows in chosen:
            say(f"measuring {', '.join(rows)} …")
            try:
                outcome.results += await measurement.measure(rows)
            except Exception:  # noqa: BLE001 - the others can still be measured; it is told, and the exit code says so
                say(f"{', '.join(rows)} failed:\n{traceback.format_exc()}")
                outcome.code = FAILED
        tasks.cancel_scope.cancel()


def say(text: str) -> None:
    """What goes on, on stderr."""
    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


def main() -> int:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure against a yardstick taken in the same run.")
    parser.add_argument("--only", default="", help="comma-separated rows, or their beginnings up to a dot")
    parser.add_argument("--runs", type=int, default=3, help="how often each is measured; medians are shown")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual sizes; 0.1 for a quick look")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.runs < 1 or options.scale <= 0:
        parser.error("--runs and --scale must be above zero")
    try:
        only = [part.strip() for part in options.only.split(",") if part.strip()]
        chosen = choose(measurements(options.runs, options.scale), only)
    except ValueError as error:
        parser.error(str(error))
    # The bridges that run in this process say nothing but what goes wrong.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    outcome = Outcome()
    anyio.run(run, chosen, outcome, backend_options={"use_uvloop": True})
    show.results(outcome.results)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(outcome.results), indent=2) + b"\n")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
