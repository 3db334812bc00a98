"""Whether an index can be had as it is configured, of its tables and its engine: asked before anything is made.

One check for builds, `--dry-run` and `--show-mapping`; every finding is a ConfigError that names the key, the name and
the table. It is asked of a generation that is about to be begun, and of no reader at work: what becomes of columns that
come or go later is `columns`' affair.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bridge.config import Index
from bridge.errors import ConfigError
from bridge.index import fieldnames
from bridge.index.columns import joined, unambiguous
from bridge.index.document import load
from bridge.index.generation import Member
from bridge.index.mapping import Choices
from bridge.index.naming import Template
from bridge.index.place import Site
from bridge.stream.state import TableRecord

Tables = Mapping[str, TableRecord]

_KEYS = ("columns", "exclude", "rename", "soft_delete", "routing")
# The log still holds rows with the columns that a table had once: these keys say what becomes of those, too.
_OF_OLD = ("exclude", "rename")
_MOST = 30


def sound(where: Site, tables: Tables, own: dict[str, Any] | None, chosen: Choices) -> dict[str, Any]:
    """The fields that the columns get; none where the user's own mapping says it all.

    Args:
        tables: what is recorded of the index's tables, by their names as they are configured.

    Raises:
        ConfigError: the index cannot be had so.
    """
    loadable(where.members)
    _columns_exist(where, tables)
    for member in where.members:
        if tables[member.name].key:
            named_by_key(member, tables[member.name].key)
        unambiguous(member, tables[member.name].plain)
    _fields_exist(where, tables)
    _fields_fit(where, tables, own, chosen)
    if own is not None:
        return {}
    properties = joined(where.members, {name: table.plain for name, table in tables.items()}, chosen)
    _apart(where, tables, properties)
    return properties


def loadable(members: Iterable[Member]) -> None:
    """Return where every transform can be called; ConfigError where one cannot."""
    for member in members:
        if member.shape.transform:
            load(member.shape.transform)


def named_by_key(member: Member, key: Sequence[str]) -> None:
    """Whether every row has an id of its own, and one that its delete tells as well.

    Raises:
        ConfigError: the template holds other columns than the key's.
    """
    if not member.shape.id:
        return
    columns = Template(member.shape.id).columns
    if set(columns) != set(key):
        raise ConfigError(
            f"the id {member.shape.id!r} of {member.name} must hold all columns of its key and no others: "
            f"{', '.join(key)}",
            "correct `id` of the index: rows that differ elsewhere would be one document",
        )


# Columns


def _columns_exist(where: Site, tables: Tables) -> None:
    for key in _KEYS:
        for at, members in _places(where, key):
            for name in _named(getattr(members[0].shape, key)):
                having = [name in _known(tables[member.name], key) for member in members]
                # A row that does not say where it is routed to has no place; the others may concern one table alone.
                if not (all(having) if key == "routing" else any(having)):
                    lacking = [member for member, has in zip(members, having, strict=True) if not has]
                    raise _no_column(at, name, lacking, tables)


def _places(where: Site, key: str) -> Iterator[tuple[str, list[Member]]]:
    """Where a key of an index is said, and the tables for which it counts there."""
    own = {table for table, part in where.index.of.items() if getattr(part, key) is not None}
    shared = [member for member in where.members if member.name not in own]
    if shared:
        yield f"index.{where.configured}.{key}", shared
    for member in where.members:
        if member.name in own:
            yield f'index.{where.configured}.of."{member.name}".{key}', [member]


def _named(value: Any) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value)


def _known(table: TableRecord, key: str) -> set[str]:
    today = {column.name for column in table.columns}
    if key not in _OF_OLD:
        return today
    return today | table.former | (set(table.hidden) if key == "exclude" else set())


def _no_column(at: str, name: str, lacking: Sequence[Member], tables: Tables) -> ConfigError:
    first = tables[lacking[0].name]
    which = ", ".join(member.name for member in lacking)
    why = f"{which} does not have" if len(lacking) == 1 else f"none of {which} has"
    hidden = " in the log: the source's `exclude` keeps it out" if name in first.hidden else ""
    has = dict.fromkeys(column.name for member in lacking for column in tables[member.name].columns)
    return ConfigError(
        f"{at} names the column {name}, which {why}{hidden}", f"correct it: {_instead(name, list(has), 'columns')}"
    )


def _instead(name: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(known[:_MOST]) + (", …" if len(known) > _MOST else "")
    return f"{f'did you mean {near[0]}? ' if near else ''}the {what} are {listed or 'none'}"


# Fields


def _fields_exist(where: Site, tables: Tables) -> None:
    """What a transform makes is not known; beneath a field that is there, its kind decides (`_apart`)."""
    if any(member.shape.transform for member in where.members):
        return
    known = list(_origins(where, tables, old=True))
    for name in where.index.fields:
        parts = name.split(".")
        if not any(".".join(parts[: count + 1]) in known for count in range(len(parts))):
            listed = ", ".join(member.name for member in where.members)
            raise ConfigError(
                f"index.{where.configured}.fields names the field {name}, which no document of {listed} has",
                f"correct it: {_instead(name, known, 'fields')}",
            )


def _fields_fit(where: Site, tables: Tables, own: dict[str, Any] | None, chosen: Choices) -> None:
    dotted = own is None or own.get("mappings", own).get("subobjects") is not False
    origins = _origins(where, tables, transformed=own is None)
    for field, (whence, remedy) in {**_beside(where.index), **origins}.items():
        why = fieldnames.unfit(field, chosen.product, dotted=dotted)
        if why:
            raise ConfigError(f"{whence} cannot be the field {field!r} of index {where.configured}: {why}", remedy)


def _apart(where: Site, tables: Tables, properties: Mapping[str, Any]) -> None:
    """Whether no field would be inside of another one that is no object."""
    origins = {**_beside(where.index), **_origins(where, tables)}
    for field in properties:
        outer = fieldnames.around(field, properties)
        if outer:
            whence, remedy = origins[field]
            stored = ", only stored (see `json`)," if properties[outer].get("type") == "object" else ""
            raise ConfigError(
                f"{whence} would be the field {field} of index {where.configured}, inside of {outer}:"
                f" {origins[outer][0]}{stored} is no object that could hold it",
                remedy,
            )


def _beside(index: Index) -> dict[str, tuple[str, str]]:
    return {name: (f"`fields.{name}`", "correct `fields` of the index") for name in index.fields}


def _origins(where: Site, tables: Tables, *, old: bool = False, transformed: bool = True) -> dict[str, tuple[str, str]]:
    """The fields of all documents, each with where it comes from and how it can be another one.

    Args:
        old: with the columns that tables had once.
        transformed: with the columns of tables whose documents a transform makes.
    """
    found: dict[str, tuple[str, str]] = {}
    for member in where.members:
        shape, table = member.shape, tables[member.name]
        names = [column.name for column in table.columns] + (sorted(table.former) if old else [])
        if shape.transform and not transformed:
            names = []
        for name in names:
            if name not in shape.exclude and (not shape.columns or name in shape.columns):
                remedy = f'give it another name: rename = {{ "{name}" = "…" }}; or leave it out: exclude = ["{name}"]'
                found.setdefault(shape.rename.get(name, name), (f"the column {name} of {member.name}", remedy))
        for name in shape.constants:
            found.setdefault(name, (f"the constant {name} of {member.name}", "give the constant another name"))
    return found
