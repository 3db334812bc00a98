"""The running bridge's own look at its servers: each finding of `bridge check` once in its log, beside its work.

It has connections of its own, so that a slow answer delays nothing, and asks neither search engines nor for a slot.
What the bridge refuses or says by itself when it begins is left out.
"""

from __future__ import annotations

from bridge import log
from bridge.config import Config
from bridge.operate.check import check
from bridge.stream.server import Servers

SAID = {
    ("tables.identity", "error"),
    ("tables.identity", "warning"),
    ("tables.unlogged", "warning"),
    ("tables.section", "warning"),
    ("jetstream.drift", "warning"),
}
AWAY = {"postgres.reachable", "jetstream.reachable"}


async def tell(config: Config, servers: Servers) -> bool:
    """Log every warning and error; whether both servers could be asked."""
    try:
        found = await check(config, servers, thorough=False)
    except Exception as error:  # noqa: BLE001 - a look at the servers is no reason to end
        log.get().debug("check failed", error=type(error).__name__)
        return True
    if any(one.id in AWAY for one in found.found):
        return False  # the bridge itself says so, and waits
    for one in found.found:
        if (one.id, one.level) not in SAID:
            say = log.get().error if one.level == "error" else log.get().warning
            say("check", id=one.id, about=one.about, what=one.what, why=one.why, next=one.next)
    return True
