"""What is remembered of an index: its generations, which of them searches see, and how far each has come. Pure.

A generation is one physical index with its own consumer and its own configuration, fixed when it was begun: editing the
configuration file changes nothing until `reindex` begins the next one.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from bridge.config import Index
from bridge.index.document import Shape

Standing = Literal["building", "switching", "live", "kept", "retired"]
FOLLOWED: tuple[Standing, ...] = ("live", "kept")


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One generation.

    Args:
        state: building (replays the log), switching (the alias moves to it), live (searches see it), kept (an older one
            that is still kept up to date), retired (about to be deleted).
        first: the stream sequence at which it began to read.
        seq: everything up to here is in the index; `epoch` and `position` belong to it.
        keeps: whether the generations before it stay once searches see it.
        fresh: of a compacted log, everything that was stored before this time (seconds since 1970) is in the index.
        begin: version of the last begin marker of a complete read, for the sweep at its end.
        origin: the configuration that it was begun with, to see whether today's is another.
    """

    number: int
    physical: str
    consumer: str
    state: Standing
    shape: Shape
    settings: dict[str, Any]
    mapping: dict[str, Any]
    origin: dict[str, Any]
    stream: str
    stream_created: str
    first: int
    seq: int
    epoch: int = 0
    position: str = ""
    begin: int = 0
    fresh: float = 0.0
    keeps: bool = False
    at: str = ""

    @property
    def write_alias(self) -> str:
        """The alias that all writes go through: a write to a deleted index fails instead of making it anew."""
        return f"{self.physical}-w"


class IndexRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`index.<source>.<name>`: what searches see now, repeated on top, and all generations, oldest first."""

    alias: str = ""
    generation: int = 0
    physical: str = ""
    consumer: str = ""
    seq: int = 0
    epoch: int = 0
    position: str = ""
    state: str = "none"
    generations: list[Generation] = []

    def get(self, number: int) -> Generation | None:
        """That generation, None where there is none."""
        return next((g for g in self.generations if g.number == number), None)

    def having(self, *states: Standing) -> list[Generation]:
        """The generations in one of these states."""
        return [g for g in self.generations if g.state in states]

    def having_changed(self, number: int, **changes: Any) -> IndexRecord:
        """The record with one generation changed; unchanged where that one is gone."""
        kept = [msgspec.structs.replace(g, **changes) if g.number == number else g for g in self.generations]
        return self.of(kept)

    def of(self, generations: list[Generation]) -> IndexRecord:
        """The record with these generations, what is on top following from them."""
        live = next((g for g in generations if g.state == "live"), None)
        shown = live or next((g for g in reversed(generations) if g.state != "retired"), None)
        return IndexRecord(
            alias=self.alias,
            generation=live.number if live else 0,
            physical=shown.physical if shown else "",
            consumer=shown.consumer if shown else "",
            seq=shown.seq if shown else 0,
            epoch=shown.epoch if shown else 0,
            position=shown.position if shown else "",
            state=shown.state if shown else "none",
            generations=sorted(generations, key=lambda g: g.number),
        )


def differences(index: Index, record: IndexRecord) -> list[str]:
    """The keys of the configuration that are not as the live generation was built with; they wait for a rebuild."""
    live = record.get(record.generation)
    if live is None:
        return []
    today = origin(index, None)
    return sorted(key for key in today if key != "mapping" and today[key] != live.origin.get(key))


def physical(name: str, number: int) -> str:
    """The name of a generation's physical index, and of its consumer."""
    return f"{name}-{number:06d}"


def shape(index: Index) -> Shape:
    """What of a row gets into the documents of an index."""
    return Shape(list(index.columns), list(index.exclude), dict(index.rename), index.transform)


def origin(index: Index, own: dict[str, Any] | None) -> dict[str, Any]:
    """All of an index's configuration that decides what is built."""
    return {
        "table": index.table,
        "columns": list(index.columns),
        "exclude": list(index.exclude),
        "rename": dict(index.rename),
        "transform": index.transform,
        "settings": index.settings,
        "mapping": own,
    }
