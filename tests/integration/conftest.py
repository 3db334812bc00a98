"""A log written by hand and an index fed from it: on all engines, or on the quick one alone."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from bridge.embedded import NatsServer, SearchEngine
from tests.integration.feeding import Log, fed


@pytest.fixture(params=["osmem", "opensearch", "elasticsearch"])
def engine_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param).url
    return url


@pytest.fixture
async def log(nats: NatsServer, engine_url: str) -> AsyncIterator[Log]:
    async with fed(nats.url, engine_url) as found:
        yield found


@pytest.fixture
async def quick(nats: NatsServer, osmem: SearchEngine) -> AsyncIterator[Log]:
    """For what does not depend on the engine."""
    async with fed(nats.url, osmem.url) as found:
        yield found
