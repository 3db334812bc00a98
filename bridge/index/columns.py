"""Columns that came after an index was made: added live with their types; what cannot be added asks for a rebuild.

Each generation has fields by its own choices, whatever the configuration says today.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bridge import log
from bridge.errors import ConfigError
from bridge.index import fieldnames, mapping
from bridge.index.document import Shape
from bridge.index.engine import Engine, EngineError
from bridge.index.generation import Generation, Member
from bridge.index.mapping import Choices


def properties(shape: Shape, columns: Sequence[mapping.Column], chosen: Choices) -> dict[str, Any]:
    """The fields of one table's documents, by name."""
    constants = {name: mapping.guess(value) for name, value in shape.constants.items()}
    found = mapping.fields(columns, keep=shape.columns, exclude=shape.exclude, rename=shape.rename, chosen=chosen)
    return {**found, **{name: kind for name, kind in constants.items() if name not in chosen.fields}}


def unambiguous(member: Member, columns: Sequence[mapping.Column]) -> None:
    """Return where each column has a field of its own.

    Raises:
        ConfigError: two columns would be one field.
    """
    shape = member.shape
    fields: dict[str, str] = {}
    for column in columns:
        if column.name in shape.exclude or (shape.columns and column.name not in shape.columns):
            continue
        field = shape.rename.get(column.name, column.name)
        if field in fields:
            raise ConfigError(
                f"the columns {fields[field]} and {column.name} of {member.name} would both be the field {field}",
                "correct `rename` of the index, or exclude one of them",
            )
        fields[field] = column.name


def joined(
    members: Iterable[Member], columns: Mapping[str, Sequence[mapping.Column]], chosen: Choices
) -> dict[str, Any]:
    """The fields of the documents of all tables.

    Raises:
        ConfigError: two tables need the same field in different ways.
    """
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    for member in members:
        for field, kind in properties(member.shape, columns[member.name], chosen).items():
            if found.setdefault(field, kind) != kind:
                raise ConfigError(
                    f"the field {field} is of another type in {first[field]} than in {member.name}",
                    f'give it another name for one of them: [index.NAME.of."{member.name}"] rename = {{ … }}',
                )
            first.setdefault(field, member.name)
    return found


def changed(generation: Generation, table: str, shape: Shape, columns: Sequence[mapping.Column]) -> dict[str, str]:
    """The columns of a table whose fields would be others by today's types, each with what became of its type.

    A type that changes within one kind of field (`varchar(20)` to `text`) is none of them. Generations from before
    types were remembered have none.
    """
    if generation.origin.get("mapping") is not None:
        return {}
    chosen, before = generation.choices, generation.types.get(table, {})
    return {
        column.name: f"{before[column.name]} is {column.type} now"
        for column in columns
        if column.name in before
        and mapping.types([column], keep=shape.columns, exclude=shape.exclude, rename=shape.rename)
        and shape.rename.get(column.name, column.name) not in chosen.fields
        and mapping.field(before[column.name], chosen) != mapping.field(column.type, chosen)
    }


def misfit(generation: Generation, field: str, also: Mapping[str, Any] | None = None) -> str:
    """Why a field cannot be added to a generation's mapping; empty where it can, or is there.

    Args:
        also: fields that are added with it.
    """
    known = {**generation.mapping.get("properties", {}), **(also or {})}
    if field in known and field != mapping.HIDDEN:
        return ""
    own = generation.origin.get("mapping") is not None
    dotted = generation.mapping.get("subobjects") is not False
    why = fieldnames.unfit(field, generation.choices.product, dotted=dotted)
    if why or own:
        return why
    outer, inner = fieldnames.around(field, known), fieldnames.within(field, known)
    return f"it would be inside of {outer}" if outer else f"{inner} would be inside of it" if inner else ""


def say_left_out(name: str, generation: Generation, table: str, field: str, why: str) -> None:
    """Warn of a column that the index cannot have; everything else of its rows is there."""
    log.get().warning(
        "column left out", index=name, generation=generation.number, table=table, field=field, why=why,
        next=f"give it another name with `rename`, or name it in `exclude`; then: bridge reindex {name}",
    )  # fmt: skip


def say_changed(name: str, generation: Generation, table: str, news: dict[str, str], said: set[str]) -> None:
    """Warn of a table's columns whose type has changed, each change once.

    Args:
        news: what `changed` has found.
        said: what was said already; changed.
    """
    fresh = {column: what for column, what in news.items() if f"{table} {column} {what}" not in said}
    if fresh:
        said |= {f"{table} {column} {what}" for column, what in fresh.items()}
        log.get().warning(
            "columns changed their type", index=name, generation=generation.number, table=table,
            columns=fresh,
            why="a field keeps the type that it was made with", next=f"bridge reindex {name}",
        )  # fmt: skip


def say_gone(name: str, generation: Generation, table: str, gone: Iterable[str], said: set[str]) -> None:
    """Warn of columns that a table had when its documents were made and has no more, each once."""
    fresh = sorted(column for column in gone if f"{table} {column} gone" not in said)
    if fresh:
        said |= {f"{table} {column} gone" for column in fresh}
        log.get().warning(
            "columns are gone", index=name, generation=generation.number, table=table, columns=fresh,
            why="dropped, or renamed: a document keeps its field until its row is written again",
            next=f"bridge reindex {name}",
        )  # fmt: skip


def known_types(generation: Generation, table: str, columns: Sequence[mapping.Column]) -> dict[str, str]:
    """The types of a table's columns with those that came since; the first type of a column stays."""
    return {**{column.name: column.type for column in columns}, **generation.types.get(table, {})}


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
    added: dict[str, Any] = {}
    for member in members:
        own = properties(member.shape, columns[member.name], generation.choices)
        _add(generation, added, own)
    for document in documents:
        _add(generation, added, {field: mapping.guess(value) for field, value in document.items()})
    if not added:
        # Another bulk has added them meanwhile.
        return generation.mapping if documents else None
    grown = {**generation.mapping, "properties": {**known, **added}}
    body: dict[str, Any] = {"properties": added}
    if mapping.templates(added):
        body["dynamic_templates"] = grown["dynamic_templates"] = mapping.templates(grown["properties"])
    try:
        await engine.json("PUT", f"/{generation.physical}/_mapping", body)
    except EngineError as error:
        log.get().warning(
            "columns not added", index=name, columns=sorted(added), why=error.kind, next=f"bridge reindex {name}"
        )
        return None
    log.get().info("columns added", index=name, columns=sorted(added))
    return grown


def _add(generation: Generation, added: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Add the fields that a generation lacks and can have; the engine refuses all of them for one that it cannot."""
    known = generation.mapping["properties"]
    for field, kind in fields.items():
        if field not in known and field not in added and not misfit(generation, field, added):
            added[field] = kind
