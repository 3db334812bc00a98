"""A configuration that is read anew while the bridge, or a reader of indexes, runs: on SIGHUP.

What runs ends as at SIGTERM (drained, checkpointed, confirmed) and begins again with the new configuration, in the same
process. A file with mistakes changes nothing. Keys by which the log and its place are known stay as they were until the
bridge is started anew, and are named.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec

from bridge import log
from bridge.config import Config
from bridge.errors import ConfigError, UsageError
from bridge.structured import group

# Where the log is, and what this process has opened for as long as it lives.
FIXED = (
    ("source", "name"), ("source", "slot"), ("stream", "name"), ("stream", "prefix"), ("stream", "mode"),
    ("stream", "store_dir"), ("state", "bucket"),
)  # fmt: skip


async def with_reloads(
    settings: Config,
    read: Callable[[], Config],
    stop: anyio.Event,
    run: Callable[[Config, anyio.Event], Awaitable[None]],
    address: str,
) -> None:
    """Run with one configuration after another until `stop` is set.

    Args:
        read: reads the configuration anew.
        run: runs with a configuration until its event is set.
        address: the key of `[operate]` by which this process has its address.
    """
    now, ending = settings, anyio.Event()

    async def hear() -> None:
        nonlocal now
        with anyio.open_signal_receiver(signal.SIGHUP) as signals:
            async for _ in signals:
                found = reloaded(now, read, address)
                if found is not None:
                    now = found
                    ending.set()

    async def end() -> None:
        await stop.wait()
        ending.set()

    async with group() as tasks:
        tasks.start_soon(hear)
        tasks.start_soon(end)
        while not stop.is_set():
            ending = anyio.Event()
            await run(now, ending)
        tasks.cancel_scope.cancel()


def reloaded(now: Config, read: Callable[[], Config], address: str) -> Config | None:
    """The configuration to go on with; None where that is the present one. What has changed is logged, by key."""
    try:
        found = read()
    except (ConfigError, UsageError) as error:
        log.get().error("configuration not reloaded", why=error.what, next="correct it and send SIGHUP again")
        return None
    fixed = [*FIXED, ("operate", address)]
    fixed += [("stream", "servers")] if now.stream.embedded or found.stream.embedded else []
    for section, key in fixed:
        old, new = getattr(getattr(now, section), key), getattr(getattr(found, section), key)
        if old != new:
            log.get().warning("key not reloaded", key=f"{section}.{key}", next="it counts from the next start on")
            kept: Any = msgspec.structs.replace(getattr(found, section), **{key: old})
            found = msgspec.structs.replace(found, **{section: kept})
    changed = [
        f"{section}.{field.name}"
        for section in ("source", "stream", "state", "snapshot", "operate")
        for field in msgspec.structs.fields(getattr(found, section))
        if getattr(getattr(found, section), field.name) != getattr(getattr(now, section), field.name)
    ] + (["index"] if found.index != now.index else [])
    log.get().info("configuration reloaded", changed=changed)
    return found if changed else None
