"""What must be reached: for some rows a least figure and an aim. Pure."""

from __future__ import annotations

from typing import Literal, NamedTuple

from bench.result import Result

Verdict = Literal["aim met", "met", "not met"]


class Budget(NamedTuple):
    """`least` and `aim` are of the row's ratio or its value; more is better where `aim` is larger."""

    of: Literal["ratio", "value"]
    least: float
    aim: float

    def verdict(self, found: Result) -> Verdict:
        """Whether the figure reaches the least, and the aim."""
        figure = found.ratio if self.of == "ratio" else found.value
        sign = 1 if self.aim > self.least else -1
        if sign * figure >= sign * self.aim:
            return "aim met"
        return "met" if sign * figure >= sign * self.least else "not met"


BUDGETS = {
    "stream.chain.tx1": Budget("ratio", 0.90, 1.2),
    "stream.chain.tx1000": Budget("ratio", 0.80, 1.0),
    "stream.batch.tx1": Budget("ratio", 0.80, 1.0),
    "stream.batch.tx1000": Budget("ratio", 0.60, 0.80),
    "latency.chain.500.p50": Budget("value", 3, 1.2),
    "latency.chain.500.p99": Budget("value", 15, 5),
    "latency.batch.500.p50": Budget("value", 10, 4),
    "latency.batch.500.p99": Budget("value", 50, 15),
    "rss.stream": Budget("value", 150, 90),
    "stream.tables1000": Budget("ratio", 1.15, 1.0),
    "snapshot.initial": Budget("ratio", 1.3, 2.0),
    "snapshot.limit": Budget("ratio", 0.6, 0.8),
    "snapshot.incremental": Budget("ratio", 0.4, 0.7),
    "rss.snapshot": Budget("value", 150, 90),
    "latency.snapshot.200.p99": Budget("value", 250, 50),
    "index.rebuild.opensearch": Budget("ratio", 0.60, 0.80),
    "index.rebuild.elasticsearch": Budget("ratio", 0.60, 0.80),
    "index.reader": Budget("value", 30_000, 60_000),
    "latency.index.100.p50": Budget("value", 50, 15),
    "latency.index.100.p99": Budget("value", 200, 60),
    "rss.index": Budget("value", 150, 90),
    "index.searcher": Budget("value", 0, 0),
}
