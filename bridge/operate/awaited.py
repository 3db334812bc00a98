"""Whether a table that the bridge has not recorded yet is one that it will: what a rebuild asks before it waits for it.

PostgreSQL is asked; where it does not answer, the configuration alone tells.
"""

from __future__ import annotations

from collections.abc import Collection

import anyio

from bridge.config import Config, join_name, split_name
from bridge.errors import BridgeError, ConfigError
from bridge.operate.checks import tables
from bridge.operate.checks.ask_postgres import ask_tables
from bridge.source.catalog import Filter

WITHIN = 15.0


async def awaited(config: Config, name: str, unrecorded: Collection[tuple[str, str]]) -> None:
    """Return where the tables that are not recorded will be, once a bridge has begun with them.

    Args:
        name: the index that is to be built of them.

    Raises:
        ConfigError: one is not published, so that no bridge ever brings it.
    """
    index = config.index[name]
    option = f"`{'tables' if index.tables else 'table'}` of [index.{name}]"
    try:
        with anyio.fail_after(WITHIN):
            found = await ask_tables(config)
    except (BridgeError, TimeoutError):
        chosen = Filter(config.source.tables)
        for table in index.holds:
            split = split_name(table)
            if split in unrecorded and not chosen.matches(*split):
                raise ConfigError(
                    f"index {name} cannot be built: {join_name(*split)} is not published",
                    f"correct {option}, or add it to [source] tables",
                ) from None
        return
    for finding in tables.of_index(name, index, config.source, found, unrecorded):
        raise ConfigError(f"index {name} cannot be built: {finding.what}", finding.next)
