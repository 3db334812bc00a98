"""The connection to NATS: whatever happens to it, nothing is left open."""

from __future__ import annotations

import gc

import anyio
import pytest

from bridge.config import Stream
from bridge.embedded import NatsServer
from bridge.stream import server

pytestmark = pytest.mark.anyio


async def test_a_connection_that_is_cancelled_at_any_moment_leaves_nothing_open(nats: NatsServer) -> None:
    # An open socket is a ResourceWarning when it is collected, and warnings are errors here.
    for step in range(60):
        with anyio.move_on_after(0.0002 * step):
            async with server.connect(Stream(servers=[nats.url]), [nats.url]):
                await anyio.sleep_forever()
    gc.collect()
