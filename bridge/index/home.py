"""What a sender asks of the index that it writes to, for all who send: the reader, the rebuild, and what mends rows."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence

import msgspec

from bridge.index.document import Builder, Put
from bridge.index.ground import Ground
from bridge.index.mapping import HIDDEN
from bridge.index.naming import UNREADABLE


class IndexHome:
    """The `Home` of one generation.

    Args:
        builders: of each table, by (schema, table); they know of fields what `ground` has learnt.
    """

    def __init__(self, ground: Ground, builders: Mapping[tuple[str, str], Builder]) -> None:
        self._ground = ground
        self._builders = builders

    @property
    def write_alias(self) -> str:
        """What writes go through."""
        return self._ground.write_alias

    def still_allowed(self) -> None:
        """Raise where somebody else may have taken this writer's place."""
        self._ground.still_allowed()

    async def regain(self) -> bool:
        """Put back a lost write alias."""
        return await self._ground.regain()

    def known(self) -> Collection[str]:
        """What may be named in a reason."""
        return self._ground.known()

    async def learn(self, documents: list[Put]) -> bool:
        """Add the fields that these have and the mapping lacks."""
        found = []
        for op in documents:
            with contextlib.suppress(*UNREADABLE):
                found.append(msgspec.json.decode(op.doc))
        learnt = await self._ground.learn(found)
        if learnt:
            for op in documents:
                self._convert(op)
        return learnt

    async def refit(self, ops: Sequence[Put]) -> list[bool]:
        """Convert the fields of documents that have become known since they were built; of each whether it changed."""
        await self._ground.catch_up()
        return [self._convert(op) for op in ops]

    def _convert(self, op: Put) -> bool:
        before = op.doc
        with contextlib.suppress(*UNREADABLE):
            table = msgspec.json.decode(op.doc)[HIDDEN]["table"]
            for builder in self._builders.values():
                if builder.table == table:
                    op.doc = builder.converted(op.doc)
        return op.doc != before
