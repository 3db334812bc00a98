"""The user's own mapping file, and whether today's configuration is still what the live generation was built with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bridge.config import Index
from bridge.errors import ConfigError
from bridge.index.generation import IndexRecord, differences


def own_mapping(file: str) -> dict[str, Any] | None:
    """What a mapping file holds; None where no file is named.

    Raises:
        ConfigError: it cannot be read, or holds no JSON object.
    """
    if not file:
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the mapping file {file} cannot be read ({type(error).__name__})", "correct it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"the mapping file {file} holds no JSON object", "correct it")
    return found


def differing(index: Index, record: IndexRecord) -> list[str]:
    """The keys of the configuration that wait for a rebuild; `mapping` where the file's content is another one.

    A file that cannot be read from here (another host asks, say) says nothing.
    """
    try:
        own = own_mapping(index.mapping)
    except ConfigError:
        return [key for key in differences(index, None, record) if key != "mapping"]
    return differences(index, own, record)
