"""How the cost of a row grows with the number of tables, and the rate with the length of the backlog; in a chain.

All sizes lie in databases of one server and are read in turn, so that a ratio compares neighbours in time.
"""

from __future__ import annotations

from bench import workloads
from bench.ground import Figures, Yard, ground
from bench.result import Result, result
from bench.workloads import Workload

MODE = "chain"
FEW = 10
TABLES = (FEW, 100, 1000)
ROWS = 200_000
SHORT, LONG = 100_000, 3_000_000


async def tables(counts: list[int], runs: int, scale: float) -> list[Result]:
    """Cost of a row at each number of tables, over that at ten."""
    loads = {f"tables{n}": workloads.tables(n, int(ROWS * scale)) for n in {FEW, *counts}}
    figures, yards = await _read(loads, runs)
    found: list[Result] = []
    for count in counts:
        row = f"stream.tables{count}"
        at, yard = figures[f"tables{count}"], yards[f"tables{count}"]
        few, few_yard = figures[f"tables{FEW}"], yards[f"tables{FEW}"]
        if count == FEW:
            found.append(result(row, "µs a row ÷ pg_recvlogical's", _costs(at), _costs(yard)))
            continue
        found += [
            result(row, f"µs a row ÷ at {FEW} tables", _costs(at), _costs(few)),
            *(
                result(
                    f"{row}.cpu.{name}",
                    f"µs of processor a row ÷ at {FEW} tables",
                    [float(getattr(f, name)) for f in at],
                    [float(getattr(f, name)) for f in few],
                )
                for name in ("walsender", "nats", "bridge")
            ),
            result(f"{row}.recvlogical", f"pg_recvlogical: µs a row ÷ at {FEW} tables", _costs(yard), _costs(few_yard)),
            result(
                f"{row}.start",
                f"s from the start of the process to the first message ÷ at {FEW} tables",
                [f.start for f in at],
                [f.start for f in few],
            ),
        ]
    return found


async def backlog(runs: int, scale: float) -> list[Result]:
    """The rate at a long backlog over that at a short one, for the bridge and for pg_recvlogical."""
    sizes = {"short": int(SHORT * scale), "long": int(LONG * scale)}
    figures, yards = await _read({name: workloads.messages(rows, 20) for name, rows in sizes.items()}, runs)
    unit = f"rows/s at {sizes['long']:,} changes ÷ at {sizes['short']:,}"
    return [
        result(
            "stream.backlog",
            unit,
            [f.rate for f in figures["long"]],
            [f.rate for f in figures["short"]],
        ),
        result(
            "stream.backlog.recvlogical",
            f"pg_recvlogical: {unit}",
            [y.rate for y in yards["long"]],
            [y.rate for y in yards["short"]],
        ),
        result(
            "stream.backlog.rss",
            "MB, the bridge's largest resident set ÷ at the short one",
            [f.rss for f in figures["long"]],
            [f.rss for f in figures["short"]],
        ),
    ]


async def _read(loads: dict[str, Workload], runs: int) -> tuple[dict[str, list[Figures]], dict[str, list[Yard]]]:
    figures: dict[str, list[Figures]] = {name: [] for name in loads}
    yards: dict[str, list[Yard]] = {name: [] for name in loads}
    async with ground([MODE]) as here:
        written = {name: await here.write(name, load, runs) for name, load in loads.items()}
        for run in range(runs):
            for name, load in written.items():
                yards[name].append(await here.recvlogical(load, run))
                figures[name].append(await here.bridge(load, MODE, run))
    return figures, yards


def _costs(found: list[Figures] | list[Yard]) -> list[float]:
    return [1e6 / one.rate for one in found]
