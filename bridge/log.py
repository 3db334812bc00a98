"""Logs: one line per event of note, text for people and JSON for machines, always on stderr.

Event names are stable lower-case words; values are names, LSNs and counts, never row values or passwords.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog
from rich.console import Console

MINUTE = 60.0
Format = Literal["text", "json"]


def configure(form: Format = "text", *, verbose: bool = False) -> None:
    """Set the whole process's log format and level."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json":
        shared += [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        # What is said to people by other ways is rich's: that decides for all, by NO_COLOR and TERM.
        terminal = Console(stderr=True)
        colors = terminal.color_system is not None and not terminal.no_color
        shared.append(_quoted)
        shared.append(structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=24))
    # asyncio's streams warn at each end of a TLS connection, which nobody can do anything about.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


class _Quoted:
    """A text that is written in quotes and with escapes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return repr(self._text)


def _quoted(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Have a terminal take nothing of a line for a command: a table may be called anything, and structlog quotes what
    has blanks alone."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = _Quoted(value)
    return event


class Seldom:
    """Keeps what may happen a thousand times a second from being logged more than `most` times a minute."""

    def __init__(self, most: int = 20) -> None:
        self._most = most
        self._begun = float("-inf")
        self._count = 0
        self._unsaid = 0

    def admits(self) -> int | None:
        """How many were left out since the last line, if there may be one now; None where this one is left out."""
        now = time.monotonic()
        if now - self._begun >= MINUTE:
            self._begun, self._count = now, 0
        if self._count >= self._most:
            self._unsaid += 1
            return None
        self._count += 1
        unsaid, self._unsaid = self._unsaid, 0
        return unsaid


def get(**names: Any) -> Any:
    """A logger whose lines carry `names`."""
    return structlog.get_logger(**names)
