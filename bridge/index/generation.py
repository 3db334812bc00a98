"""What is remembered of an index: its generations, which of them searches see, and how far each has come. Pure.

A generation is one physical index with its own consumer and its own configuration, fixed when it was begun: editing the
configuration file changes nothing until `reindex` begins the next one.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import msgspec

from bridge.config import Index, split_name
from bridge.index.document import Shape
from bridge.index.mapping import Choices, flat
from bridge.index.naming import Naming, opening

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
        served: whether searches have seen it before, so that a switch to it that did not happen leaves it kept.
        alias: what searches see it by, or are about to.
        fresh: of a compacted log, everything that was stored before this time (seconds since 1970) is in the index.
        shapes: what of a row gets into its documents, for each table, by its name as it is configured.
        uuid: the engine's own id of the physical index; empty until it is first fed.
        begins: version of the last begin marker of a table's complete read, by schema.table, for the sweep at its end;
        ends: of the last end marker.
        opened: how often it was begun to be fed; the names of its consumer and of its write alias tell, too.
        wholes: from where on the stream held each table whole, by schema.table.
        longest: how many documents a row may have at most.
        choices: what its fields were chosen by; columns that come later are, too.
        types: by table, the types that its columns had when their fields were made.
        origin: the configuration that it was begun with, to see whether today's is another.
    """

    number: int
    physical: str
    consumer: str
    state: Standing
    shapes: dict[str, Shape]
    settings: dict[str, Any]
    mapping: dict[str, Any]
    origin: dict[str, Any]
    stream: str
    stream_created: str
    first: int
    seq: int
    epoch: int = 0
    position: str = ""
    uuid: str = ""
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    wholes: dict[str, int] = {}
    opened: int = 0
    longest: int = 1
    fresh: float = 0.0
    keeps: bool = False
    choices: Choices = Choices()
    types: dict[str, dict[str, str]] = {}
    served: bool = False
    alias: str = ""
    at: str = ""

    @property
    def write_alias(self) -> str:
        """The alias that all writes go through: a write to a deleted index fails instead of making it anew, and what a
        reader has on its way that was replaced is refused."""
        return _write_alias(self.physical, self.opened)

    def outdated(self, alias: str) -> bool:
        """Whether that alias was for writes of a reader before this generation's last one."""
        found = _WRITES.fullmatch(alias.removeprefix(self.physical)) if alias.startswith(self.physical) else None
        return found is not None and int(found[1] or 1) < max(self.opened, 1)

    @property
    def guessed(self) -> bool:
        """Whether the engine guesses fields, because a transform makes documents that no column tells of."""
        return any(shape.transform for shape in self.shapes.values())

    @property
    def verbatim(self) -> bool:
        """Whether its index gives documents back as they were sent: no pipeline and no other kind of source."""
        settings = " ".join(flat(self.settings))
        return "_source" not in self.mapping and "_pipeline" not in settings and ".source." not in settings


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

    @property
    def newest(self) -> int:
        """The highest number of a generation; 0 where there is none."""
        return max((g.number for g in self.generations), default=0)

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

    def having_opened(self, number: int) -> IndexRecord:
        """The record with a generation that is about to be fed, by a consumer and a write alias whose names nobody has
        had before."""

        def opened(g: Generation) -> Generation:
            count = g.opened + 1
            return msgspec.structs.replace(g, opened=count, consumer=consumer(g.physical, count))

        return self.of([opened(g) if g.number == number else g for g in self.generations])

    def of(self, generations: list[Generation]) -> IndexRecord:
        """The record with these generations, what is on top following from them."""
        live = next((g for g in generations if g.state == "live"), None)
        shown = live or next((g for g in reversed(generations) if g.state != "retired"), None)
        return IndexRecord(
            alias=(live.alias if live else "") or self.alias,
            generation=live.number if live else 0,
            physical=shown.physical if shown else "",
            consumer=shown.consumer if shown else "",
            seq=shown.seq if shown else 0,
            epoch=shown.epoch if shown else 0,
            position=shown.position if shown else "",
            state=shown.state if shown else "none",
            generations=sorted(generations, key=lambda g: g.number),
        )


class Member(NamedTuple):
    """One table of an index."""

    name: str
    schema: str
    table: str
    shape: Shape
    naming: Naming

    @property
    def key(self) -> tuple[str, str]:
        """(schema, table), as events name it."""
        return self.schema, self.table


def differences(index: Index, own: dict[str, Any] | None, record: IndexRecord) -> list[str]:
    """The keys of the configuration that are not as the live generation was built with; they wait for a rebuild.

    Args:
        own: what the configured mapping file holds.
    """
    live = record.get(record.generation)
    if live is None:
        return []
    # A key that is newer than the generation's record had its default then.
    today, then = _told(origin(index, own)), _told({**DEFAULTS, **live.origin})
    moved = ["alias"] if live.alias not in ("", index.alias) else []
    return sorted([*moved, *(key for key in today.keys() | then.keys() if today.get(key) != then.get(key))])


def _told(origin: dict[str, Any]) -> dict[str, Any]:
    """An origin as differences in it are told: those of the tables by their keys."""
    tables = origin.get("tables", {})
    found = {key: value for key, value in origin.items() if key != "tables"} | {"table": sorted(tables)}
    for name, shape in tables.items():
        found |= {key if len(tables) == 1 else f"{name}.{key}": value for key, value in shape.items()}
    return found


# The keys of an origin that came later, with what they were before.
DEFAULTS: dict[str, Any] = {"numeric": "exact", "json": "stored", "fields": {}}


def physical(name: str, number: int) -> str:
    """The name of a generation's physical index, and of its first consumer."""
    return f"{name}-{number:06d}"


def number_of(name: str, index: str) -> int:
    """The number of the generation of an index whose physical index has this name; 0 where it is none."""
    tail = index.removeprefix(f"{name}-")
    return int(tail) if tail.isdigit() and physical(name, int(tail)) == index else 0


def consumer(physical: str, opened: int) -> str:
    """The name of the consumer with which a generation is fed for the `opened`th time."""
    return physical if opened < 2 else f"{physical}-{opened}"


def is_consumer(name: str, physical: str, *, before: int = 0) -> bool:
    """Whether a generation was ever fed from a consumer of that name, or may have been.

    Args:
        before: only the consumers before the one with which it is fed for the so manyeth time; 0 for all.
    """
    found = re.fullmatch(rf"{re.escape(physical)}(?:-(\d+))?", name)
    return found is not None and (not before or int(found[1] or 1) < before)


_WRITES = re.compile(r"-w(\d*)")


def _write_alias(physical: str, opened: int) -> str:
    return f"{physical}-w" if opened < 2 else f"{physical}-w{opened}"


def numbered(consumer: str, name: str) -> int:
    """The number of the generation that a consumer is called after; 0 where it is no consumer of that index."""
    found = re.fullmatch(rf"{re.escape(name)}-(\d{{6}})(?:-\d+)?", consumer)
    return int(found[1]) if found is not None else 0


def writes(name: str) -> re.Pattern[str]:
    """What the write aliases of an index's generations are called; the first group is the generation's number."""
    return re.compile(rf"{re.escape(name)}-(\d{{6}}){_WRITES.pattern}")


def is_generations(found: str, name: str, number: int) -> bool:
    """Whether a name in the engine is one that a generation needs to itself: its index's, or a write alias'."""
    own = physical(name, number)
    return found == own or (found.startswith(own) and writes(name).fullmatch(found) is not None)


def shapes(index: Index) -> dict[str, Shape]:
    """What of a row gets into the documents of an index, for each of its tables."""
    return {table: Shape(**msgspec.structs.asdict(index.part(table))) for table in index.holds}


def members(shapes: dict[str, Shape]) -> dict[str, Member]:
    """The tables of an index, by their names as they are configured; each with its shape and its rows' names."""
    found = {}
    for name, shape in shapes.items():
        schema, table = split_name(name)
        prefix = opening("", schema, table) if len(shapes) > 1 else ""
        found[name] = Member(name, schema, table, shape, Naming(shape.id, prefix, shape.routing))
    return found


def origin(index: Index, own: dict[str, Any] | None) -> dict[str, Any]:
    """All of an index's configuration that decides what is built."""
    return {
        "tables": {name: msgspec.to_builtins(shape) for name, shape in shapes(index).items()},
        "numeric": index.numeric,
        "json": index.json,
        "fields": index.fields,
        "settings": index.settings,
        "mapping": own,
    }
