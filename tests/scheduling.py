"""Which worker runs which test: what is costly to prepare is prepared by one worker, so that it is prepared once.

An engine takes half a minute of both processors to start, and a gigabyte while it runs: all of its tests are one piece.
So are those of a module that prepares something for all of its tests (a browser, an installed package, a bridge and
an index that run). Everything else is cheap to have in each worker, and spreads best one by one.

pytest-xdist's own groups go by a mark that it writes into a test's name, which pytest keeps apart since 9.2; here the
test's own name, its parameters or its module say it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

ENGINES = ("opensearch", "elasticsearch")
FIXTURE = 'fixture(scope="module"'
ROOT = Path(__file__).parents[1]


def by_cost(config: pytest.Config, log: Any) -> Any:
    """A scheduler with one piece for each engine's tests and for each module that prepares something, the largest
    pieces first; all others one by one."""
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope
    return scheduler


def scope(nodeid: str) -> str:
    """The piece that a test belongs to."""
    module, _, name = nodeid.partition("::")
    alone = module if prepares(module) else nodeid
    return next((engine for engine in ENGINES if engine in name), alone)


@functools.cache
def prepares(module: str) -> bool:
    """Whether a module has a fixture that all of its tests share."""
    file = ROOT / module
    return file.is_file() and FIXTURE in file.read_text()
