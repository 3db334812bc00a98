"""What the published tables mean for the log: what PostgreSQL does not log, what may not be read, what is named and not
there. Pure.

Source: PostgreSQL documentation, "Replica Identity", "Row Security Policies"; wal2json's option
`numeric-data-types-as-string` (2.6).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby

import msgspec

from bridge.config import Config, Index, Source, join_name, split_name
from bridge.errors import ConfigError
from bridge.operate.checks.finding import Finding, Fix, warning, well, wrong
from bridge.pipeline import compactable
from bridge.source.catalog import Filter, Relation, quote_name
from bridge.source.leaving import astray, leaving, published, section
from bridge.source.values import FLOAT4, FLOAT8, NUMERIC

SHOWN = 10
FULL_COSTS = "each update and delete of it writes the whole old row to PostgreSQL's log"
LOCKS = "it takes an ACCESS EXCLUSIVE lock for a moment"


class Rights(msgspec.Struct, frozen=True):
    """What the role may do with a table: enter its schema, read it, as its owner; hidden: row security holds for it."""

    oid: int
    enters: bool = True
    reads: bool = True
    hidden: bool = False
    owns: bool = False
    owner: str = ""


class Tables(msgspec.Struct, frozen=True, kw_only=True):
    """What the catalogue says: the tables that hold rows and are chosen, the names of all that there are, and of the
    chosen ones rights and fitting indexes by oid. absent: what [source] tables names and is not there, and the remedy.
    """

    chosen: list[Relation]
    roots: list[tuple[str, str]] = []
    unlogged: list[str] = []
    rights: dict[int, Rights] = {}
    indexes: dict[int, str] = {}
    absent: tuple[str, str] | None = None


def judge(config: Config, found: Tables, role: str, *, exact: bool | None) -> list[Finding]:
    """All findings of tables.

    Args:
        role: the one that reads.
        exact: whether wal2json tells NaN and infinities; None where that is not known.
    """
    source, tables = config.source, found.chosen
    parts = {
        "tables.published": _published(found),
        "tables.pattern": _patterns(source, found),
        "tables.section": [*_astray(source, found), *_twice(source)],
        "tables.columns": [*missing(tables, source), *_keys(source, tables)],
        "tables.identity": [
            unlogged(table, source, found.indexes.get(table.oid, ""), found.rights.get(table.oid))
            for table in tables
            if not table.key and table.identity != "f"
        ],
        "tables.unlogged": [_skipped(name) for name in found.unlogged],
        "tables.exact": [] if exact is not False else inexact(tables, source),
        "tables.schema": _schemas(found, role),
        "tables.select": _unreadable(found, role),
        "tables.row_security": _hidden(found, role),
        "tables.index": [one for name in config.index for one in of_index(name, config.index[name], source, found)],
    }
    good = {
        "tables.published": _counted(tables),
        "tables.identity": "every table has a replica identity",
        "tables.select": f"the role {role} may read every table",
    }
    if config.stream.compact:
        parts["tables.compact"] = _compact(config, found)
        good["tables.compact"] = "every table fits into a compacted log"
    out = [one for part in parts.values() for one in part]
    return out + [well(id, "", what) for id, what in good.items() if tables and not parts[id]]


def _counted(tables: Sequence[Relation]) -> str:
    count = len({table.root for table in tables})
    return f"{count} table{'s' * (count != 1)} published"


def _published(found: Tables) -> list[Finding]:
    if found.absent is not None:
        return [wrong("tables.published", "", *found.absent)]
    if found.chosen:
        return []
    return [
        warning(
            "tables.published",
            "",
            "[source] tables chooses no table",
            "correct it, or create the tables: those that come later are published from their first row on",
        )
    ]


def _patterns(source: Source, found: Tables) -> list[Finding]:
    # What is named without a wildcard must exist: `absent` says so.
    literal = {join_name(*name) for name in Filter(source.tables).literal}
    out = []
    for pattern in source.tables:
        plain = pattern.removeprefix("!")
        only = Filter([plain])
        if join_name(*split_name(plain)) in literal and not pattern.startswith("!"):
            continue
        if found.chosen and not any(only.matches(*root) for root in found.roots):
            out.append(
                warning(
                    "tables.pattern",
                    pattern,
                    f"{pattern} matches no table",
                    f'correct "{pattern}" in [source] tables, or take it out; names are taken as written, without case'
                    " folding",
                )
            )
    return out


def _astray(source: Source, found: Tables) -> list[Finding]:
    return [
        warning(
            "tables.section",
            name,
            f"[source.table.{name!r}] is of no published table",
            "correct the name, as written in the catalogue, or take it out",
        )
        for name in astray(source, found.chosen, found.roots)
    ]


def _twice(source: Source) -> list[Finding]:
    names = sorted(source.table, key=split_name)
    groups = [list(group) for _, group in groupby(names, key=split_name)]
    return [
        wrong(
            "tables.section",
            join_name(*split_name(group[0])),
            f"{' and '.join(f'[source.table.{name!r}]' for name in group)} are of one table: only the first counts",
            "join them in one section",
        )
        for group in groups
        if len(group) > 1
    ]


def unlogged(table: Relation, source: Source, index: str = "", rights: Rights | None = None) -> Finding:
    """A table of whose updates and deletes PostgreSQL logs nothing.

    Args:
        index: one by which its rows can be told apart, where there is one.
    """
    stops = (section(source, table.root).on_missing_identity or source.on_missing_identity) == "stop"
    name = table.quoted
    remedies = [f"ALTER TABLE {name} REPLICA IDENTITY FULL"]
    costs = f"{FULL_COSTS}; {LOCKS}"
    if index:
        remedies.insert(0, f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX {quote_name(index)}")
        costs = LOCKS
    elif table.identity == "d":
        remedies.append("give it a primary key")
    make = wrong if stops else warning
    return make(
        "tables.identity",
        join_name(table.schema, table.table),
        "no replica identity: its updates and deletes are not in PostgreSQL's log",
        "; or ".join(remedies),
        why="the bridge stops at the first one" if stops else "they are counted and shown, and are not in the log",
        fix=Fix(remedies[:1], costs) if rights is not None and rights.owns else None,
    )


def _skipped(name: str) -> Finding:
    schema, table = name.split(".", 1)
    quoted = f"{quote_name(schema)}.{quote_name(table)}"
    return warning(
        "tables.unlogged",
        name,
        "the table is UNLOGGED",
        f"ALTER TABLE {quoted} SET LOGGED (it writes the whole table to the log), or leave it out of [source] tables",
    )


def inexact(tables: Iterable[Relation], source: Source) -> list[Finding]:
    """The columns whose NaN and infinities an older wal2json gives as null."""
    found = []
    for table in tables:
        hidden = leaving(source, table.root).hidden(column.name for column in table.columns)
        columns = [c.name for c in table.columns if c.oid in (FLOAT4, FLOAT8, NUMERIC) and c.name not in hidden]
        if columns:
            found.append(
                warning(
                    "tables.exact",
                    join_name(table.schema, table.table),
                    f"NaN and infinities of {', '.join(columns)} arrive as null",
                    "install wal2json 2.6 or newer",
                    why="the installed wal2json cannot tell them; rows that a snapshot reads have them",
                )
            )
    return found


def missing(tables: Iterable[Relation], source: Source) -> list[Finding]:
    """The columns that are named and not there: one that was renamed may be published under its new name."""
    columns: dict[tuple[str, str], set[str]] = {}
    for table in tables:
        columns.setdefault(table.root, set()).update(column.name for column in table.columns)
    found = []
    for root, there in columns.items():
        gone = sorted(leaving(source, root).named - there)
        if gone:
            found.append(
                warning(
                    "tables.columns",
                    join_name(*root),
                    f"there is no column {', '.join(gone)}",
                    f'correct columns, exclude and mask of [source.table."{join_name(*root)}"]',
                    why=f'[source.table."{join_name(*root)}"] names it; it may have another name by now',
                )
            )
    return found


def _keys(source: Source, tables: Sequence[Relation]) -> list[Finding]:
    out = {}
    for table in tables:
        try:
            leaving(source, table.root).refuse(table.root, table.key)
        except ConfigError as error:
            out[error.what] = wrong("tables.columns", join_name(*table.root), error.what, error.remedy)
    return list(out.values())


def _compact(config: Config, found: Tables) -> list[Finding]:
    out = []
    for table in found.chosen:
        hidden = leaving(config.source, table.root).hidden(column.name for column in table.columns)
        reason = compactable.finding(table, hidden)
        if reason is None:
            continue
        what, remedy = reason
        rights = found.rights.get(table.oid)
        whole = remedy.endswith("REPLICA IDENTITY FULL") and rights is not None and rights.owns
        out.append(
            wrong(
                "tables.compact",
                join_name(table.schema, table.table),
                f"a compacted log cannot hold {what}",
                f'{remedy}; or take it out of [source] tables, or choose mode = "log"',
                fix=Fix([remedy], f"{FULL_COSTS}; {LOCKS}") if whole else None,
            )
        )
    return out


def _schemas(found: Tables, role: str) -> list[Finding]:
    closed = {table.schema for table in found.chosen if not found.rights.get(table.oid, Rights(0)).enters}
    return [
        wrong(
            "tables.schema",
            schema,
            f"the role {role} has no USAGE on the schema {schema}",
            f"GRANT USAGE ON SCHEMA {quote_name(schema)} TO {quote_name(role)}",
        )
        for schema in sorted(closed)
    ]


def _unreadable(found: Tables, role: str) -> list[Finding]:
    """One finding a schema: a role that nobody has given anything lacks the right to all of them."""
    lacking = [table for table in found.chosen if not found.rights.get(table.oid, Rights(0)).reads]
    out = []
    for schema, group in groupby(sorted(lacking, key=lambda t: (t.schema, t.table)), key=lambda t: t.schema):
        tables = list(group)
        names = ", ".join(join_name(t.schema, t.table) for t in tables[:SHOWN])
        rest = f" and {len(tables) - SHOWN} more" if len(tables) > SHOWN else ""
        grants = [f"GRANT SELECT ON {table.quoted} TO {quote_name(role)}" for table in tables]
        all_at_once = f"GRANT SELECT ON ALL TABLES IN SCHEMA {quote_name(schema)} TO {quote_name(role)}"
        mine = all(found.rights[table.oid].owns for table in tables)
        out.append(
            wrong(
                "tables.select",
                join_name(schema, tables[0].table) if len(tables) == 1 else schema,
                f"the role {role} may not read {names}{rest}",
                "; ".join(grants) if len(grants) <= 3 else all_at_once,
                fix=Fix(grants) if mine else None,
            )
        )
    return out


def _hidden(found: Tables, role: str) -> list[Finding]:
    return [
        wrong(
            "tables.row_security",
            join_name(table.schema, table.table),
            f"row security holds for the role {role}",
            f"as a superuser: ALTER ROLE {quote_name(role)} BYPASSRLS; or take the table out of [source] tables",
        )
        for table in found.chosen
        if found.rights.get(table.oid, Rights(0)).hidden
    ]


def of_index(
    name: str, index: Index, source: Source, found: Tables, among: Collection[tuple[str, str]] | None = None
) -> list[Finding]:
    """The tables of an index of which the log has nothing.

    Args:
        among: only these are looked at; None for all.
    """
    there = published(source, found.chosen, found.roots)
    skipped = {one for one in found.roots if ".".join(one) in found.unlogged}
    return [
        wrong(
            "tables.index",
            name,
            *_unpublished(name, index, table, source, found),
            why="the log has no change of it from now on",
        )
        for table in index.holds
        if split_name(table) not in there - skipped and (among is None or split_name(table) in among)
    ]


def _unpublished(name: str, index: Index, table: str, source: Source, found: Tables) -> tuple[str, str]:
    """What is wrong with a table of an index, and the remedy."""
    split = split_name(table)
    plain, correct = join_name(*split), f"correct `{'tables' if index.tables else 'table'}` of [index.{name}]"
    root = next((one.root for one in found.chosen if (one.schema, one.table) == split), split)
    if root != split:
        return f"{plain} is a partition: its changes stand under the name {join_name(*root)}", correct
    if ".".join(split) in found.unlogged:
        return f"{plain} is UNLOGGED, and so not published", f"make it LOGGED, or {correct}"
    if split in found.roots:
        return f"{plain} is not published", f"{correct}, or add it to [source] tables"
    like = near(split, published(source, found.chosen, found.roots))
    what = f"{plain} is not published{f' (is it {join_name(*like)}?)' if like else ''}: there is no such table"
    adding = "" if Filter(source.tables).matches(*split) else " and add it to [source] tables"
    return what, f"{correct}, or create it{adding}"


def near(name: tuple[str, str], known: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The table that may be meant: one of a like name in the same schema, or of the same name in another one."""
    schema, table = name
    ordered = sorted(known)
    like = difflib.get_close_matches(table, [one for of, one in ordered if of == schema], 1)
    return (schema, like[0]) if like else next((one for one in ordered if one[1] == table), None)
