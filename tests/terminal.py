"""A terminal of a test's own, and everything that was shown on it."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bridge import log


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[Callable[[], str]]:
    """stderr is a terminal while the block lasts, also for the logs; call what this gives behind it for what it
    showed."""
    for name, value in {"TERM": "xterm", "COLUMNS": str(columns), "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    found: list[bytes] = []
    try:
        with os.fdopen(theirs, "w") as there, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", there)
            log.configure()
            yield lambda: b"".join(found).decode()
        # Nobody has the other end any more: what is on its way comes, then an error.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                found.append(data)
    finally:
        os.close(ours)
        log.configure()
