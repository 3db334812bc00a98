"""Whether DDL has changed rows of a table behind the log's back, from what its catalogue was and is. Pure.

A `Shape` is kept of every table. What the catalogue says today is compared with it: most differences change no row (a
column that may be null, one that is dropped, a partition that is made empty), and are adopted. The others are named.
TRUNCATE gives a table a new file, too, but says so in PostgreSQL's log (`altering`).

What was altered and altered back shows in no catalogue, but in the events that were written meanwhile: these are
compared with the shape, too (`turned`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec

from bridge.source.rows import Plan
from bridge.source.shapes import Column, Part, Today
from bridge.stream.state import Again, Leaf, Place, Shape, SnapshotStatus, Turned

AWAY = "it was not there for a time"
BACK = "had another name or type for a time"
# Types whose values are the same text, and which ALTER TYPE makes of each other without a new file.
_ALIKE = ({25, 1043},)
AT_MOST = 4


class Verdict(NamedTuple):
    """What a table's differences mean.

    seen: what changed its rows; left: the names, in the log, of partitions that are its own no more; attached: its
    partitions that came with what they held, if they held anything.
    """

    seen: list[str]
    left: list[str]
    attached: list[Part]


def shape(today: Today, kept: Shape | None = None) -> Shape:
    """What to keep of a table; `kept`: what was, where the log's rows are still those of then."""
    former = _former(kept) - {column.name for column in today.columns} if kept is not None else set()
    return Shape(
        oid=today.oid,
        named=today.named,
        owner=today.owner,
        columns=[Place(c.place, c.name, c.oid, c.type) for c in today.columns],
        leaves=[Leaf(part.oid, part.name, part.file, part.link, part.key) for part in today.parts],
        former=sorted(former),
    )


def _former(kept: Shape) -> set[str]:
    """The names of all columns that the log had of a table, so far as that is kept."""
    came = kept.turned.came if kept.turned is not None else []
    return {*kept.former, *(place.name for place in kept.columns), *(name for _, name in came)}


def settled(kept: Shape) -> Shape:
    """A shape without what has turned since it was kept."""
    return msgspec.structs.replace(kept, turned=None)


def judge(
    kept: Shape,
    today: Today,
    truncated: Callable[[Part], bool],
    hidden: Collection[str] = frozenset(),
    met: Collection[tuple[int, str]] = (),
    *,
    unseen: bool = False,
) -> Verdict:
    """What the differences of a table mean.

    Args:
        truncated: whether a part has its file from a TRUNCATE that is in the log.
        hidden: columns that are not published.
        met: partitions that the stream has brought changes of since, by oid and name.
        unseen: whether it has brought changes of names that nobody saw in the catalogue.
    """
    if today.oid != kept.oid:
        return Verdict(["another table has its name now"], [], [])
    seen = []
    if kept.gone:
        seen.append(AWAY)
    elif today.named != kept.named and today.owner == kept.owner:
        seen.append("it had another name for a time")
    columns = _columns(kept, today, hidden)
    seen += columns + back(kept, today, hidden)
    before, now = {leaf.oid: leaf for leaf in kept.leaves}, {part.oid: part.name for part in today.parts}
    # All the names under which the log has rows of partitions; one that has several, or is another's, needs a reading.
    names = [(leaf.oid, leaf.name) for leaf in kept.leaves if leaf.oid != kept.oid] + sorted(met)
    left = dict.fromkeys(name for oid, name in names if oid not in now)
    seen += [f"another partition is called {name} now" for name in left if name in now.values()]
    seen += [f"partition {name} renamed to {now[oid]}" for oid, name in names if now.get(oid, name) != name]
    attached = []
    for part in today.parts:
        leaf = before.get(part.oid)
        found = part.named or not (left or unseen)
        if leaf is None and part.inplace and found and (part.file == part.oid or truncated(part)):
            continue  # made as a partition: all its rows are in the log, but for those under a former name
        if leaf is None or leaf.link != part.link:
            attached.append(part)
            continue
        of = _of(part, today)
        if leaf.key != part.key:
            seen.append(f"{of}key ({', '.join(leaf.key)}) is ({', '.join(part.key)}) now")
        if leaf.file != part.file and not columns and not truncated(part):
            seen.append(f"{of}all rows written anew")
    return Verdict(seen, list(left), attached)


def _columns(kept: Shape, today: Today, hidden: Collection[str]) -> list[str]:
    before = {place.place: place for place in kept.columns}
    valued = {name for part in today.parts for name in part.missing}
    names = {place.name for place in kept.columns} | set(kept.former)
    found: list[str | None] = []
    for column in today.columns:
        place = before.get(column.place)
        if column.name in hidden and (place is None or place.name == column.name):
            continue
        if place is not None:
            found.append(_changed(place, column))
        elif column.name in valued:
            found.append(f"column {column.name} added with a default")
        elif column.name in names:
            found.append(f"column {column.name} dropped and made again")
    return [one for one in found if one is not None]


def back(kept: Shape, today: Today, hidden: Collection[str]) -> list[str]:
    """What is as it was, and was otherwise in the log meanwhile. A column that is gone by now was only dropped."""
    if kept.turned is None:
        return []
    came = [_came(place, name, kept, today, hidden) for place, name in kept.turned.came]
    there = {(column.place, column.name) for column in today.columns if column.name not in hidden}
    names = [place.name for place in kept.columns if (place.place, place.name) in there]
    seen = [f"column {name} {BACK}" for name in names if name in kept.turned.columns]
    parts = [part for part in today.parts if part.oid in kept.turned.keys]
    keys = [f"{_of(part, today)}it had another key for a time" for part in parts]
    return seen + keys + [one for one in came if one is not None]


def _came(place: int, name: str, kept: Shape, today: Today, hidden: Collection[str]) -> str | None:
    """What became of a column that came since, and that rows in the log have under its name of then."""
    now = next((column for column in today.columns if column.place == place), None)
    if now is not None:
        return f"column {name} renamed to {now.name}" if now.name not in {name, *hidden} else None
    names = {column.name: column.place for column in today.columns}
    if name in names:
        return f"column {name} dropped and made again" if place else None
    known = {one.place for one in kept.columns}
    fresh = [column.name for column in today.columns if column.place not in known and column.name not in hidden]
    return f"column {name} may be {fresh[0]} now" if fresh and not place else None


def _of(part: Part, today: Today) -> str:
    return f"partition {part.name}: " if part.oid != today.oid else ""


def turned(
    kept: Shape, plan: Plan, at: str, *, row: bool = True, shown: Collection[str] | None = None
) -> Turned | None:
    """What the log has had otherwise than a table's shape, with the event that is written by a plan at a position.

    None where that event tells nothing that is not known yet.

    Args:
        row: whether the event has the row, not the key alone.
        shown: the columns that the change itself has, where it may have left out others; None where those are all.
    """
    relation = plan.relation
    leaf = next((leaf for leaf in kept.leaves if leaf.oid == relation.oid), None)
    if kept.gone or leaf is None:
        return None  # another table, of which the catalogue tells
    virtual = {column.name for column in relation.columns if column.virtual}
    # What an update may leave out for its size need not be there: a name that nobody knows may be its own.
    strange = plan.fields.keys() - {place.name for place in kept.columns} - {column.name for column in relation.columns}
    others = plan.fields.keys() - {place.name for place in kept.columns}
    columns, keys = set[str](), set[int]()
    for place in kept.columns if row else ():
        found = plan.fields.get(place.name)
        if found is None:
            # Where the log has no name that the table lacks, this one came later: no row has had it otherwise.
            columns |= {place.name} - virtual if others else set()
        elif not _alike(place.oid, found.oid) or (strange and shown is not None and place.name not in shown):
            columns.add(place.name)
        elif plan.numbers.get(place.name, place.place) != place.place:
            columns.add(place.name)  # of another column, which has a name of its own now
    if sorted(leaf.key) != sorted(plan.key):
        keys.add(leaf.oid)
    known = kept.turned or Turned("", [], [])
    seen = {name for name in others if plan.fields[name].shown and (shown is None or name in shown)} if row else set()
    places = {place.place for place in kept.columns}
    came = {(number, name) for name in seen if (number := plan.numbers.get(name, 0)) not in places} - set(known.came)
    if not columns and not keys and not came:
        return None
    return Turned(
        max(at, known.at),
        sorted(columns.union(known.columns)),
        sorted(keys.union(known.keys)),
        sorted(came.union(known.came)),
    )


def _alike(one: int, other: int) -> bool:
    return one == other or any({one, other} <= alike for alike in _ALIKE)


def _changed(before: Place, now: Column) -> str | None:
    if before.name != now.name:
        return f"column {before.name} renamed to {now.name}"
    if not _alike(before.oid, now.oid):
        return f"type of {now.name}: {before.type} → {now.type}"
    return None


def told(seen: Collection[str]) -> str:
    """What was seen, for one line."""
    first = list(dict.fromkeys(seen))
    more = f" and {len(first) - AT_MOST:,} more" if len(first) > AT_MOST else ""
    return "; ".join(first[:AT_MOST]) + more


def marked(status: SnapshotStatus, error: str, asked: str, *, reads: bool, another: bool = False) -> SnapshotStatus:
    """A table's status once its rows were changed: what the log has of it stays a picture to build from, of before.

    Args:
        asked: tells this wish from any other.
        reads: whether it is read again by itself. What is being read already is read from its beginning in any case.
        another: the table was not there, or was another one: why a reading of that has failed is past.
    """
    now = status.again
    if now is None or (another and now.state == "failed" and reads):
        again = Again(state="requested", asked=asked) if reads else None
    elif now.under_way:
        again = Again(state="requested", asked=asked)
    else:
        # Whoever has it go on gets the whole table; what somebody has stopped stays so.
        why = "" if another and now.state == "failed" else now.why
        again = Again(state=now.state, why=why or error, asked=asked)
    return msgspec.structs.replace(
        status,
        state="incomplete" if status.state == "done" else status.state,
        error=error if status.complete_from or not status.error else status.error,
        again=again,
    )


def begun_since(status: SnapshotStatus, seq: int) -> bool:
    """Whether a complete reading of the table began at this sequence or later, be it done or under way."""
    again = status.again
    if again is not None:
        return again.under_way and again.first_seq >= seq
    return status.mode == "incremental" and status.state == "done" and status.first_seq >= seq
