"""Processor time and memory of processes, sampled from /proc while they work.

A process's own total holds its start as well; the samples are read between two moments instead, the times at which the
server stored two messages.

Source: proc(5): /proc/[pid]/stat fields 14 and 15 (clock ticks in user and kernel mode), 16 and 17 (those of children
that were waited for), /proc/[pid]/status VmHWM.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import anyio

from bridge.embedded.process import children

EVERY = 0.1


class Usage(NamedTuple):
    """`at`: nanoseconds since 1970; `seconds`: what the process had used of a processor by then."""

    at: int
    seconds: float


def spent(samples: Sequence[Usage], start: int, end: int) -> float:
    """Processor seconds between two times, each read between its neighbouring samples; outside nothing is assumed."""
    return _used(samples, end) - _used(samples, start)


def _used(samples: Sequence[Usage], at: int) -> float:
    right = bisect.bisect_left(samples, at, key=lambda sample: sample.at)
    if right == 0:
        return samples[0].seconds if samples else 0.0
    if right == len(samples):
        return samples[-1].seconds
    before, after = samples[right - 1], samples[right]
    share = (at - before.at) / (after.at - before.at)
    return before.seconds + share * (after.seconds - before.seconds)


def extrapolated(samples: Sequence[Usage], at: int) -> float:
    """Processor seconds from the process's start to `at`, somewhat after the last sample: until then as busy as it was
    between the first and the last."""
    first, last = samples[0], samples[-1]
    if last.at == first.at:
        return last.seconds
    return last.seconds + (last.seconds - first.seconds) / (last.at - first.at) * (at - last.at)


class Sampler:
    """What the watched processes have used, by the name under which each is watched."""

    def __init__(self) -> None:
        self.samples: dict[str, list[Usage]] = {}
        self._watched: dict[str, tuple[int, Callable[[int], float]]] = {}

    def watch(self, name: str, pid: int, *, family: bool = False) -> None:
        """Sample this process from now on, or with `family` a server with the processes that it starts."""
        self._watched[name] = (pid, used_by_all if family else used)
        self.samples[name] = []
        self.sample()

    def sample(self) -> None:
        """One more sample of each; those that have ended keep theirs."""
        for name, (pid, seconds) in self._watched.items():
            with contextlib.suppress(OSError):
                self.samples[name].append(Usage(time.time_ns(), seconds(pid)))

    async def run(self) -> None:
        """Sample on a timer, until cancelled."""
        while True:
            await anyio.sleep(EVERY)
            self.sample()


def used(pid: int) -> float:
    """Processor seconds of the process so far; OSError where it has ended."""
    return sum(_ticks(pid)[:2]) / os.sysconf("SC_CLK_TCK")


def used_by_all(pid: int) -> float:
    """Processor seconds of a process and of its children so far, whether or not these have ended; OSError where the
    process itself has."""
    living = 0.0
    for child in children(pid):
        with contextlib.suppress(OSError):
            living += used(child)
    return living + sum(_ticks(pid)) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> list[int]:
    """In user and kernel mode: the process's own, then of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]


def peak(pid: int) -> float:
    """The largest resident set so far, in MB of 1,024 × 1,024 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def has_written(pid: int) -> bool:
    """Whether the process has written anything to a file or terminal yet; OSError where it has ended."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return any(line.startswith("wchar:") and int(line.split()[1]) > 0 for line in lines)
