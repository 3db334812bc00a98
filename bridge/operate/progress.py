"""How far something long is, on stderr: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bridge import log
from bridge.console import Plain
from bridge.index import rebuild
from bridge.operate.agreement import Compared

SAY_EVERY = 10.0


def bars() -> Progress | None:
    """Bars on stderr, with a field `rest`; None where that is no terminal."""
    console = Plain(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    return Progress(
        SpinnerColumn(finished_text=" "), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
        MofNCompleteColumn(), TextColumn("{task.fields[rest]}", markup=False), TimeElapsedColumn(), console=console,
    )  # fmt: skip


@contextmanager
def rebuild_progress(name: str) -> Iterator[Callable[[rebuild.Progress], None]]:
    """The function to call with each progress of the rebuild of index `name`."""
    bar = bars()
    if bar is None:
        yield _Lines(name)
        return
    task = bar.add_task(f"{name}: starting", total=None, rest="")

    def show(now: rebuild.Progress) -> None:
        left = "" if now.seconds_left is None or not now.total else f", {_span(now.seconds_left)} left"
        rest = f"{now.rate:,.0f}/s{left}" if now.rate and now.phase != "done" else ""
        bar.update(task, description=f"{name}: {now.phase}", completed=now.done, total=now.total or None, rest=rest)

    with bar, logs_above():
        yield show


class _Lines:
    """A line for each new phase, and every ten seconds."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._phase = ""
        self._said = 0.0

    def __call__(self, now: rebuild.Progress) -> None:
        if now.phase == self._phase and time.monotonic() - self._said < SAY_EVERY:
            return
        self._phase, self._said = now.phase, time.monotonic()
        left = {} if now.seconds_left is None else {"seconds_left": round(now.seconds_left)}
        log.get().info(
            "rebuilding", index=self._name, phase=now.phase, events=now.done, of=now.total,
            a_second=round(now.rate), **left,
        )  # fmt: skip


@contextmanager
def verify_progress() -> Iterator[Callable[[Compared], None]]:
    """The function to call with how far the comparison of a table is."""
    bar, said = bars(), time.monotonic()
    if bar is not None:
        task = bar.add_task("starting", total=None, rest="")

        def show(now: Compared) -> None:
            bar.update(task, description=f"{now.table}: {now.phase}", completed=now.done, total=now.of or None)

        with bar, logs_above():
            yield show
        return

    def say(now: Compared) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            log.get().info("comparing", table=now.table, phase=now.phase, done=now.done, of=now.of)

    yield say


@contextmanager
def logs_above() -> Iterator[None]:
    """While a bar is shown, sys.stderr writes above it; the logs must take that way, too."""
    before = structlog.get_config()["logger_factory"]
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    try:
        yield
    finally:
        structlog.configure(logger_factory=before)


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 6000 else f"{whole / 3600:.1f} h"
