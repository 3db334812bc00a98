"""What searches see by an index's alias, and what is wrong with it. Pure."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from bridge.index.generation import IndexRecord


class Astray(msgspec.Struct, frozen=True):
    """Why searches see something else than the live generation, and what to do about it; `gone`: it is not there any
    more."""

    why: str
    remedy: str
    gone: bool = False


def astray(
    name: str, alias: str, physical: str, holders: Collection[str], there: Collection[str] | None = None
) -> Astray | None:
    """What is wrong with an alias; None where it is on the live generation alone.

    Args:
        name: the index, as it is configured.
        physical: the index that searches are to see.
        holders: the indexes that have the alias; the alias' own name where an index is called so.
        there: the indexes that exist, as far as they were asked for; None where they were not.
    """
    if set(holders) == {physical}:
        return None
    if not holders and there is not None and physical not in there:
        return Astray(
            f"the index {physical} is gone: searches find nothing",
            f"build it anew from the log: bridge reindex {name}",
            gone=True,
        )
    if not holders:
        return Astray(
            f"no index has the alias {alias}: searches find nothing",
            f"a running reader puts it back; where it does not: bridge reindex {name}",
        )
    if alias in holders:
        return Astray(
            f"an index has the name of the alias {alias}: searches see that index",
            f"let the alias take its place, which deletes it: bridge reindex {name} --replace-index",
        )
    others = ", ".join(sorted(holder for holder in holders if holder != physical))
    return Astray(
        f"somebody has put the alias {alias} on {others}: searches see that"
        + (" as well" if physical in holders else ""),
        f"take it back with a new generation: bridge reindex {name}; or move it back by hand",
    )


def misled(
    name: str,
    records: Collection[IndexRecord],
    alias: str,
    holders: Collection[str] | None,
    there: Collection[str] | None = None,
) -> Astray | None:
    """The same by records that were read before and after the alias was asked for: a rebuild may have moved it between.

    None, too, where `holders` is not known, nothing was built yet, or what searches see goes by another alias than
    `alias`, whose holders were asked for.
    """
    found = None
    for record in records:
        live = record.get(record.generation)
        if holders is None or live is None or record.alias != alias or record.having("switching"):
            return None
        found = astray(name, alias, live.physical, holders, there)
        if found is None:
            return None
    return found
