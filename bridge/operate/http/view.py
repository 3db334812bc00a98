"""What the page may see of a status: names, states, counts, times; never a row's value or key. Pure.

Each field is named here: what a status gets later is not on the page by itself. `Again` (a table that is being read
once more) has keys and a condition with values in it; of that only its progress is shown.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.operate.status.history import History, Sample
from bridge.operate.status.parts import Index, Process, Status, Table
from bridge.stream.state import Again


def state(found: Status, last: Sample | None, *, actions: bool, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything but tables and history."""
    kept = found.checkpoint
    return {
        "source": found.source,
        "at": found.at,
        "in_step": found.in_step,
        "actions": actions,
        "jobs": jobs,
        "findings": [msgspec.to_builtins(finding) for finding in found.findings],
        "away": found.away,
        "away_since": found.away_since,
        "process": _process(found.process),
        "slot": msgspec.to_builtins(found.slot),
        "checkpoint": None
        if kept is None
        else {"lsn": kept.lsn, "seq": kept.stream_seq, "phase": kept.phase, "at": kept.at, "age": kept.age},
        "stream": msgspec.to_builtins(found.stream),
        "lag": msgspec.to_builtins(found.lag),
        "rates": msgspec.to_builtins(found.rates),
        "publishing": found.publishing,
        "publishing_why": found.publishing_why,
        "sync": found.settings.sync,
        "durability": found.durability,
        "rebuild": found.rebuild,
        "indexes": [_index(one) for one in found.indexes],
        "sample": _sample(last) if last is not None else None,
    }


def tables(found: Status) -> list[dict[str, Any]]:
    """Each table; those that are being read first."""
    listed = [_table(one) for one in found.tables]
    return sorted(listed, key=lambda one: (one["state"] == "done" and one["again"] is None, one["name"]))


def history(past: History) -> list[dict[str, Any]]:
    """The samples of the last minutes, oldest first."""
    return [_sample(one) for one in past]


def _sample(one: Sample) -> dict[str, Any]:
    return {
        "at": round(one.at, 3),
        "lag": one.lag_seconds,
        "lag_bytes": one.lag_bytes,
        "wal": one.wal,
        "events": one.events,
        "retained": one.retained,
        "behind": one.behind,
    }


def _process(one: Process) -> dict[str, Any]:
    return {
        "state": one.state,
        "who": one.who,
        "epoch": one.epoch,
        "since": one.since,
        "standby": _standby(one),
    }


def _standby(one: Process | Index) -> list[dict[str, str]]:
    return [{"who": other.who, "since": other.since, "why": other.why} for other in one.standby]


def _table(one: Table) -> dict[str, Any]:
    return {
        "name": one.name,
        "state": one.state,
        "rows": one.rows,
        "estimate": one.estimate,
        "rebuild_from": one.rebuild_from,
        "why": one.why,
        "error": one.error,
        "rate": one.rate,
        "eta": one.eta,
        "again": _again(one.again) if one.again is not None else None,
    }


def _again(one: Again) -> dict[str, Any]:
    return {
        "state": one.state,
        "why": one.why,
        "part_of_rows": bool(one.where),
        "rows": one.rows,
        "estimate": one.estimate,
        "rate": one.rate,
        "eta": one.eta,
    }


def _index(one: Index) -> dict[str, Any]:
    return {
        "name": one.name,
        "alias": one.alias,
        "state": one.state,
        "reader": one.reader,
        "silent": one.silent.who if one.silent is not None else "",
        "standby": _standby(one),
        "builder": one.builder,
        "engine": msgspec.to_builtins(one.engine),
        "astray": one.astray.why if one.astray is not None else "",
        "gone": one.astray is not None and one.astray.gone,
        "changed": one.changed,
        "dead": one.dead,
        "past": one.past,
        "generations": [msgspec.to_builtins(generation) for generation in one.generations],
    }
