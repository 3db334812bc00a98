"""What a table must go on having while it is read: its name, its columns, its key. Pure."""

from __future__ import annotations

import hashlib
from shlex import quote as typed

from bridge.config import join_name
from bridge.source.catalog import Relation
from bridge.source.chunks import Gone
from bridge.source.rows import Plan


def shape(plan: Plan) -> str:
    """Stands for the columns that all of a table's rows have in the log; another one where the table was altered, or
    other columns may be published."""
    relation = plan.relation
    shown = {name for name, field in plan.fields.items() if field.shown}
    columns = sorted(f"{one.name}:{one.oid}:{one.type}" for one in relation.columns if one.name in shown)
    columns += sorted(shown & plan.masks.keys())
    if relation.kind == "r" and not relation.is_partition:
        # A partition may have a key of its own, and its columns in other places.
        columns += [str(column.number) for column in relation.columns] + list(relation.key)
    return hashlib.md5("\0".join(columns).encode(), usedforsecurity=False).hexdigest()


def elsewhere(root: tuple[str, str], relation: Relation) -> Gone:
    """The error for a table that was renamed, or attached to another."""
    now = join_name(*relation.root)
    how = "a partition of" if relation.is_partition else "called"
    return Gone(f"{join_name(*root)} is {how} {now} now", f"ask for that one: bridge snapshot {typed(now)}")
