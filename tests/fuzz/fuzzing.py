"""The loop: change an input that is known, see what becomes of it, keep it where that is something new.

What becomes of an input is told by a target's `check`: a short text (what kind of value came out, or which error and
from which line). That stands in for coverage, which would cost more than the parsers. Everything that `check` raises is
a finding.
"""

from __future__ import annotations

import random
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.mutate import mutated

KEPT = 2_000
PACKAGE = str(Path(__file__).parents[2] / "bridge")


class Target(NamedTuple):
    """One parser.

    check: reads the bytes; says what became of them; raises whatever a user must never see.
    samples: real inputs; tokens: words that mean something to the parser.
    """

    name: str
    check: Callable[[bytes], str]
    samples: Sequence[bytes]
    tokens: Sequence[bytes] = ()


class Finding(NamedTuple):
    """An input that broke a target, and how."""

    target: str
    data: bytes
    error: str

    @property
    def kind(self) -> str:
        """Which error it is, and from which line."""
        return f"{re.findall(r'line [0-9]+', self.error)[-1:]} {self.error.strip().splitlines()[-1].split(':')[0]}"


def outcome(call: Callable[[], object], *allowed: type[BaseException]) -> str:
    """What a call gives: the kind of its value, or an allowed error and the line of the package that it came from."""
    try:
        return type(call()).__name__
    except allowed as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in frame.filename]
        return f"{type(error).__name__} {lines[-1:]}"


def tried(target: Target, data: bytes) -> tuple[str, Finding | None]:
    """What becomes of one input."""
    try:
        return target.check(data), None
    except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
        return "", Finding(target.name, data, traceback.format_exc(limit=-6))


def fuzz(target: Target, seed: int, *, rounds: int = 0, seconds: float = 0) -> Iterator[tuple[int, Finding | None]]:
    """Rounds of one target, as many or as long as is said; yields their count, and what was found."""
    chance = random.Random(seed)
    known: dict[str, bytes] = {}
    pool = list(target.samples)
    until = time.monotonic() + seconds
    for count, data in enumerate(target.samples):
        yield count, tried(target, data)[1]
    count = len(pool)
    while count < rounds or time.monotonic() < until:
        data = mutated(chance, chance.choice(pool), pool, target.tokens)
        became, finding = tried(target, data)
        count += 1
        yield count, finding
        if became not in known and len(pool) < KEPT:
            known[became] = data
            pool.append(data)
