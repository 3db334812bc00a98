"""Which tables a compacted log can hold: those whose every change tells the whole row, and which row it is. Pure.

It keeps only the last event of each row. So a table needs a key, which goes into the subject, and none of its updates
may leave out a TOASTed column: PostgreSQL sends the whole old row only with REPLICA IDENTITY FULL.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from bridge.errors import ConfigError, NotCompactable
from bridge.source.catalog import Relation
from bridge.stream.state import TableRecord

# Types whose values have the same text, so that a key that goes from one to the other stays the same key.
_ALIKE = ({20, 21, 23}, {25, 1043})


def refuse(relations: Iterable[Relation], excluded: dict[tuple[str, str], set[str]]) -> None:
    """Return where every table can be held.

    Args:
        excluded: by root table, the columns that are not published: what they leave out does not matter.

    Raises:
        ConfigError: names every table that cannot, and what mends it.
    """
    findings = [found for r in relations if (found := finding(r, excluded.get(r.root, ())))]
    if findings:
        raise ConfigError(
            f"{len(findings)} table{'s'[: len(findings) != 1]} cannot be in a compacted log:"
            + "".join(f"\n  - {what}: {remedy}" for what, remedy in findings),
            'mend them, take them out of [source] tables, or choose mode = "log"',
        )


def check(relation: Relation, excluded: Collection[str], kept: TableRecord | None) -> None:
    """Return where a table that the stream meets can be held, as it is now.

    Raises:
        NotCompactable: it was made or altered so that it cannot.
    """
    if not relation.oid or relation.kind != "r":
        return  # dropped since: its changes tell by themselves; or without rows of its own
    found = finding(relation, excluded)
    if found is not None:
        what, remedy = found
        raise NotCompactable(
            f"a compacted log cannot hold {what}",
            f'{remedy} and start again; or take it out of [source] tables, or choose mode = "log"',
        )
    if kept is not None and not relation.is_partition and _other_key(relation, kept):
        raise NotCompactable(
            f"the key of {relation.name} was {', '.join(kept.key)} and is {', '.join(relation.key)} now: its rows "
            "stand under their old keys in the compacted log",
            "start anew: `bridge drop --stream --state`, then `bridge run`",
        )


def finding(relation: Relation, excluded: Collection[str]) -> tuple[str, str] | None:
    """What is wrong with a table, and what mends it; None where nothing is."""
    name = relation.quoted
    if not relation.key:
        return (
            f"{relation.name}, which has no key that tells its rows apart",
            f"ALTER TABLE {name} ADD PRIMARY KEY (…), not deferrable",
        )
    toasted = [
        c.name
        for c in relation.columns
        if c.toast and not c.virtual and c.name not in relation.key and c.name not in excluded
    ]
    if toasted and relation.identity != "f":
        return (
            f"{relation.name}, whose updates can leave out {', '.join(toasted)} (TOASTed values)",
            f"ALTER TABLE {name} REPLICA IDENTITY FULL",
        )
    return None


def _other_key(relation: Relation, kept: TableRecord) -> bool:
    """Whether other columns identify its rows now; the same ones may have got other names."""
    if not kept.key or (tuple(kept.key) == relation.key and _types(relation, kept)):
        return False
    before, today = set(kept.key), {c.name for c in relation.columns}
    renamed = not (before & today - set(relation.key)) and len(before) == len(relation.key)
    return not (renamed and _types(relation, kept))


def _types(relation: Relation, kept: TableRecord) -> bool:
    """Whether the key's values have the same text as before."""
    before = {c.name: c.oid for c in kept.columns}
    today = {c.name: c.oid for c in relation.columns}
    pairs = [(before.get(old), today[new]) for old, new in zip(kept.key, relation.key, strict=False)]
    return all(old in (None, new) or any({old, new} <= kinds for kinds in _ALIKE) for old, new in pairs)
