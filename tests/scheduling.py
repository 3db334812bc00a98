"""Which worker runs which test: all tests of a real engine go to one worker, so that each engine is started once.

An engine takes half a minute of both processors to start, and a gigabyte while it runs; everything else is cheap to
have in each worker. pytest-xdist's own groups go by a mark that it writes into a test's name, which pytest keeps apart
since 9.2; here the test's own name or its parameters say it.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

ENGINES = ("opensearch", "elasticsearch")


def by_engine(config: pytest.Config, log: Any) -> Any:
    """A scheduler with one piece for each engine's tests, the largest pieces first; all others one by one."""
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope
    return scheduler


def scope(nodeid: str) -> str:
    """The piece that a test belongs to."""
    name = nodeid.rpartition("::")[2]
    return next((engine for engine in ENGINES if engine in name), nodeid)
