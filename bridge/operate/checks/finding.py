"""One thing that `bridge check` has looked at: what was seen, why it matters, and what mends it. Pure.

`catalogue` has every id. An id is stable: scripts may rely on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from bridge.operate.checks.catalogue import CATALOGUE

Level = Literal["ok", "warning", "error"]
RANKS: dict[Level, int] = {"error": 0, "warning": 1, "ok": 2}


class Fix(msgspec.Struct, frozen=True, omit_defaults=True):
    """What `--fix` would run: statements for PostgreSQL, or fields of a stream's configuration.

    runs: each step as an operator would type it; costs: what it does besides mending, empty where that is nothing;
    stream, fields: the stream that is edited, and how, where it is one.
    """

    runs: list[str]
    costs: str = ""
    stream: str = ""
    fields: dict[str, Any] = {}


class Finding(msgspec.Struct, frozen=True):
    """`about` is the table, stream, index or server that it concerns; of what is well only `what` says something."""

    id: str
    level: Level
    about: str
    what: str
    why: str = ""
    next: str = ""
    fix: Fix | None = None


def well(id: str, about: str, what: str) -> Finding:
    """Something that is as it should be."""
    assert id in CATALOGUE, id
    return Finding(id, "ok", about, what)


def warning(id: str, about: str, what: str, next: str, *, why: str = "", fix: Fix | None = None) -> Finding:
    """Something that works, but not for ever or not as well as it could; `why` by default as the catalogue says."""
    assert "w" in CATALOGUE[id].levels, id
    return Finding(id, "warning", about, what, why or CATALOGUE[id].why, next, fix)


def wrong(id: str, about: str, what: str, next: str, *, why: str = "", fix: Fix | None = None) -> Finding:
    """Something that keeps the bridge from its work, or from all of it."""
    assert "e" in CATALOGUE[id].levels, id
    return Finding(id, "error", about, what, why or CATALOGUE[id].why, next, fix)


class Checked(msgspec.Struct, frozen=True):
    """Everything that was looked at, the worst first and what is well last."""

    findings: list[Finding]

    def of(self, level: Level) -> list[Finding]:
        """Those of one level."""
        return [one for one in self.findings if one.level == level]

    @property
    def found(self) -> list[Finding]:
        """All that is not well."""
        return [one for one in self.findings if one.level != "ok"]

    @property
    def sound(self) -> bool:
        """Whether nothing is an error."""
        return not self.of("error")


def sorted_by_level(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, what is well last; else in the order of the catalogue."""
    places = {id: place for place, id in enumerate(CATALOGUE)}
    return sorted(findings, key=lambda one: (RANKS[one.level], places[one.id]))
