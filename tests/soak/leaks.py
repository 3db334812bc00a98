"""What a process holds when everything rests, and whether that has grown. `grown` does no I/O."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import psutil

# Fewer say nothing: what a process has taken by its first laps, it keeps.
FEWEST = 6
MEMORY_SHARE, MEMORY_BYTES = 0.05, 4 << 20
OTHERS = 2


class Held(NamedTuple):
    """Of one process (by `pid`) at the end of a lap: memory in bytes, open descriptors, threads."""

    pid: int
    memory: int
    descriptors: int
    threads: int


def held(pid: int) -> Held:
    """What a process holds now."""
    process = psutil.Process(pid)
    with process.oneshot():
        return Held(pid, process.memory_info().rss, process.num_fds(), process.num_threads())


def own() -> Held:
    """What this process holds."""
    return held(os.getpid())


def stay(found: Sequence[Held]) -> Sequence[Held]:
    """The last ones, of one and the same process."""
    return [one for one in found if one.pid == found[-1].pid] if found else []


def grown(what: str, found: Sequence[Held]) -> list[str]:
    """What of a process that has stayed has grown; empty where nothing has, or where it has not been there for long.

    Its last third is held against its first: the least of the last ones against the most of the first ones, so that a
    process which breathes is none that leaks.
    """
    found = stay(found)
    if len(found) < FEWEST:
        return []
    third = len(found) // 3
    early, late = found[:third], found[-third:]
    said = []
    most, least = max(one.memory for one in early), min(one.memory for one in late)
    if least > most * (1 + MEMORY_SHARE) + MEMORY_BYTES:
        said.append(f"{what}: its memory grew from {most >> 20} MB to {least >> 20} MB")
    for name in ("descriptors", "threads"):
        most, least = max(getattr(one, name) for one in early), min(getattr(one, name) for one in late)
        if least > most + OTHERS:
            said.append(f"{what}: its {name} grew from {most} to {least}")
    return said
