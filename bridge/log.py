"""Logs: one line per event of note, text for people and JSON for machines, always on stderr.

Event names are stable lower-case words; values are names, LSNs and counts, never row values or passwords.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Literal

import structlog

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
        colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        shared.append(structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=24))
    # asyncio's streams warn at each end of a TLS connection, which nobody can do anything about.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def get(**names: Any) -> Any:
    """A logger whose lines carry `names`."""
    return structlog.get_logger(**names)
