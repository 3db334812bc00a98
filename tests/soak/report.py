"""What a soak has come to, as Markdown."""

from __future__ import annotations

from tests.soak.laps import Soaked
from tests.soak.leaks import Held, stay


def report(found: Soaked) -> str:
    """The whole report."""
    laps = found.laps
    faults = ", ".join(f"{name} {count}" for name, count in sorted(found.done.items()))
    lines = [
        f"# Soak: {found.seconds / 60:.0f} minutes, seed {found.seed}, {found.engine}",
        "",
        f"{len(laps)} laps, the first {found.staying} with kills of bridge and readers. "
        f"{sum(lap.transactions for lap in laps):,} transactions, {sum(lap.events for lap in laps):,} events and "
        f"{sum(lap.documents for lap in laps):,} documents compared, 0 differences; {found.large} rows in the object "
        "store, as many as the log refers to; no consumer, generation or alias too many.",
        "",
        f"{sum(found.done.values())} faults and commands: {faults}.",
        "",
        "At rest, at the end of each lap without kills (first, least, most, last):",
        "",
        "| | memory MB | descriptors | threads | tasks |",
        "|---|---|---|---|---|",
        *(_row(name, [lap.held[name] for lap in laps[found.staying :]]) for name in laps[0].held),
        "",
        f"Connections to PostgreSQL: {_span([lap.backends for lap in laps])}.",
        "",
        *(f"- {text}" for text in found.grown or ["Nothing has grown."]),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, held: list[Held]) -> str:
    kept = stay(held)
    if not kept:
        return f"| {name} | | | | |"
    memory = _span([one.memory >> 20 for one in kept])
    counts = [_span([getattr(one, name) for one in kept]) for name in ("descriptors", "threads", "tasks")]
    return f"| {name}, {len(kept)} laps | {' | '.join([memory, *counts])} |"


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]}, {min(numbers)}, {max(numbers)}, {numbers[-1]}"
