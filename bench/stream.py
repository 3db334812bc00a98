"""How fast a backlog gets from PostgreSQL into the stream, what that costs, against `pg_recvlogical -f /dev/null`.

Per run first pg_recvlogical reads the backlog, then the bridge in each mode, each from a slot of its own at the same
place.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bench import workloads
from bench.ground import Figures, Yard, ground
from bench.result import Result, result
from bench.workloads import Workload

RATE = "rows/s ÷ pg_recvlogical -f /dev/null"
SIZES: dict[str, Callable[[float], Workload]] = {
    "tx1": lambda scale: workloads.messages(int(100_000 * scale), 1),
    "tx20": lambda scale: workloads.messages(int(200_000 * scale), 20),
    "tx1000": lambda scale: workloads.messages(int(200_000 * scale), 1000),
    "narrow": lambda scale: workloads.narrow(int(300_000 * scale), 20),
    "wide": lambda scale: workloads.wide(int(60_000 * scale), 20),
    "big": lambda scale: workloads.messages(rows := int(1_000_000 * scale), rows),
}


async def measure(size: str, modes: list[str], runs: int, scale: float, peaks: dict[str, float]) -> list[Result]:
    """Rates, processor times and memory of one size of transactions and rows, for each mode; `peaks` gets the largest
    RSS of each."""
    yards: list[Yard] = []
    figures: dict[str, list[Figures]] = {mode: [] for mode in modes}
    async with ground(modes) as here:
        backlog = await here.write(size, SIZES[size](scale), runs)
        for run in range(runs):
            yards.append(await here.recvlogical(backlog, run))
            for mode in modes:
                figures[mode].append(await here.bridge(backlog, mode, run))
    peaks |= {f"{mode}.{size}": max(f.rss for f in figures[mode]) for mode in modes}
    return [found for mode in modes for found in _results(f"stream.{mode}.{size}", figures[mode], yards)]


def _results(row: str, figures: list[Figures], yards: list[Yard]) -> list[Result]:
    cost = "µs of processor a row"
    return [
        result(row, RATE, [f.rate for f in figures], [y.rate for y in yards]),
        result(
            f"{row}.cpu.walsender",
            f"{cost} ÷ with pg_recvlogical",
            [f.walsender for f in figures],
            [y.walsender for y in yards],
        ),
        result(f"{row}.cpu.nats", cost, [f.nats for f in figures]),
        result(f"{row}.cpu.bridge", cost, [f.bridge for f in figures]),
        result(
            f"{row}.bound",
            "rows/s that these processor times allow two idle processors",
            [bound(f.walsender, f.nats, f.bridge) for f in figures],
        ),
        result(f"{row}.rss", "MB, the bridge's largest resident set", [f.rss for f in figures]),
    ]


def bound(*costs: float) -> float:
    """Rows a second of processes that each take so many microseconds of a processor a row and run beside each other on
    two processors: the costliest needs one for itself, all of them share both."""
    return 1e6 / max(*costs, sum(costs) / 2)


def memory(peaks: dict[str, float], runs: int) -> list[Result]:
    """The largest RSS of all that was measured."""
    if not peaks:
        return []
    worst = max(peaks, key=lambda size: peaks[size])
    one = result(
        "rss.stream", f"MB, the largest resident set over {len(peaks)} sizes and modes: {worst}", [peaks[worst]]
    )
    return [msgspec.structs.replace(one, runs=runs)]
