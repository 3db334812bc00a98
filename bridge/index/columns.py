"""Columns that came after an index was made: added live with their types; what cannot be added asks for a rebuild."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bridge import log
from bridge.errors import ConfigError
from bridge.index import mapping
from bridge.index.document import Shape
from bridge.index.engine import Engine, EngineError
from bridge.index.generation import Generation, Member


def properties(shape: Shape, columns: Sequence[mapping.Column]) -> dict[str, Any]:
    """The fields of one table's documents, by name."""
    constants = {name: mapping.guess(value) for name, value in shape.constants.items()}
    found = mapping.fields(columns, keep=shape.columns, exclude=shape.exclude, rename=shape.rename)
    return {**found, **constants}


def joined(members: Iterable[Member], columns: Mapping[str, Sequence[mapping.Column]]) -> dict[str, Any]:
    """The fields of the documents of all tables.

    Raises:
        ConfigError: two tables need the same field in different ways.
    """
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    for member in members:
        for field, kind in properties(member.shape, columns[member.name]).items():
            if found.setdefault(field, kind) != kind:
                raise ConfigError(
                    f"the field {field} is of another type in {first[field]} than in {member.name}",
                    f'give it another name for one of them: [index.NAME.of."{member.name}"] rename = {{ … }}',
                )
            first.setdefault(field, member.name)
    return found


async def grow(
    engine: Engine,
    name: str,
    generation: Generation,
    members: Iterable[Member],
    columns: Mapping[str, Sequence[mapping.Column]],
    documents: list[dict[str, Any]],
) -> dict[str, Any] | None:
    """The generation's mapping with the columns that it lacked; None where it could not or need not grow.

    Args:
        members: the generation's tables, and their `columns` as they are recorded now, by the tables' names.
        documents: what the engine refused for fields that it does not know; a field without a column is guessed.
    """
    if generation.origin.get("mapping") is not None or generation.guessed:
        return None
    known = dict(generation.mapping["properties"])
    today: dict[str, Any] = {}
    for member in members:
        own = properties(member.shape, columns[member.name])
        today |= {field: kind for field, kind in own.items() if field not in today}
    _say_changed(name, sorted(field for field in today.keys() & known.keys() if today[field] != known[field]))
    added = {field: kind for field, kind in today.items() if field not in known}
    for document in documents:
        added |= {f: mapping.guess(v) for f, v in document.items() if f not in known and f not in added}
    if not added:
        # Another bulk has added them meanwhile.
        return generation.mapping if documents else None
    try:
        await engine.json("PUT", f"/{generation.physical}/_mapping", {"properties": added})
    except EngineError as error:
        log.get().warning(
            "columns not added", index=name, columns=sorted(added), why=error.kind, next=f"bridge reindex {name}"
        )
        return None
    log.get().info("columns added", index=name, columns=sorted(added))
    return {**generation.mapping, "properties": {**known, **added}}


def _say_changed(name: str, columns: list[str]) -> None:
    if columns:
        log.get().warning("columns changed their type", index=name, columns=columns, next=f"bridge reindex {name}")
