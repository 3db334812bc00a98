"""Whether a table that the bridge has not recorded yet is one that it will: what a rebuild asks before it waits for it.

PostgreSQL is asked; where it does not answer, the configuration alone tells.
"""

from __future__ import annotations

from collections.abc import Collection

import anyio

from bridge.config import Config
from bridge.errors import BridgeError, ConfigError
from bridge.operate.checks import tables
from bridge.operate.checks.ask_postgres import ask_tables

WITHIN = 15.0


async def awaited(config: Config, name: str, unrecorded: Collection[tuple[str, str]]) -> None:
    """Return where the tables that are not recorded will be, once a bridge has begun with them.

    Args:
        name: the index that is to be built of them.

    Raises:
        ConfigError: one is not published, so that no bridge ever brings it.
    """
    try:
        with anyio.fail_after(WITHIN):
            found = await ask_tables(config)
    except (BridgeError, TimeoutError):
        found = tables.Tables(chosen=[], roots=list(unrecorded))
    for finding in tables.of_index(name, config.index[name], config.source, found, unrecorded):
        raise ConfigError(f"index {name} cannot be built: {finding.what}", finding.next)
