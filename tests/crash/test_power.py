"""What a power failure takes from a broker that does not sync always, at the moments that chance rarely hits."""

from __future__ import annotations

import shutil

import anyio
import anyio.to_thread
import pytest

from bridge.embedded import Keeper, NatsServer
from bridge.embedded.nats import jetstream
from bridge.embedded.process import throwaway_folder
from tests.oracle import agrees
from tests.running import bridge, execute, messages, settled, source, streaming

pytestmark = [pytest.mark.anyio, pytest.mark.crash]


async def test_what_is_written_again_has_a_newer_epoch_even_if_the_broker_forgot_the_last_one(
    pg_db: str,
) -> None:
    home = throwaway_folder()
    store = home / "store"
    config_of = {"jetstream": jetstream(store, "1m")}
    async with NatsServer(home, Keeper(home), store, settings=config_of) as nats:
        config = source(pg_db, nats.url, sync="1m")
        await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
        async with bridge(config):
            await settled(config)
        await nats.stop()
        await anyio.to_thread.run_sync(shutil.copytree, store, home / "kept")
        await nats.start()
        async with bridge(config):
            await streaming(config)
            await execute(pg_db, "INSERT INTO t VALUES (2)")
            await settled(config)
            before = {message.seq: message for message, _ in await messages(config)}
            await nats.kill()
            shutil.rmtree(store)
            (home / "kept").rename(store)
            await nats.start()
            await execute(pg_db, "INSERT INTO t VALUES (3)")
            await settled(config)
        found = await agrees(config)
    again = [message for message, _ in found if message.seq in before and message.epoch != 1]
    assert len(again) >= 2
    for message in again:
        assert message.position == before[message.seq].position
        assert message.epoch > before[message.seq].epoch
