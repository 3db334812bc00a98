"""What a new index is made with: the configuration, the engine and its templates, put together."""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.config import Index
from bridge.errors import ConfigError
from bridge.index import dialect, mapping
from bridge.index.engine import Engine


class Design(msgspec.Struct, frozen=True):
    """What is decided of an index before it is made.

    Args:
        settings: the user's, with what templates say of those that a replay puts aside.
        warnings: what was asked for and cannot be had, or has no effect.
    """

    own: dict[str, Any] | None
    guessed: bool
    settings: dict[str, Any]
    choices: mapping.Choices
    warnings: list[str]

    def mapping(self, properties: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
        """The index's `mappings`; ConfigError where the user's own cannot be used."""
        return mapping.mappings(properties, meta, own=self.own, guessed=self.guessed)

    def body(self, properties: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
        """The index's settings and mappings once it is built."""
        made = self.mapping(properties, meta)
        return {
            "settings": mapping.settings(self.settings, replaying=False, fields=mapping.count(made)),
            "mappings": made,
        }


async def design(engine: Engine, index: Index, own: dict[str, Any] | None, physical: str) -> Design:
    """The design of an index.

    Args:
        own: what the user's mapping file holds.
        physical: the index's name, which templates go by.

    Raises:
        ConfigError: a setting that only the other kind of engine knows.
    """
    product = await engine.product()
    chosen = mapping.Choices(index.numeric, index.json, dict(index.fields), product)
    settings = mapping.flat({**(own or {}).get("settings", {}), **index.settings})
    wrong = dialect.foreign(product, settings)
    if wrong:
        raise ConfigError(f"settings of the index cannot be used: {wrong}", "correct `settings` of the index")
    return Design(
        own=own,
        guessed=any(index.part(table).transform for table in index.holds),
        settings={**await engine.template_settings(physical), **settings},
        choices=chosen,
        warnings=mapping.lacking(chosen) if own is None else [],
    )
