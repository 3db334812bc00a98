"""What a process holds when everything rests, and whether that has grown. `grown` does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil

from tests.crash.process import Bridge
from tests.soak import counted

# Fewer say nothing: what a process has taken by its first laps, it keeps.
FEWEST = 6
MEMORY_SHARE, MEMORY_BYTES = 0.05, 4 << 20
OTHERS = 2


class Held(NamedTuple):
    """Of one process (by `pid`) at the end of a lap: memory in bytes, open descriptors, threads, tasks of its loop."""

    pid: int
    memory: int
    descriptors: int
    threads: int
    tasks: int


async def held(process: Bridge) -> Held:
    """What a process of `tests.soak.counted` holds now."""
    told = process.text.count(counted.SAID)
    process.send(counted.ASKED)
    await process.said(counted.SAID, times=told + 1)
    tasks = int(process.text.rpartition(counted.SAID)[2].partition("\n")[0])
    seen = psutil.Process(process.pid)
    with seen.oneshot():
        return Held(process.pid, seen.memory_info().rss, seen.num_fds(), seen.num_threads(), tasks)


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
    for name in ("descriptors", "threads", "tasks"):
        most, least = max(getattr(one, name) for one in early), min(getattr(one, name) for one in late)
        if least > most + OTHERS:
            said.append(f"{what}: its {name} grew from {most} to {least}")
    return said
